"""What once went wrong: each of these failed before it was mended."""

import contextlib
import gc
import os
import random
import signal
import threading

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

import octavo
from octavo.config import Eviction
from octavo.errors import ConfigError, PromptError
from octavo.kv.snapshot import SnapshotLayout
from octavo.reuse import ReuseStore, files, forks
from octavo.reuse.costs import MOST, Costs
from octavo.reuse.files import encoded, read_entry
from octavo.reuse.index import Index
from octavo.reuse.record import Entry, Record
from octavo.reuse.shelf import Rules, Shelf
from octavo.reuse.shelving import Shelving
from reuse.plain import Model
from reuse.test_disk import opened, prompt
from reuse.test_reuse_generate import GREEDY, SETTINGS, gated
from tiny import tokens

PARAMS = octavo.SamplingParams(max_tokens=8, temperature=0.0)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("given", ["1GiB", {}, True, ReuseStore])
def test_what_is_no_store_is_refused_at_attach(given):
    with pytest.raises(ConfigError, match="reuse must be an octavo"):
        gated(reuse=given)


def test_one_padded_prompt_that_is_known_without_padding():
    model, ids = gated(reuse=ReuseStore("20MB", **SETTINGS)), tokens(1, 40)
    model.generate(ids, **GREEDY)
    padded, mask = (torch.nn.functional.pad(t, (12, 0)) for t in (ids, torch.ones_like(ids)))
    assert torch.equal(
        model.generate(padded, attention_mask=mask, **GREEDY), gated().generate(padded, attention_mask=mask, **GREEDY)
    )


def test_what_a_given_configuration_leaves_open_is_the_models_own():
    store = ReuseStore("20MB", **SETTINGS)
    plain, model, ids = gated(), gated(reuse=store), tokens(1, 40)
    config = GenerationConfig(do_sample=False, max_new_tokens=6)
    for each in (plain, model):
        each.generation_config.num_beams = 3
    for _ in range(2):
        assert torch.equal(model.generate(ids, generation_config=config), plain.generate(ids, generation_config=config))
    assert store.stats().hits == 1
    model.generation_config.num_beams, model.generation_config.use_cache = 1, False
    model.generate(ids, generation_config=config)
    assert store.stats().requests == 2


def test_a_prompt_beyond_the_positions_is_refused_though_most_of_it_is_known():
    model = gated(reuse=ReuseStore("50MB", **SETTINGS))
    model.generate(tokens(1, 1024), **GREEDY)
    with pytest.raises(PromptError, match="1,025 tokens"):
        model.generate(tokens(1, 1025), **GREEDY)


def test_what_autocast_rounds_is_not_stored():
    store = ReuseStore("20MB", **SETTINGS)
    model, ids = gated(reuse=store), tokens(1, 40)
    with torch.autocast("cpu", torch.bfloat16):
        model.generate(ids, **GREEDY)
    assert store.list() == []


def test_a_request_of_the_engine_is_its_askers():
    store = ReuseStore("20MB", **SETTINGS)
    llm, ids = octavo.LLM(gated(reuse=store)), tokens(1, 40)[0].tolist()
    requests = []
    for tenant in ("a", "b"):
        with store.request(tenant=tenant, tags=[tenant]):
            requests.append(llm.engine.add(ids, PARAMS))
    while not all(request.done for request in requests):
        llm.engine.step()
    assert {(each.tenant, each.tags) for each in store.list()} == {("a", ("a",)), ("b", ("b",))}
    assert store.stats().hits == 0


def test_weights_that_change_under_a_running_request_are_stored_for_nobody():
    store = ReuseStore("20MB", **SETTINGS)
    model = gated(reuse=store)
    llm = octavo.LLM(model)
    request = llm.engine.add(tokens(1, 40)[0].tolist(), PARAMS)
    for _ in range(3):
        llm.engine.step()
    stored = len(store.list())
    with torch.no_grad():
        model.base_model.layers[1].self_attn.v_proj.weight.mul_(3)
    while not request.done:
        llm.engine.step()
    assert len(store.list()) == stored == 1


def test_a_turn_that_failed_holds_nothing(smollm):
    from octavo.cli.chat import Conversation, Sampling

    plain, tokenizer = smollm
    store = ReuseStore("50MB", shortest=8)
    model = octavo.attach(plain, reuse=store)
    try:
        for _ in range(2):
            conversation = Conversation(model, tokenizer, Sampling(max_new_tokens=2))

            def stop(done, total):
                raise KeyboardInterrupt

            with contextlib.suppress(KeyboardInterrupt):
                "".join(conversation.ask("What is the capital of France?", stop))
            assert not store.flights.all
            assert all(record.users == 0 for record in store.index.records.values())
            "".join(conversation.ask("What is the capital of France?"))
    finally:
        octavo.detach(model)


def test_what_is_pinned_does_not_expire_until_it_is_let_go():
    now = [1000.0]
    model, store = Model(Eviction(7)), opened(None, clock=lambda: now[0])
    with store.request(ttl=50):
        model.ask(store, prompt(0))
    store.pin(prompt(0))
    now[0] += 100
    assert model.ask(store, prompt(0)) == 69
    store.unpin(prompt(0))
    assert model.ask(store, prompt(0)) == 0
    with store.request(ttl=50):
        model.ask(store, prompt(1))
    store.pin(prompt(1), ttl=500)
    store.unpin(prompt(1))
    now[0] += 100
    assert store.explain(prompt(1)).boundary < 69


def test_a_clock_that_jumps_costs_hits_at_most():
    now = [1000.0]
    model, store = Model(Eviction(7)), opened(None, clock=lambda: now[0], ttl=50)
    for jump in (0, 10**9, -(10**9), -900, 2000, 0):
        now[0] += jump
        model.ask(store, prompt(0))
        model.ask(store, prompt(1))
    assert model.ask(store, prompt(1)) == 69


def test_a_file_that_cannot_be_read_now_is_left_where_it_is(tmp_path, monkeypatch):
    model, store = Model(None), opened(tmp_path)
    model.ask(store, prompt(0))
    store.close()
    again = opened(tmp_path, None)

    def fails(path, entry):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("octavo.reuse.shelving.read_extent", fails)
    assert model.ask(again, prompt(0)[:68]) == 0
    again.close()
    monkeypatch.undo()
    assert model.ask(opened(tmp_path, None), prompt(0)) == 69


def test_what_goes_on_from_an_unreadable_file_is_left_where_it_is(tmp_path, monkeypatch):
    model, store = Model(None), opened(tmp_path)
    model.ask(store, prompt(0))
    store.flush()
    model.ask(store, [*prompt(0), *prompt(1)])
    parent = next(r.path for r in store.index.records.values() if r.children)
    store.close()

    def fails(path):
        if path == parent:
            raise OSError(24, "Too many open files")
        return read_entry(path)

    monkeypatch.setattr("octavo.reuse.shelving.read_entry", fails)
    later = store.clock() + 1000
    assert model.ask(opened(tmp_path, None, clock=lambda: later), prompt(2)[:3]) == 0
    monkeypatch.undo()
    assert model.ask(opened(tmp_path, None), [*prompt(0), *prompt(1)]) == 139


def test_what_goes_on_from_a_file_that_fails_in_a_request_is_left_where_it_is(tmp_path, monkeypatch):
    model, store = Model(None), opened(tmp_path)
    model.ask(store, prompt(0))
    store.flush()
    model.ask(store, [*prompt(0), *prompt(1)])
    store.close()
    again = opened(tmp_path, None)

    def fails(path, entry):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("octavo.reuse.shelving.read_extent", fails)
    assert model.ask(again, prompt(0)[:60]) == 0
    monkeypatch.undo()
    assert again.stats().errors >= 1
    assert model.ask(opened(tmp_path, None), [*prompt(0), *prompt(1)]) == 139


def test_a_file_that_is_replaced_while_it_is_read_is_not_damaged(tmp_path, monkeypatch):
    model, store = Model(None), opened(tmp_path, "20MB")
    model.ask(store, prompt(0))
    store.flush()
    (record,) = store.index.records.values()
    replaced = b"".join(encoded(record.entry, record.extent)) + b"longer"
    fields = files._fields

    def meanwhile(head, path):
        aside = tmp_path / "aside"
        aside.write_bytes(replaced)
        aside.replace(path)
        return fields(head, path)

    monkeypatch.setattr(files, "_fields", meanwhile)
    assert read_entry(record.path).key == record.key
    store.close()


def test_a_folder_that_is_deleted_costs_a_warning(tmp_path):
    model, store = Model(None), opened(tmp_path / "kv", None)
    model.ask(store, prompt(0))
    for path in (tmp_path / "kv").iterdir():
        path.unlink()
    (tmp_path / "kv").rmdir()
    with pytest.warns(RuntimeWarning, match="cannot write"):
        assert model.ask(store, prompt(0)) == 0
    assert model.ask(store, prompt(0)) == 0
    assert store.list() == []


def test_a_write_that_fails_in_an_unknown_way_holds_nothing(tmp_path, monkeypatch):
    model, store = Model(None), opened(tmp_path)
    monkeypatch.setattr("octavo.reuse.tiers.encoded", lambda *args: 1 / 0)
    model.ask(store, prompt(0))
    with pytest.raises(ZeroDivisionError):
        store.flush()
    assert all(record.users == 0 for record in store.index.records.values())


def test_mistakes_are_refused():
    store = ReuseStore("1MB")
    for options in ({"tags": "abc"}, {"tenant": 5}):
        with pytest.raises(ConfigError, match="tags must be"), store.request(**options):
            pass
    with pytest.raises(ConfigError, match="key is empty"):
        store.delete(key="")


def record_of(ids, first=0):
    layout = SnapshotLayout(1, 1, 4, torch.float32, None, 0)
    ids = np.array(ids, np.int32)
    return Record(Entry("s", {}, "", (), 0.0, float("inf"), layout, ids, first, len(ids), (), False, {}), 100)


def test_what_an_edited_document_leaves_behind_is_freed():
    index, dice = Index(Rules(3_000_000, "slru", {}), Rules(None, "slru", {})), random.Random(0)
    document = record_of([dice.randrange(50) for _ in range(3000)])
    index.add(document, [])
    for i in range(200):
        at = dice.randrange(10, 3000)
        edited = record_of([*document.entry.tokens[:at], 60 + i, 1], at)
        index.add(edited, [document])
        if i % 2:
            index.drop(edited)
        else:
            kept = edited
            index.drop(kept)
    (node,) = index.trees["s"].root.children.values()
    assert not node.children
    assert len(node.edge) == 3000
    gc.collect()
    assert node.edge.base is document.entry.tokens or node.edge is document.entry.tokens


def test_making_room_counts_the_bookkeeping_that_goes_too():
    index = Index(Rules(50_000, "lru", {}), Rules(None, "lru", {}))
    made = []
    for i in range(40):
        record = record_of([i] * 64)
        gone = index.clear_memory(record.nbytes + record.index_nbytes, "")
        assert gone is not None
        assert len(gone) <= 1
        index.add(record, [])
        assert index.memory is not None
        index.memory.add(record)
        made.append(record)
        assert index.memory_nbytes <= 50_000
    assert len(index.records) == 50_000 // (made[0].nbytes + made[0].index_nbytes)


def test_nothing_is_sorted_where_there_is_room():
    class Untouched(set):
        def __iter__(self):
            raise AssertionError

    shelf = Shelf(Rules(100, "slru", {}), lambda r: 1, lambda r, leaving: True)
    shelf.records = Untouched()
    assert shelf.leaving(50, "", 0.0) == []


def test_what_is_known_of_tenants_is_bounded():
    costs = Costs()
    for i in range(2 * MOST):
        costs.computed(str(i), 10, 1.0)
    assert len(costs.per_token) == MOST
    shelf = Shelf(Rules(None, "slru", {}), lambda r: 1, lambda r, leaving: True)
    for i in range(10):
        record = record_of([i])
        shelf.add(record)
        shelf.remove(record)
    assert not shelf.by_tenant


def test_an_interrupt_while_a_request_is_opened_leaves_nothing_open(monkeypatch):
    model, store = Model(Eviction(7)), ReuseStore(shortest=4, back=10)
    model.ask(store, list(range(20)))
    begin = ReuseStore._begin

    def interrupted(self, *args):
        begin(self, *args)
        raise KeyboardInterrupt

    monkeypatch.setattr(ReuseStore, "_begin", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.ask(store, [*range(20), *range(10)])
    assert store.flights.all == []
    assert all(record.users == 0 for record in store.index.records.values())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot be forked here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_writes_on_its_own(tmp_path, monkeypatch):
    model, store = Model(None), ReuseStore("20MB", tmp_path, shortest=4)
    held, write = threading.Event(), Shelving.write

    def slow(self, *args):
        held.wait()
        return write(self, *args)

    monkeypatch.setattr(Shelving, "write", slow)
    model.ask(store, list(range(20)))  # the writer has it in hand when the process forks
    other = ReuseStore(shortest=4)
    model.ask(other, list(range(30, 50)))
    (record,) = other.index.records.values()  # made here, since torch must not compute in a forked process
    child = os.fork()
    if child == 0:
        status = 1
        try:
            held.set()
            with store.lock:
                store.tiers.refresh()
                free = all(each.users == 0 for each in store.index.records.values())
                stored = store.put(Record(record.entry, record.nbytes, record.extent), set())
            store.close()
            status = 0 if free and stored and store.index.records[record.key].path else 2
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    held.set()
    store.close()
    assert os.waitstatus_to_exitcode(status) == 0
    assert ReuseStore(None, tmp_path).stats().disk_records == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot be forked here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_process_is_forked_while_another_thread_is_in_the_store():
    store, inside, until = ReuseStore(), threading.Event(), threading.Event()

    def stay():
        with store.lock:
            inside.set()
            until.wait(0.5)

    thread = threading.Thread(target=stay)
    thread.start()
    inside.wait()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.alarm(5)  # which ends it where it waits
            status = store.stats().requests
        finally:
            os._exit(status)
    until.set()
    thread.join()
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


def test_a_store_that_is_gone_keeps_no_lock():
    gc.collect()
    before = len(forks._locks)
    store = ReuseStore()
    assert len(forks._locks) == before + 1
    del store
    gc.collect()
    assert len(forks._locks) == before
