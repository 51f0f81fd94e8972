"""What a store knows of a server is bounded: what was used longest ago is forgotten, and the server keeps it."""

from dataclasses import replace

import pytest

pytest.importorskip("fakeredis")

from octavo.config import Eviction
from octavo.reuse import index, remote, resp
from octavo.reuse.record import Record
from reuse.plain import Model
from reuse.served import Fake, values
from reuse.test_disk import prompt
from reuse.test_remote import asked, opened

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def looks_at_once(monkeypatch):
    """Stores look whenever they are asked."""
    monkeypatch.setattr(remote, "LOOK", 0.0)
    monkeypatch.setattr(remote, "SHARE", 0)


def told(i):
    """One of many prompts that begin otherwise."""
    return [i % 50, i // 50, *prompt(i)]


@pytest.mark.parametrize("memory", ["100KB", None])
def test_a_store_goes_on_storing_however_much_it_has_put_on_the_server(memory, monkeypatch):
    monkeypatch.setattr(index, "BOOKS", 50_000)
    server, model = Fake(), Model(Eviction(7))
    a = opened(server, memory)
    for i in range(60):
        asked(model, a, told(i))
        assert model.ask(a, told(i)) == 71, "it was not refused"
        assert a.stats().memory_nbytes <= (100_000 if memory else 50_000)
    stats = a.stats()
    assert (stats.inserted, stats.refused) == (60, 0)
    assert stats.evicted >= 49, "each takes more than 4 KB"
    assert a.index.waiting == {}
    assert len(values(server.client())) == 60, "which has all of them"
    assert model.ask(a, told(0)) == 0, "what was used longest ago is forgotten"
    a.flush()
    assert model.ask(a, told(0)) == 71, "until it is computed again"


@pytest.mark.parametrize("memory", ["100KB", None])
def test_what_others_store_is_learned_of_however_much_is_known(memory, monkeypatch):
    monkeypatch.setattr(index, "BOOKS", 50_000)
    server, model = Fake(), Model(None)
    a, b = opened(server), opened(server, memory)
    for i in range(30):
        asked(model, a, told(i))
        assert b.explain(told(i)).boundary == 71
        assert b.explain(told(0)).boundary == 71 * (i < 11), "that of an early one goes"
        assert b.index.index_nbytes <= 50_000
    late = opened(server, memory)
    assert late.explain(told(29)).boundary == 71
    assert 9 <= late.stats().remote_records <= 11
    late.clear()
    assert values(server.client()) == [], "what is not known too"


def test_what_others_go_on_from_is_used_or_is_pinned_is_not_forgotten(monkeypatch):
    server, model = Fake(), Model(None)
    a = opened(server, None)
    longer = [*told(0), *prompt(30)]
    asked(model, a, told(0))
    asked(model, a, longer)
    asked(model, a, told(1))
    a.pin(told(1))
    asked(model, a, told(2))
    monkeypatch.setattr(a.index, "most", a.index.index_nbytes + 9_000)
    for i in range(3, 40):
        asked(model, a, told(i))
        assert model.ask(a, longer) == 141
    assert a.explain(told(0)).boundary == a.explain(told(1)).boundary == 71
    assert a.explain(told(2)).boundary == 0
    assert a.stats().remote_records < 8
    parents = {parent for record in a.index.records.values() for parent in record.parents}
    assert all(parent.key in a.index.records for parent in parents)


def test_a_file_that_had_no_room_here_is_used_once_the_server_tells_of_its_record(tmp_path, monkeypatch):
    server, model = Fake(), Model(None)
    a = opened(server, disk=tmp_path)
    for i in range(6):
        asked(model, a, told(i))
    a.close()
    b = opened(server, "40KB", disk=tmp_path)
    late = [r.key for r in a.index.records.values() if r.key not in b.index.records]
    assert late, "some have no room"
    monkeypatch.setattr(b.index, "most", 30_000)  # others have left
    monkeypatch.setattr(b.tiers.folder.folder, "changed", lambda: False)
    server.client().xadd(resp.LOG, {"k": late[0]})
    b.stats()
    record = b.index.records[late[0]]
    assert record in b.index.disk.records
    tokens = record.entry.tokens.tolist()
    monkeypatch.setattr(resp.Server, "read", None)
    assert model.ask(b, tokens) == len(tokens) - 1, "from the file"
    assert b.stats().disk_nbytes == sum(r.file_nbytes for r in b.index.records.values())


def test_what_a_record_goes_on_from_is_not_dropped_while_room_is_made_for_it():
    store, model = opened(Fake(), "10MB"), Model(None)
    asked(model, store, prompt(0, 100))
    (whole,) = store.index.records.values()
    store.clear()

    def placed(first, last, parents, extent=None):
        entry = replace(whole.entry, tokens=whole.entry.tokens[:last], first=first, last=last)
        record = Record(entry, whole.nbytes, extent, remote_nbytes=0 if extent else whole.nbytes)
        store.index.add(record, parents)
        (store.index.memory if extent else store.index.remote).add(record)
        return record

    begins = placed(0, 40, [], whole.extent)  # in memory alone; what goes on from it is on the server alone
    goes_on = placed(40, 80, [begins])
    other = placed(0, 60, [])  # what comes now goes on from this one instead
    store.index.memory.rules = replace(store.index.memory.rules, budget=store.index.memory_nbytes + 100)
    entry = replace(whole.entry, first=80)
    assert store.tiers.adopt(Record(entry, whole.nbytes, remote_nbytes=whole.nbytes)) is None, "it has no room"
    assert [record.gone for record in (begins, goes_on, other)] == [False] * 3
