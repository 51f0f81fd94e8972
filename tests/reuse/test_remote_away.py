"""A server that goes away and comes back: what was stored, deleted and pinned meanwhile, here and elsewhere."""

import pytest

pytest.importorskip("fakeredis")

from octavo.config import Eviction
from octavo.reuse import remote, resp
from reuse.plain import Model
from reuse.served import Fake, values
from reuse.test_disk import prompt
from reuse.test_remote import asked, opened

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:the reuse cache cannot")]


@pytest.fixture(autouse=True)
def looks_at_once(monkeypatch):
    """Stores look whenever they are asked, and try a server that was away again at once."""
    monkeypatch.setattr(remote, "LOOK", 0.0)
    monkeypatch.setattr(remote, "SHARE", 0)
    monkeypatch.setattr(remote, "PAUSE", 0.0)


def plug(server, store, there):
    """Take the server away or bring it back, and have a store notice."""
    server.server.connected = there
    store.list()
    store.flush()


@pytest.mark.parametrize("eviction", [None, Eviction(7)])
@pytest.mark.parametrize("tier", ["memory", "disk", "server"])
def test_what_is_cut_while_the_server_is_away_is_written_when_it_is_back(eviction, tier, tmp_path):
    server, model = Fake(), Model(eviction)
    a = opened(server, "20MB" if tier == "memory" else None, disk=tmp_path if tier == "disk" else None)
    asked(model, a, prompt(0))
    asked(model, a, prompt(1))
    plug(server, a, False)
    a.delete(prefix=prompt(0))
    plug(server, a, True)
    client = server.client()
    assert {r.key.encode() for r in a.index.remote.records} == {name[-32:] for name in values(client)}
    assert len(values(client)) == 2, "what was cut, and what goes on from it"
    a.close()
    again = opened(server, None)
    assert again.explain(prompt(0)).matched == 40, "it is deleted"
    assert model.ask(again, prompt(1)) == 69, "which was not deleted"


def test_what_is_cut_while_the_server_is_full_is_written_when_it_has_room(monkeypatch):
    server, model = Fake(), Model(None)
    a = opened(server)
    asked(model, a, prompt(0))
    asked(model, a, prompt(1))
    write = a.tiers.remote.server.write
    a.tiers.remote.server.write = lambda *args: refused()
    assert a.delete(prefix=prompt(0)) == 1
    assert len(values(server.client())) == 1
    a.tiers.remote.server.write = write
    a.list()
    a.flush()
    assert model.ask(opened(server, None), prompt(1)) == 69


def refused():
    from octavo.reuse.resp import RefusedError

    raise RefusedError("out of memory")


def test_what_is_pinned_while_the_server_is_away_stays_here_and_others_do_not_know_it():
    server, model = Fake(), Model(None)
    a, b = opened(server, "60KB", policy="lru"), opened(server, None)
    plug(server, a, False)
    asked(model, a, prompt(0))
    assert a.pin(prompt(0)) == 70
    assert model.ask(b, prompt(0)) == 0, "nobody but this machine has it"
    for i in range(1, 20):
        asked(model, a, [i, i + 1, *prompt(i)])
    assert model.ask(a, prompt(0)) == 69
    plug(server, a, True)
    assert model.ask(a, prompt(0)) == 69
    asked(model, a, [*prompt(0), *prompt(1)])
    assert model.ask(b, prompt(0)) == 69, "written with what goes on from it"


def test_what_goes_on_from_what_only_the_server_knew_stays_when_that_is_deleted():
    server, model = Fake(), Model(Eviction(7, 1))
    a = opened(server)
    for i in range(3):
        asked(model, a, prompt(i))
    server.client().delete(resp.LOG)
    b = opened(server, None)
    assert b.list() == []
    assert b.delete(prefix=prompt(0)) == 1
    assert model.ask(b, prompt(1)) == 69
    b.flush()
    assert {r.key.encode() for r in b.index.remote.records} == {name[-32:] for name in values(server.client())}
    assert b.explain(prompt(0)).matched == 40, "of what was deleted only what the others go on from"


def test_what_is_to_be_deleted_is_given_to_nobody_while_the_server_is_still_looked_at(monkeypatch):
    server, model = Fake(), Model(None)
    a = opened(server)
    for i in range(12):
        asked(model, a, [i, *prompt(i)])
    monkeypatch.setattr(remote, "LATER", -1.0)  # a look ends after one batch
    monkeypatch.setattr(remote, "BATCH", 2)
    server.server.connected = False
    b = opened(server, None)
    assert b.delete(prefix=[1]) == 0, "it does not know of it"
    server.server.connected = True
    looking = []
    for _ in range(20):
        assert b.peek(model.cache(), model.identity, [1, *prompt(1)]) == 0
        looking.append(b.tiers.remote.looking)
    assert looking.count(True) >= 3
    assert not looking[-1]
    assert [b.explain([i, *prompt(i)]).boundary for i in range(12)] == [70 * (i != 1) for i in range(12)]
    b.flush()
    assert len(values(server.client())) == 11


def test_a_pin_of_what_the_server_has_evicted_is_a_miss():
    server, model = Fake(), Model(None)
    a = opened(server, None)
    asked(model, a, prompt(0))
    a.list()
    server.client().delete(*values(server.client()))
    assert a.pin(prompt(0)) == 70, "a server evicts without a word"
    assert asked(model, a, prompt(0)) == 0
    assert model.ask(a, prompt(0)) == 69
    assert a.stats().errors == a.stats().damaged == 0
