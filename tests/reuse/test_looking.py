"""What is asked, stored and deleted while a look at a server is under way, which takes many requests."""

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
def looks_at_little(monkeypatch):
    """Each request looks at one record."""
    for name, value in {"LOOK": 0.0, "SHARE": 0, "PAUSE": 0.0, "LATER": -1.0, "START": -1.0, "BATCH": 1}.items():
        monkeypatch.setattr(remote, name, value)


@pytest.mark.parametrize("memory", ["20MB", None])
@pytest.mark.parametrize("eviction", [None, Eviction(7, 1)])
def test_what_is_computed_once_more_after_it_was_deleted_stays(memory, eviction):
    server, model = Fake(), Model(eviction)
    a = opened(server)
    for i in range(6):
        asked(model, a, [i, *prompt(i)])
    server.server.connected = False
    b = opened(server, memory)
    b.delete(prefix=[1])
    server.server.connected = True
    for _ in range(2):
        b.peek(model.cache(), model.identity, prompt(9))
    assert len(b.index.records) == 2, "the second of which is to be deleted"
    assert model.ask(b, [1, *prompt(1)]) == 0
    assert b.tiers.remote.looking
    b.list()
    b.flush()
    assert model.ask(b, [1, *prompt(1)]) == 70
    other = opened(server, None)
    other.list()
    assert model.ask(other, [1, *prompt(1)]) == 70
    assert len(values(server.client())) == 6


@pytest.mark.parametrize("memory", ["20MB", None])
def test_what_is_computed_once_more_after_it_has_expired_stays(memory):
    server, model, now = Fake(), Model(None), [1000.0]
    a = opened(server, clock=lambda: now[0])
    for i in range(6):
        asked(model, a, [i, *prompt(i)])
    b = opened(server, memory, clock=lambda: now[0])
    b.list()
    with b.request(ttl=50):
        asked(model, b, [9, *prompt(9)])
        now[0] += 100
        b.tiers.remote.server.start_over()
        assert model.ask(b, [9, *prompt(9)]) == 0
        assert b.tiers.remote.looking
        inserted = b.stats().inserted
    b.list()
    b.flush()
    assert inserted == 2
    assert model.ask(b, [9, *prompt(9)]) == 70
    other = opened(server, None, clock=lambda: now[0])
    other.list()
    assert model.ask(other, [9, *prompt(9)]) == 70
    now[0] += 60
    assert model.ask(b, [9, *prompt(9)]) == model.ask(other, [9, *prompt(9)]) == 0


def test_a_server_that_refuses_to_remove_is_asked_once_for_many(monkeypatch):
    server, model = Fake(), Model(None)
    a = opened(server)
    for i in range(30):
        asked(model, a, [i, *prompt(i)])
    calls = []

    def refuses(keys):
        calls.append(len(keys))
        raise resp.RefusedError("no permission")

    monkeypatch.setattr(a.tiers.remote.server, "remove", refuses)
    a.clear()
    assert len(calls) < 10, calls
    assert len(a.tiers.remote._removed) == 30
