"""The server: several machines that share it, and what goes wrong with it and between them."""

import json
import pickle
import random
import socket
import threading
import time
import warnings
from contextlib import suppress
from dataclasses import replace

import pytest

fakeredis = pytest.importorskip("fakeredis")

import redis  # noqa: E402
import torch  # noqa: E402
from redis.backoff import NoBackoff  # noqa: E402
from redis.retry import Retry  # noqa: E402

from octavo.config import Eviction  # noqa: E402
from octavo.errors import ConfigError  # noqa: E402
from octavo.reuse import ReuseStore, remote, resp  # noqa: E402
from octavo.reuse.costs import Costs  # noqa: E402
from reuse.plain import Model  # noqa: E402
from reuse.served import Fake, Real, damage, installed, values  # noqa: E402
from reuse.test_disk import SETTINGS, prompt  # noqa: E402
from reuse.test_reuse_generate import GREEDY, gated  # noqa: E402
from tiny import tokens  # noqa: E402

MEASURED = Costs.worth_loading
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def looks_at_once(monkeypatch):
    """Stores look whenever they are asked, and try a server that was away again at once."""
    monkeypatch.setattr(remote, "LOOK", 0.0)
    monkeypatch.setattr(remote, "SHARE", 0)
    monkeypatch.setattr(remote, "PAUSE", 0.0)


@pytest.fixture(params=["fake", "real"])
def server(request, tmp_path):
    if request.param == "fake":
        yield Fake()
        return
    if not installed():
        pytest.skip("no redis-server and no valkey-server is installed")
    real = Real(tmp_path)
    yield real
    real.stop()


def opened(server, memory="20MB", **options):
    return ReuseStore(memory, remote=server.client(), **SETTINGS, **options)


def asked(model, store, *rest, **options):
    """A request whose record is on the server afterwards."""
    got = model.ask(store, *rest, **options)
    store.flush()
    return got


@pytest.mark.parametrize("eviction", [None, Eviction(7), Eviction(25, 1)])
def test_what_one_machine_inserts_another_one_hits(server, eviction):
    model, a, b = Model(eviction), opened(server), opened(server, None)
    assert asked(model, a, prompt(0)) == 0
    assert asked(model, b, prompt(0)) == 69
    asked(model, a, prompt(1))
    longer = [*prompt(1), *prompt(2)]
    assert asked(model, b, longer) == 70
    assert asked(model, a, longer) == 139, "whose last part the other one has stored"
    stats = a.stats()
    assert (stats.remote_records, stats.damaged, stats.errors) == (len(values(server.client())), 0, 0)
    assert stats.remote_nbytes == sum(server.client().strlen(name) for name in values(server.client()))
    assert a.verify() == b.verify() == ()
    a.close()
    b.close()


def test_answers_are_those_that_are_computed(server):
    plain, ids = gated(), tokens(1, 60)
    stores = [ReuseStore("20MB", remote=server.client(), shortest=8) for _ in range(2)]
    for store in stores:
        got = gated(reuse=store).generate(ids, output_logits=True, return_dict_in_generate=True, **GREEDY)
        expected = plain.generate(ids, output_logits=True, return_dict_in_generate=True, **GREEDY)
        assert torch.equal(got.sequences, expected.sequences)
        for one, other in zip(got.logits, expected.logits, strict=True):
            assert torch.allclose(one, other, atol=1e-4)
        store.flush()
    assert (stores[0].stats().reused, stores[1].stats().reused) == (0, 59)


def test_a_restarted_machine_finds_all_and_goes_on(server):
    model = Model(Eviction(7, 1))
    store = opened(server)
    for i in range(3):
        asked(model, store, prompt(i))
    store.close()
    again = opened(server, None)
    assert again.stats().remote_records == 3
    assert [model.ask(again, prompt(i)) for i in range(3)] == [69, 69, 69]
    again.close()


def test_every_flipped_bit_and_every_truncation_is_detected(server, full):
    model, store, client, dice = Model(Eviction(7)), opened(server), server.client(), random.Random(3)
    for i in range(2):
        asked(model, store, prompt(i))
    whole = {name: client.get(name) for name in values(client)}
    for trial in range(200 if full else 15):
        name, data = dice.choice(sorted(whole.items()))
        broken = bytearray(data)
        if trial % 3:
            broken[dice.randrange(12, len(data))] ^= 1 << dice.randrange(8)  # the version before is another test's
        else:
            broken = broken[: dice.randrange(1, len(data))]
        for each, content in whole.items():
            client.set(each, bytes(broken) if each == name else content)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            again = opened(server, None)
            for i in range(2):
                model.ask(again, prompt(i))  # which checks what is served against the tokens
            again.flush()
        assert again.stats().damaged == 1
        assert [name.decode() in str(w.message) for w in told] == [True]
        assert again.stats().errors == 0
        assert client.get(name) != bytes(broken), "it is gone, or was stored anew"
        again.close()


def test_verify_drops_what_is_damaged(server):
    model, store, client = Model(None), opened(server, None), server.client()
    for i in range(2):
        asked(model, store, prompt(i, 90))
    damaged, whole = values(client)
    damage(client, damaged)
    with pytest.warns(RuntimeWarning, match="has dropped"):
        (told,) = store.verify()
    assert damaged.decode() in told
    store.flush()
    assert values(client) == [whole]
    assert store.verify() == ()


def test_a_value_of_another_version_is_left_alone(server):
    model, store, client = Model(None), opened(server), server.client()
    asked(model, store, prompt(0))
    (name,) = values(client)
    data = bytearray(client.get(name))
    data[8] = 9
    client.set(name, bytes(data))
    with pytest.warns(RuntimeWarning, match="is of format 9, and this version"):
        again = opened(server)
    assert asked(model, again, prompt(0)) == 0
    assert client.get(name) == data
    assert again.stats().remote_records == 0


def test_what_the_server_evicts_is_a_miss_and_comes_again(server):
    model, a, b, client = Model(Eviction(7)), opened(server), opened(server, None), server.client()
    asked(model, a, prompt(0))
    longer = [*prompt(0), *prompt(1)]
    asked(model, a, longer)
    assert model.ask(b, longer) == 139
    (first,) = (r for r in b.index.records.values() if r.entry.first == 0)
    client.delete(b.tiers.remote.server.value(first.key))
    late = opened(server, None)
    assert model.ask(late, prompt(3)) == 0
    assert asked(model, b, prompt(0)) == 0, "and computed again"
    assert b.stats().errors == b.stats().damaged == 0
    assert model.ask(b, longer) == model.ask(late, longer) == 139, "what goes on from it is found again"
    assert model.ask(opened(server, None), longer) == 139


def test_a_record_is_written_after_those_before_it_that_the_server_has_evicted(server):
    model, a, client = Model(None), opened(server), server.client()
    asked(model, a, prompt(0))
    client.delete(*values(client))
    longer = [*prompt(0), *prompt(1)]
    assert asked(model, a, longer) == 70, "from memory"
    assert len(values(client)) == 2
    assert model.ask(opened(server, None), longer) == 139


def test_deleting_and_clearing_reach_the_server(server):
    model, a, b, client = Model(Eviction(7)), opened(server), opened(server, None), server.client()
    with a.request(tags=["x"]):
        asked(model, a, prompt(0))
    other = [7, 8, *prompt(1)]
    asked(model, a, other)
    a.pin(prompt(0))
    assert model.ask(b, prompt(0)) == 69
    assert len(client.keys("*:note")) == 1
    assert a.delete(tag="x") == 1
    assert len(values(client)) == 1
    assert client.keys("*:note") == []
    assert b.explain(prompt(0)).boundary == 0
    assert model.ask(b, other) == 71
    a.clear()
    assert values(client) == []
    assert asked(model, b, other) == 0
    b.clear()
    assert a.list() == b.list() == []
    assert values(client) == []


def test_deleting_reaches_what_waits_for_those_before_it(server):
    model, a, client = Model(None), opened(server, None), server.client()
    asked(model, a, prompt(0))
    (first,) = values(client)
    longer = [*prompt(0), *prompt(1)]
    with a.request(tags=["x"]):
        asked(model, a, longer)
    client.delete(first)
    b = opened(server, None)
    assert b.list() == []
    assert b.delete(tag="y") == 0
    assert len(values(client)) == 1
    assert b.delete(tag="x") == 1
    assert values(client) == []
    asked(model, b, prompt(0))
    assert b.explain(longer).boundary == 70


def test_deleting_reaches_what_the_log_has_lost(server):
    model, a, client = Model(None), opened(server, None), server.client()
    for i in range(2):
        asked(model, a, [i, *prompt(i)])
    client.delete(resp.LOG)
    b = opened(server, None)
    assert b.list() == []
    assert b.verify() == ()
    assert b.delete(prefix=[1]) == 1
    assert len(values(client)) == 1
    b.clear()
    assert values(client) == []


def test_clearing_reaches_what_waits_though_the_log_is_lost(server):
    model, a, client = Model(None), opened(server, None), server.client()
    asked(model, a, prompt(0))
    (first,) = values(client)
    asked(model, a, [*prompt(0), *prompt(1)])
    client.delete(first, resp.LOG)
    a.list()
    assert len(values(client)) == 1
    a.clear()
    assert values(client) == []


def test_deleting_while_the_server_is_away_reaches_what_is_not_known():
    now = [1000.0]
    server, model = Fake(), Model(None)
    a = opened(server, clock=lambda: now[0])
    for i in range(3):
        with a.request(tenant=f"{i}"):
            asked(model, a, prompt(i))
    server.server.connected = False
    with pytest.warns(RuntimeWarning, match="cannot use"):
        b = opened(server, clock=lambda: now[0])
    assert b.delete(tenant="1") == 0
    now[0] += 1
    server.server.connected = True
    with a.request(tenant="1"):
        asked(model, a, [5, *prompt(5)])
    b.list()
    b.flush()
    assert {each.tenant: each.tokens for each in b.list()} == {"0": 70, "1": 71, "2": 70}
    assert len(values(server.client())) == 3
    server.server.connected = False
    b.clear()
    server.server.connected = True
    b.list()
    b.flush()
    assert b.list() == []
    assert values(server.client()) == []


def test_clearing_removes_what_has_no_room_here(server):
    model, a = Model(None), opened(server)
    for i in range(6):
        asked(model, a, [i, *prompt(i)])
    small = opened(server, "20KB")
    assert small.stats().remote_records < 6
    assert small.stats().memory_nbytes <= 20_000
    small.clear()
    assert values(server.client()) == []


def test_lifetimes_hold_on_every_machine_and_on_the_server(server):
    now = [1000.0]
    model, client = Model(Eviction(7)), server.client()
    a, b = opened(server, clock=lambda: now[0]), opened(server, None, clock=lambda: now[0])
    with a.request(ttl=100):
        asked(model, a, prompt(0))
    (name,) = values(client)
    assert 90_000 < client.pttl(name) <= 100_000
    assert model.ask(b, prompt(0)) == 69
    now[0] += 101
    assert b.explain(prompt(0)).boundary == 0
    b.flush()
    assert values(client) == []


def test_what_lives_longer_keeps_what_it_goes_on_from(server):
    now = [1000.0]
    model, client = Model(Eviction(7)), server.client()
    a = opened(server, clock=lambda: now[0])
    with a.request(ttl=100):
        asked(model, a, prompt(0))
    longer = [*prompt(0), *prompt(1)]
    asked(model, a, longer)
    assert {client.pttl(name) for name in values(client)} == {-1}
    a.close()
    now[0] += 101
    b = opened(server, None, clock=lambda: now[0])
    assert asked(model, b, longer) == 139
    assert model.ask(opened(server, None, clock=lambda: now[0]), longer) == 139


def test_pins_are_seen_by_other_machines(server):
    now = [1000.0]
    options = {"clock": lambda: now[0]}
    model, client = Model(Eviction(7)), server.client()
    a, b = opened(server, **options), opened(server, None, **options)
    with a.request(ttl=100):
        asked(model, a, prompt(0))
    assert model.ask(b, prompt(0)) == 69
    assert a.pin(prompt(0)) == 70
    assert client.pttl(values(client)[0]) == -1
    now[0] += 101
    assert model.ask(b, prompt(0)) == 69
    assert {each.pinned for each in b.list()} == {float("inf")}
    assert opened(server, None, **options).list()[0].pinned == float("inf")
    assert b.unpin(prompt(0)) == 70
    b.list()  # which lets what has expired go
    b.flush()
    assert values(client) == []


def test_what_is_pinned_stays_in_memory_though_the_server_has_it(server):
    model, a, client = Model(None), opened(server, "60KB", policy="lru"), server.client()
    asked(model, a, prompt(0))
    a.pin(prompt(0))
    for i in range(1, 20):
        asked(model, a, [i, i + 1, *prompt(i)])
    client.flushall()
    assert model.ask(a, prompt(0)) == 69
    assert a.stats().memory_nbytes <= 60_000


def test_memory_holds_its_budget_and_the_server_the_rest(server):
    model, a = Model(Eviction(7)), opened(server, "40KB")
    for i in range(8):
        asked(model, a, [i, *prompt(i)])
        assert a.stats().memory_nbytes <= 40_000
    hits = [asked(model, a, [i, *prompt(i)]) for i in reversed(range(8))]  # the bookkeeping of so many has no room
    assert a.stats().memory_nbytes <= 40_000
    assert hits.count(70) >= 3
    b = opened(server, None)
    assert [model.ask(b, [i, *prompt(i)]) for i in range(8)] == [70] * 8


def test_tenants_stay_apart(server):
    model, a, b = Model(None), opened(server), opened(server)
    with a.request(tenant="alice"):
        asked(model, a, prompt(0))
    assert asked(model, b, prompt(0)) == 0
    with b.request(tenant="bob"):
        assert model.ask(b, prompt(0)) == 0
    with b.request(tenant="alice"):
        assert model.ask(b, prompt(0)) == 69
    b.flush()
    assert a.delete(tenant="alice") == 1
    with opened(server, None).request(tenant="alice"):
        assert model.ask(opened(server, None), prompt(0)) == 69, "of no tenant"


def test_two_machines_write_one_record_at_once(server):
    model, stores = Model(Eviction(7)), [opened(server) for _ in range(2)]
    barrier = threading.Barrier(2)

    def at_once(store):
        barrier.wait()
        for i in range(5):
            model.ask(store, prompt(i), check=False)
        store.flush()

    threads = [threading.Thread(target=at_once, args=(store,)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(store.stats().errors == store.stats().damaged == 0 for store in stores)
    again = opened(server, None)
    assert again.verify() == ()
    assert [model.ask(again, prompt(i)) for i in range(5)] == [69] * 5


def test_the_folder_comes_first_and_each_tier_is_whole(server, tmp_path):
    model, folder = Model(Eviction(7)), tmp_path / "kv"
    a = ReuseStore("20MB", folder, remote=server.client(), **SETTINGS)
    asked(model, a, prompt(0))
    longer = [*prompt(0), *prompt(1)]
    asked(model, a, longer)
    stats = a.stats()
    assert (stats.memory_records, stats.disk_records, stats.remote_records) == (2, 2, 2)
    assert all(each.memory and each.disk and each.remote for each in a.list())
    a.close()
    local = ReuseStore(None, folder, **SETTINGS)
    assert model.ask(local, longer) == 139
    distant = opened(server, None)
    assert model.ask(distant, longer) == 139
    both = ReuseStore(None, folder, remote=server.client(), **SETTINGS)
    both.tiers.remote.read = None
    assert model.ask(both, longer) == 139, "from the folder"
    for path in folder.glob("*.kv"):
        path.unlink()
    again = ReuseStore(None, folder, remote=server.client(), **SETTINGS)
    assert asked(model, again, longer) == 139, "from the server"
    other = prompt(3)
    assert asked(model, again, [*longer, *other]) == 140
    again.close()
    assert model.ask(ReuseStore(None, folder, **SETTINGS), [*longer, *other]) == 209, "with those before it"


def test_a_damaged_file_is_read_from_the_server(server, tmp_path):
    model = Model(None)
    a = ReuseStore("20MB", tmp_path / "kv", remote=server.client(), **SETTINGS)
    asked(model, a, prompt(0))
    a.close()
    again = ReuseStore(None, tmp_path / "kv", remote=server.client(), **SETTINGS)
    (path,) = (tmp_path / "kv").glob("*.kv")
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.warns(RuntimeWarning, match="has dropped a file"):
        assert model.ask(again, prompt(0)) == 69
    assert not path.exists()
    assert again.stats().disk_records == 0


def test_a_server_that_is_away_costs_one_warning_and_is_used_when_it_is_back():
    server, model = Fake(), Model(None)
    server.server.connected = False
    with pytest.warns(RuntimeWarning, match="cannot use the server at"):
        a = opened(server)
    assert asked(model, a, prompt(0)) == 0  # a second warning would be an error
    assert asked(model, a, prompt(0)) == 69, "from memory"
    server.server.connected = True
    assert asked(model, a, prompt(1)) == 40
    b = opened(server, None)
    assert model.ask(b, prompt(1)) == 69, "with what it goes on from"
    server.server.connected = False
    with pytest.warns(RuntimeWarning, match="cannot use the server at"):
        assert model.ask(b, prompt(1)) == 0
    assert model.ask(b, prompt(1)) == 0
    assert a.delete(prefix=prompt(1)) == 1
    server.server.connected = True
    assert a.stats().errors > 0
    a.flush()
    b.list()
    assert prompt(1) not in [r.entry.tokens.tolist() for r in b.index.records.values()], "deleted when it was back"
    assert model.ask(b, prompt(0)) == 69


def test_what_was_asked_for_while_the_server_was_away_is_done_when_it_is_back():
    server, model = Fake(), Model(None)
    a, b = opened(server), opened(server, None)
    for i in range(3):
        asked(model, a, [i, *prompt(i)])
    b.stats()
    server.server.connected = False
    with pytest.warns(RuntimeWarning, match="cannot use"):
        a.stats()
    a.pin([0, *prompt(0)])
    a.delete(prefix=[1])
    server.server.connected = True
    a.stats()
    a.flush()
    assert len(values(server.client())) == 2
    found = {each.pinned for each in b.list()}
    assert found == {float("inf"), float("-inf")}
    server.server.connected = False
    a.stats()
    a.unpin([0, *prompt(0)])
    server.server.connected = True
    a.stats()
    a.flush()
    assert {each.pinned > 0 for each in b.list()} == {each.pinned > 0 for each in a.list()} == {False}
    b.clear()
    a.clear()


def test_what_was_deleted_while_the_server_was_away_does_not_come_back():
    server, model = Fake(), Model(None)
    asked(model, opened(server), prompt(0))
    b = opened(server)
    server.server.connected = False
    with pytest.warns(RuntimeWarning, match="cannot use"):
        b.list()
    remote = b.tiers.remote
    remote._until, remote.store.index.away = 0.0, False  # it seems to be back, and fails when a value is read
    remote.refresh = lambda patient=False: None
    assert asked(model, b, prompt(0)) == 0
    assert b.stats().memory_records == 1
    assert b.delete(prefix=prompt(0)) == 1
    del remote.refresh
    server.server.connected = True
    assert b.list() == []
    b.flush()
    assert values(server.client()) == []


def test_what_expires_while_the_server_is_away_is_cut_when_it_is_back():
    now = [1000.0]
    server, model = Fake(), Model(Eviction(7))
    a = opened(server, None, clock=lambda: now[0])
    with a.request(ttl=100):
        asked(model, a, prompt(0))
    longer = [*prompt(0), *prompt(1)]
    asked(model, a, longer)
    server.server.connected = False
    now[0] += 101
    with pytest.warns(RuntimeWarning, match="cannot use"):
        a.stats()
    assert a.stats().remote_records == 0
    server.server.connected = True
    a.list()
    a.flush()
    assert len(values(server.client())) == 2
    assert model.ask(a, longer) == model.ask(opened(server, None, clock=lambda: now[0]), longer) == 139


def test_a_read_that_fails_is_tried_again_when_the_server_is_back(monkeypatch):
    server, model = Fake(), Model(None)
    asked(model, opened(server), prompt(0))
    b = opened(server, None)
    b.stats()
    read, failures = b.tiers.remote.server.read, [OSError("reset by peer")]
    monkeypatch.setattr(
        b.tiers.remote.server, "read", lambda *args: read(*args) if not failures else fails(failures.pop())
    )
    with pytest.warns(RuntimeWarning, match="reset by peer"):
        assert model.ask(b, prompt(0)) == 69, "the whole log is read again, since what failed was dropped"
    assert b.stats().errors == 1


def fails(error):
    raise error


def test_what_is_deleted_while_it_is_written_is_removed():
    server, model = Fake(), Model(None)
    a = opened(server)
    write = a.tiers.remote.server.write

    def slow(*args):
        write(*args)
        with a.lock:
            for record in list(a.index.records.values()):
                a.forget(record)

    a.tiers.remote.server.write = slow
    asked(model, a, prompt(0))
    a.flush()
    assert values(server.client()) == []
    assert a.list() == []


def test_a_record_that_another_machine_has_stored_anew_is_looked_at_again(server):
    model, b, client = Model(Eviction(7)), opened(server, None), server.client()
    asked(model, opened(server), prompt(0))
    b.stats()
    (known,) = b.index.records.values()
    size, b.tiers.remote.server.changes = known.remote_nbytes, lambda used: (False, [])  # it hears of nothing more
    known.entry = replace(known.entry, sizes={**known.entry.sizes, "kept": 1})  # as if rounded otherwise
    assert model.ask(b, prompt(0)) == 69
    (record,) = b.index.records.values()
    assert record.entry.sizes["kept"] > 1
    client.append(values(client)[0], b"longer")
    assert client.strlen(values(client)[0]) > size
    with pytest.warns(RuntimeWarning, match="has dropped"):
        assert model.ask(b, prompt(0)) == 0
    assert b.stats().damaged == 1


def test_what_changes_while_it_is_read_is_not_damaged(monkeypatch):
    server, model = Fake(), Model(Eviction(7))
    asked(model, opened(server), prompt(0))
    client = server.client()
    (name,) = values(client)
    whole = client.get(name)
    for method in ("look", "read"):
        b = opened(server, None) if method == "read" else None
        original = getattr(resp.Server, method)
        calls = []

        def torn(self, *args, original=original, calls=calls):
            calls.append(args)
            client.set(name, whole[:50] + b"?" + whole[51:] if len(calls) == 1 else whole)
            return original(self, *args)

        monkeypatch.setattr(resp.Server, method, torn)
        assert model.ask(b or opened(server, None), prompt(0)) == 69
        assert len(calls) >= 2
        monkeypatch.undo()


def test_while_the_server_is_away_memory_serves_what_it_had_there():
    server, model = Fake(), Model(None)
    asked(model, opened(server), prompt(0))
    b = opened(server)
    server.server.connected = False
    with pytest.warns(RuntimeWarning, match="cannot use"):
        assert model.ask(b, prompt(0)) == 0
    assert model.ask(b, prompt(0)) == 69
    assert b.stats().memory_records == 1


def test_a_server_that_was_emptied_is_known_to_be(server):
    model, a, client = Model(None), opened(server, None), server.client()
    asked(model, a, prompt(0))
    client.flushall()
    assert a.stats().remote_records == 0
    asked(model, a, prompt(0))
    assert model.ask(opened(server, None), prompt(0)) == 69


def test_what_the_log_has_lost_is_looked_at_again(server, monkeypatch):
    model, a, b, client = Model(None), opened(server, None), opened(server, None), server.client()
    asked(model, a, prompt(0))
    b.stats()
    asked(model, a, prompt(1))
    client.xtrim(resp.LOG, maxlen=1, approximate=False)
    asked(model, a, prompt(2))
    client.xtrim(resp.LOG, maxlen=1, approximate=False)
    assert model.ask(b, prompt(2)) == 69
    assert model.ask(b, prompt(0)) == 69
    client.delete(resp.LOG)
    assert b.stats().remote_records >= 2
    asked(model, a, prompt(3))
    assert model.ask(b, prompt(3)) == 69


def test_what_the_log_has_lost_is_told_again_by_who_computes_it(server):
    model, a, client = Model(None), opened(server), server.client()
    longer = [*prompt(0), *prompt(1)]
    asked(model, a, prompt(0))
    asked(model, a, longer)
    client.delete(resp.LOG)
    assert asked(model, opened(server), longer) == 0, "it cannot know of them"
    assert client.xlen(resp.LOG) == 1, "of what holds all of it"
    client.delete(resp.LOG)
    assert asked(model, opened(server), prompt(0)) == 0
    assert asked(model, opened(server), longer) == 70
    told = client.xlen(resp.LOG)
    assert asked(model, opened(server), longer) == 139
    assert client.xlen(resp.LOG) == told, "but once"


def test_while_a_server_is_away_nothing_grows():
    now = [1000.0]
    server, model = Fake(), Model(None)
    a, client = opened(server), server.client()
    for i in range(4):
        asked(model, a, prompt(i))
    client.delete(a.tiers.remote.server.value(next(r.key for r in a.index.records.values() if r.entry.first == 0)))
    b = opened(server, ttl=5, clock=lambda: now[0])
    assert len(b.index.waiting) == 3
    server.server.connected = False
    with pytest.warns(RuntimeWarning, match="cannot use"):
        b.stats()
    for i in range(20):
        model.ask(b, [i, *prompt(i)])
        now[0] += 10
    assert len(b.index.ready) <= 3
    assert len(b.tiers.remote._removed) <= 1
    assert len(b.list()) == 0


def test_clearing_reaches_what_a_clock_that_is_ahead_has_stamped(server):
    model, a = Model(None), opened(server, clock=lambda: 5000.0)
    for i in range(6):
        asked(model, a, [i, *prompt(i)])
    behind = opened(server, "20KB", clock=lambda: 1000.0)
    assert behind.stats().remote_records < 6
    behind.clear()
    assert values(server.client()) == []


def test_a_full_server_is_read_and_costs_one_warning(monkeypatch):
    server, model = Fake(), Model(None)
    asked(model, opened(server), prompt(0))
    b = opened(server)

    def full(*args, **options):
        raise redis.exceptions.OutOfMemoryError("command not allowed when used memory > 'maxmemory'.")

    writer = type("Full", (), {"pipeline": full})
    monkeypatch.setattr(b.tiers.remote.server, "_writer", writer)
    with pytest.warns(RuntimeWarning, match="cannot write to the server at .* used memory"):
        assert asked(model, b, prompt(1)) == 40
    assert asked(model, b, prompt(2)) == 40
    assert asked(model, b, prompt(1)) == 69
    monkeypatch.undo()
    assert asked(model, b, prompt(3)) == 40
    assert len(values(server.client())) == 2


def test_a_real_server_evicts_and_refuses_when_it_is_full(tmp_path):
    if not installed():
        pytest.skip("no redis-server and no valkey-server is installed")
    for policy in ("allkeys-lru", "noeviction"):
        real = Real(tmp_path, "--maxmemory", "1300kb", "--maxmemory-policy", policy)
        try:
            model, a, b = Model(Eviction(7)), opened(real, None), opened(real, None)
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                for i in range(70):
                    asked(model, a, [i, *prompt(i)], check=False)
                for i in range(69, 0, -7):
                    model.ask(b, [i, *prompt(i)])
            full = ["cannot write" in str(w.message) for w in told]
            assert full == ([True, True] if policy == "noeviction" else []), "once each"
            assert (real.client().info()["evicted_keys"] > 0) == (policy == "allkeys-lru")
            assert b.stats().hits > 0
            assert b.stats().damaged == 0
            assert (b.stats().errors > 0) == (policy == "noeviction")
        finally:
            real.stop()


def test_a_server_that_refuses_the_password_costs_a_warning(tmp_path):
    if not installed():
        pytest.skip("no redis-server and no valkey-server is installed")
    real = Real(tmp_path)
    real.client().config_set("requirepass", "right")
    try:
        for url in (real.url, real.url.replace("redis://", "redis://:wrong@")):
            with pytest.warns(RuntimeWarning, match=f"the server at 127.0.0.1:{real.port}: .*") as told:
                store = ReuseStore(remote=url, **SETTINGS)
            assert ":wrong@" not in str(told[0].message)
            assert Model(None).ask(store, prompt(0)) == 0
    finally:
        real.stop()


def test_a_server_that_does_not_answer_costs_about_a_second_once(monkeypatch):
    monkeypatch.setattr(remote, "PAUSE", 30.0)
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(1)  # it takes the connection and never answers
        began = time.perf_counter()
        with pytest.warns(RuntimeWarning, match="cannot use the server"):
            store = ReuseStore(remote=f"redis://127.0.0.1:{deaf.getsockname()[1]}", **SETTINGS)
        assert time.perf_counter() - began < 3
        model, began = Model(None), time.perf_counter()
        assert [asked(model, store, prompt(0)) for _ in range(2)] == [0, 69]
        assert time.perf_counter() - began < 1


def test_looks_are_few(monkeypatch):
    server, model, looks = Fake(), Model(None), []
    monkeypatch.setattr(remote, "LOOK", 30.0)
    store = opened(server)
    changes = store.tiers.remote.server.changes
    monkeypatch.setattr(store.tiers.remote.server, "changes", lambda *args: looks.append(args) or changes(*args))
    for _ in range(5):
        asked(model, store, prompt(0))
    assert looks == []
    store.tiers.remote._next = 0.0
    asked(model, store, prompt(0))
    assert len(looks) == 1
    monkeypatch.setattr(store.tiers.remote.server, "look", None)
    store.list()  # where nothing is new, one round trip is all
    assert len(looks) == 2
    (used,) = looks[0]
    assert len(used) == 1, "what memory has served is not what the server should evict first"


def test_many_heads_and_long_ones_are_taken_in_bit_by_bit(server, monkeypatch):
    monkeypatch.setattr(resp, "HEAD", 200)
    monkeypatch.setattr(resp, "PIECE", 1000)
    monkeypatch.setattr(remote, "BATCH", 3)
    monkeypatch.setattr(remote, "START", 0.0)
    monkeypatch.setattr(remote, "LATER", 0.0)
    model, a = Model(None), opened(server)
    prompts = [prompt(0) * i for i in range(1, 12)]
    for each in prompts:
        asked(model, a, each)
    b = opened(server, None)
    assert 0 < b.stats().remote_records < 11
    for _ in range(5):
        b.stats()
    assert b.stats().remote_records == 11
    assert model.ask(b, prompts[-1]) == len(prompts[-1]) - 1


def test_a_server_that_is_slower_than_the_model_is_passed_over(server, tmp_path):
    model, a = Model(None), opened(server)
    asked(model, a, prompt(0))
    again = ReuseStore(None, tmp_path / "kv", remote=server.client(), **SETTINGS)
    assert asked(model, again, prompt(1)) == 40
    space = again.list()[0].space
    again.costs.per_byte, again.costs.per_token = {"remote": 1.0, "disk": 1e-12}, {space: 1e-6}
    again.costs.computed = again.costs.loaded = lambda *args: None
    again.costs.worth_loading = lambda *args: MEASURED(again.costs, *args)
    assert asked(model, again, prompt(1)) == 69, "from the folder alone"
    longer = [*prompt(0), *prompt(5)]
    asked(model, a, longer)
    assert model.ask(again, longer) == 70, "what the folder has of it"
    assert model.ask(opened(server, None), longer) == 139
    assert again.stats().passed_over >= 1


def test_values_that_no_server_takes_are_not_written(monkeypatch):
    server, model = Fake(), Model(None)
    monkeypatch.setattr(remote, "LARGEST", 1000)
    a = opened(server)
    with pytest.warns(RuntimeWarning, match="bytes are more than the server at"):
        asked(model, a, prompt(0))
    assert values(server.client()) == []
    assert (a.stats().refused, asked(model, a, prompt(0))) == (1, 69)


def test_what_reading_takes_too_long_for_is_given_up(monkeypatch):
    server, model = Fake(), Model(None)
    asked(model, opened(server), prompt(0))
    b = opened(server, None)
    monkeypatch.setattr(b.tiers.remote.server, "read", lambda *args: fails(TimeoutError("it took more than 10 s")))
    monkeypatch.setattr(remote, "PAUSE", 30.0)
    with pytest.warns(RuntimeWarning, match="took more than"):
        assert model.ask(b, prompt(0)) == 0
    assert b.costs.per_byte["remote"] > 0


@pytest.mark.parametrize("own", [False, True])
def test_a_server_that_answers_byte_by_byte_is_given_up(own, monkeypatch):
    monkeypatch.setattr(resp, "READ", 0.3)
    monkeypatch.setattr(remote, "PAUSE", 30.0)
    with socket.socket() as slow:
        slow.bind(("127.0.0.1", 0))
        slow.listen(16)
        threading.Thread(target=dribble, args=(slow,), daemon=True).start()
        url = f"redis://127.0.0.1:{slow.getsockname()[1]}"
        client = redis.Redis.from_url(url, socket_timeout=None, retry=Retry(NoBackoff(), 1)) if own else url
        began = time.perf_counter()
        with pytest.warns(RuntimeWarning, match="cannot use the server at .*: it took more than"):
            ReuseStore(remote=client, **SETTINGS)
        assert time.perf_counter() - began < 5


def test_what_is_written_while_python_ends_is_not_lost(monkeypatch):
    server, model = Fake(), Model(None)
    a = opened(server)
    start = threading.Thread.start

    def late(self):
        if self.daemon:
            raise RuntimeError("can't create new thread at interpreter shutdown")
        start(self)

    monkeypatch.setattr(threading.Thread, "start", late)
    asked(model, a, prompt(0))
    assert len(values(server.client())) == 1


def dribble(listening):
    """Answer each connection with a line that never ends."""
    with suppress(OSError):
        while True:
            connection, _ = listening.accept()
            threading.Thread(target=trickle, args=(connection,), daemon=True).start()


def trickle(connection):
    with suppress(OSError), connection:
        connection.sendall(b"+")
        while True:
            connection.sendall(b"x")
            time.sleep(0.02)


def test_heads_are_read_in_smaller_batches_from_a_slow_server(monkeypatch):
    server, model = Fake(), Model(None)
    a = opened(server)
    for i in range(30):
        asked(model, a, [i, *prompt(i)])
    looked, look = [], resp.Server.look
    monkeypatch.setattr(
        resp.Server, "look", lambda self, keys, known: looked.append(len(keys)) or look(self, keys, known)
    )
    assert opened(server, None).stats().remote_records == 30
    assert looked == [4, 8, 16, 2]
    looked.clear()
    monkeypatch.setattr(remote, "AIM", 0.0)
    monkeypatch.setattr(remote, "START", 0.0)
    monkeypatch.setattr(remote, "LATER", 0.0)
    b = opened(server, None)
    b.stats()
    assert looked == [4, 2]
    assert len(b.list()) == 30


def test_an_interrupted_look_is_taken_up_again(monkeypatch):
    server, model = Fake(), Model(None)
    asked(model, opened(server), prompt(0))
    b = opened(server, None)
    asked(model, opened(server), prompt(1))
    monkeypatch.setattr(b.tiers.remote, "_adopt", lambda record: fails(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        b.stats()
    monkeypatch.undo()
    assert model.ask(b, prompt(1)) == 69


@pytest.mark.parametrize(
    ("field", "wrong"),
    [("sizes", {"kept": -5}), ("sizes", {"kept": "5"}), ("sizes", {"kept": 3}), ("tenant", [1]), ("space", 7),
     ("created", 1e400), ("layout", {"head_dim": 2**62}), ("layout", {"layers": -1})],
)  # fmt: skip
def test_whole_values_that_say_nonsense_are_damaged(field, wrong, monkeypatch):
    server, model = Fake(), Model(None)
    writer, dumps = opened(server), json.dumps

    def changed(named, **options):
        if "sizes" in named:
            old = named[field]
            named = {**named, field: {**old, **wrong} if isinstance(old, dict) else wrong}
        return dumps(named, **options)

    monkeypatch.setattr("octavo.reuse.files.json.dumps", changed)
    asked(model, writer, prompt(0), check=False)
    monkeypatch.undo()
    with pytest.warns(RuntimeWarning, match="contradicts itself"):
        b = opened(server, None)
    assert model.ask(b, prompt(0)) == 0
    assert b.stats().damaged == 1


def test_strangers_on_the_server_are_left_alone(server):
    client = server.client()
    client.set("theirs", "x")
    client.xadd(resp.LOG, {"k": "not a key"})
    client.xadd(resp.LOG, {"other": "field"})
    client.xadd(resp.LOG, {"k": "0" * 32})
    model, a = Model(None), opened(server)
    asked(model, a, prompt(0))
    a.clear()
    assert client.get("theirs") == b"x"


def test_what_cannot_be_a_server_is_refused(monkeypatch):
    for wrong, match in (("localhost", "must be a URL"), ("redis://h:port", "must be a URL"), (7, "must be a URL"),
                         (fakeredis.FakeRedis(decode_responses=True), "decode_responses")):  # fmt: skip
        with pytest.raises(ConfigError, match=match):
            ReuseStore(remote=wrong)
    monkeypatch.setitem(__import__("sys").modules, "redis", None)
    with pytest.raises(ConfigError, match=r"pip install 'octavo\[redis\]'"):
        ReuseStore(remote="redis://localhost")


def test_a_store_with_a_url_is_pickled():
    with pytest.warns(RuntimeWarning, match="cannot use the server"):
        store = pickle.loads(pickle.dumps(ReuseStore("1MB", remote="redis://:secret@127.0.0.1:1/3", **SETTINGS)))
    options = store.tiers.remote.server._reader.connection_pool.connection_kwargs
    assert (options["port"], options["db"], options["password"]) == (1, 3, "secret")
    with pytest.raises(ConfigError, match="give remote as a URL"):
        pickle.dumps(opened(Fake()))
