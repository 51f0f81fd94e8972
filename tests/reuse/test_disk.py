"""The folder: killed writers, flipped bits, several processes, full and read-only disks, files of other versions."""

import errno
import functools
import os
import random
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch

from octavo.config import Eviction
from octavo.errors import ConfigError, InputError, OutputFileError
from octavo.reuse import ReuseStore
from octavo.reuse.costs import Costs
from octavo.reuse.files import HEAD
from reuse.plain import Model

MEASURED = Costs.worth_loading
TESTS = Path(__file__).parent.parent
SETTINGS = {"shortest": 4, "back": 10}
STEM = [random.Random(0).randrange(50) for _ in range(90)]


pytestmark = pytest.mark.usefixtures("one_thread")


def opened(folder, memory="20MB", **options):
    return ReuseStore(memory, folder, **SETTINGS, **options)


def prompt(i, n=70):
    dice = random.Random(i)
    return STEM[:40] + [dice.randrange(50) for _ in range(n - 40)]


@pytest.mark.parametrize("eviction", [None, Eviction(7), Eviction(25, 1)])
def test_every_flipped_bit_and_every_truncation_is_detected(eviction, tmp_path, full):
    model, store, dice = Model(eviction), opened(tmp_path), random.Random(3)
    for i in range(3):
        model.ask(store, prompt(i))
    store.close()
    whole = {path: path.read_bytes() for path in tmp_path.glob("*.kv")}
    assert len(whole) == 3
    trials = 667 if full else 25
    for trial in range(trials):
        path, data = dice.choice(sorted(whole.items()))
        broken = bytearray(data)
        if trial % 3:
            broken[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
        else:
            broken = broken[: dice.randrange(len(data))]
        for each, content in whole.items():
            each.write_bytes(broken if each == path else content)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            again = opened(tmp_path, None)
            for i in range(3):
                model.ask(again, prompt(i))  # which checks what is served against the tokens
            again.verify()
        damaged = again.stats().damaged
        of_another_version = any("of format" in str(w.message) for w in told)
        assert damaged == 1 or (of_another_version and damaged >= 1)
        assert any(path.name in str(w.message) for w in told)
        assert again.stats().errors == 0
        again.close()
    print(f"{trials} files with a flipped bit or cut short, all detected")


WRITER = """
import os, random, signal, sys, time, warnings
sys.path[:0] = [sys.argv[1]]
import torch
torch.set_num_threads(1)
from reuse.test_disk import *
folder, kills, dice = Path(sys.argv[2]), int(sys.argv[3]), random.Random(5)
warnings.simplefilter("error")
model, written, torn = Model(Eviction(7, 1)), {}, 0
for kill in range(kills):
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        store = opened(folder)
        i = 1000 * kill
        while True:
            model.ask(store, prompt(i, 60 + i % 40), check=False)
            store.flush()
            os.write(tell, b"%d\\n" % i)
            i += 1
    os.close(tell)
    time.sleep(dice.uniform(0.01, 0.5))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    lines = b""
    while part := os.read(told, 65536):
        lines += part
    os.close(told)
    for line in lines.splitlines():
        written[int(line)] = True
    torn += any(p.suffix == ".tmp" for p in folder.iterdir())
    store = opened(folder, None)
    assert store.verify() == ()
    for i in dice.sample(sorted(written), min(5, len(written))):
        n = 60 + i % 40
        assert model.ask(store, prompt(i, n)) == n - 1, "what was written before is still there"
    stats = store.stats()
    assert (stats.damaged, stats.errors) == (0, 0)
    store.close()
assert not any(p.suffix == ".tmp" for p in folder.iterdir())
print(kills, "kills,", len(written), "prompts written,", torn, "kills within a write")
"""


def test_a_killed_writer_leaves_whole_files_alone(tmp_path, full):
    command = [sys.executable, "-c", WRITER, str(TESTS), str(tmp_path), "200" if full else "6"]
    out = subprocess.run(command, capture_output=True, text=True, check=False)
    print(out.stdout)
    assert out.returncode == 0, out.stderr


HAMMER = """
import sys, warnings
sys.path[:0] = [sys.argv[1]]
import torch
torch.set_num_threads(1)
from reuse.test_disk import *
warnings.simplefilter("error")
model, store = Model(Eviction(7)), opened(Path(sys.argv[2]), sys.argv[4] or None, disk_budget=25_000)
for i in range(25):
    model.ask(store, prompt((i * int(sys.argv[3])) % 8))
    store.flush()
    assert sum(p.stat().st_size for p in Path(sys.argv[2]).glob("*.kv") if p.exists()) <= 25_000
store.close()
assert store.stats().damaged == store.stats().errors == 0
print(store.stats().hits)
"""


def test_processes_share_a_folder_and_its_budget(tmp_path):
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", HAMMER, str(TESTS), str(tmp_path), str(step), memory],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for step, memory in ((1, "20MB"), (3, ""), (5, ""))
    ]  # fmt: skip
    for run in runs:
        out, err = run.communicate()
        assert run.returncode == 0, err
        assert int(out) > 0
    assert opened(tmp_path).verify() == ()


def test_a_second_store_sees_what_the_first_one_does(tmp_path):
    model, a, b = Model(None), opened(tmp_path), opened(tmp_path, None)
    model.ask(a, prompt(0))
    a.flush()
    assert model.ask(b, prompt(0)) == 69
    assert model.ask(b, prompt(1)) == 40
    b.flush()
    assert model.ask(a, prompt(1)) == 69
    a.clear()
    assert model.ask(b, prompt(0)) == 0
    a.close()
    b.close()


def test_pins_and_lifetimes_outlive_a_restart(tmp_path):
    now = [1000.0]
    options = {"clock": lambda: now[0]}
    model, store = Model(Eviction(7)), opened(tmp_path, **options)
    model.ask(store, prompt(0))
    with store.request(ttl=100):
        model.ask(store, prompt(1))
    store.flush()
    assert store.pin(prompt(0), ttl=500) == 70
    store.close()
    again = opened(tmp_path, **options)
    pinned = {each.pinned for each in again.list()}
    assert 1500.0 in pinned
    assert model.ask(again, prompt(1)) == 69
    now[0] += 101
    assert model.ask(again, prompt(1), check=False) < 69
    assert model.ask(again, prompt(0)) == 69
    again.close()


def test_what_is_pinned_stays_however_much_comes(tmp_path):
    model, store = Model(None), opened(None, "60KB", policy="lru")
    model.ask(store, prompt(0))
    assert store.pin(prompt(0)) == 70
    for i in range(1, 20):
        model.ask(store, [i, i + 1, *prompt(i)])
    assert store.stats().evicted > 0
    assert model.ask(store, prompt(0)) == 69
    assert store.unpin(prompt(0)) == 70
    for i in range(1, 20):
        model.ask(store, [i, i + 2, *prompt(i)])
    assert model.ask(store, prompt(0)) == 0


def test_prompts_that_come_once_do_not_flush_what_is_used_again():
    hits = {}
    for policy in ("slru", "lru"):
        model, store, dice = Model(None), ReuseStore("80KB", policy=policy, **SETTINGS), random.Random(1)
        hits[policy] = 0
        for i in range(120):
            if i % 15 == 0:
                hits[policy] += sum(model.ask(store, prompt(j), check=False) > 60 for j in range(2))
                for j in range(2):
                    model.ask(store, prompt(j), check=False)
            else:
                model.ask(store, [dice.randrange(50) for _ in range(70)], check=False)
    assert hits == {"slru": 14, "lru": 0}


def test_a_full_disk_and_a_read_only_folder_cost_a_warning(tmp_path, monkeypatch):
    for i, code in enumerate((errno.ENOSPC, errno.EROFS)):
        model, store = Model(None), opened(tmp_path / str(i))

        def fails(*args, code=code):
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(store.tiers.folder.folder, "_replace", fails)
        caught: list[Warning] = []
        monkeypatch.setattr(warnings, "warn", lambda message, *args, caught=caught, **kwargs: caught.append(message))
        model.ask(store, prompt(0))
        assert model.ask(store, prompt(0)) == 69, "from memory"
        model.ask(store, prompt(1))
        store.flush()
        monkeypatch.undo()
        assert [os.strerror(code) in str(each) for each in caught] == [True], "once"
        assert store.stats().errors == 2
        assert store.stats().disk_records == 0
        assert list((tmp_path / str(i)).glob("*.tmp")) == []
        store.close()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_read_only_is_read(tmp_path):
    model, store = Model(None), opened(tmp_path)
    model.ask(store, prompt(0))
    store.close()
    tmp_path.chmod(0o500)
    again = opened(tmp_path, None)
    assert model.ask(again, prompt(0)) == 69
    model.ask(again, prompt(1))
    with pytest.warns(RuntimeWarning, match="cannot write"):
        again.flush()
    tmp_path.chmod(0o700)


def test_a_file_of_another_version_is_left_alone(tmp_path):
    model, store = Model(None), opened(tmp_path)
    model.ask(store, prompt(0))
    store.close()
    (path,) = tmp_path.glob("*.kv")
    data = bytearray(path.read_bytes())
    data[8] = 9
    path.write_bytes(data)
    with pytest.warns(RuntimeWarning, match="is of format 9, and this version"):
        again = opened(tmp_path)
    assert model.ask(again, prompt(0)) == 0
    assert path.read_bytes() == data or len(path.read_bytes()) > HEAD.size, "or another prompt took its name"
    again.close()


def test_a_prompt_that_is_larger_than_the_budget_is_not_stored():
    model, store = Model(None), opened(None, "6KB")
    with pytest.warns(RuntimeWarning, match="are more than the reuse cache may hold"):
        model.ask(store, prompt(0))
    model.ask(store, prompt(1))
    assert (store.stats().refused, store.stats().memory_nbytes) == (2, 0)


def test_a_disk_that_is_slower_than_the_model_is_passed_over_and_measured_again(tmp_path):
    model, store = Model(None), opened(tmp_path)
    model.ask(store, prompt(0))
    store.close()
    again = opened(tmp_path, None)
    assert model.ask(again, prompt(0)) == 69
    again.costs.per_byte, again.costs.per_token = {"disk": 1.0}, {again.list()[0].space: 1e-6}
    again.costs.computed = lambda *args: None
    again.costs.worth_loading = functools.partial(MEASURED, again.costs)
    got = [model.ask(again, prompt(0)) for _ in range(17)]
    assert got.count(0) >= 15
    assert 69 in got
    assert again.stats().passed_over >= 15


def test_two_threads_that_open_one_folder_at_once(tmp_path):
    stores = []
    threads = [threading.Thread(target=lambda: stores.append(opened(tmp_path / "new"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(stores) == 4


def test_impossible_settings_are_refused(tmp_path):
    for settings, error in (
        ({"memory": None}, "needs a tier"), ({"memory": "much"}, "memory must be"), ({"memory": 0}, "at least 1 byte"),
        ({"policy": "fifo"}, "policy must be"), ({"ttl": 0}, "ttl must be"), ({"back": -1}, "back must be"),
        ({"every": 0}, "every must be"), ({"disk": tmp_path, "disk_budget": "x"}, "disk_budget must be"),
        ({"quotas": {"a": "?"}}, "quota of 'a'"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=error):
            ReuseStore(**settings)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputFileError, match="cannot use"):
        ReuseStore(disk=tmp_path / "file")
    store = ReuseStore()
    with pytest.raises(ConfigError, match="say what to delete"):
        store.delete()
    for bad in ("text", [1.5], [[1], [2]], object(), [["a"]]):
        with pytest.raises(InputError):
            store.pin(bad)


def test_deleting_reaches_files_that_have_no_room_here(tmp_path):
    model, store = Model(None), opened(tmp_path)
    for i in range(8):
        with store.request(tenant=f"{i % 2}"):
            model.ask(store, [i, *prompt(i)])
    store.close()
    small = opened(tmp_path, "20KB")
    assert small.stats().disk_records < 4
    assert small.delete(tenant="1") == 4
    assert len(list(tmp_path.glob("*.kv"))) == 4
    small.clear()
    assert list(tmp_path.glob("*.kv")) == []


def test_explanations_name_the_first_token_that_differs():
    model, store = Model(Eviction(7)), ReuseStore("1MB", **SETTINGS)
    assert "nothing is stored" in store.explain([1, 2, 3]).reason
    model.ask(store, prompt(0))
    other = prompt(0)[:50] + [99] * 20
    told = store.explain({"input_ids": torch.tensor([other])})
    assert (told.length, told.matched, told.boundary) == (70, 50, 0)
    assert f"token 50 differs: {prompt(0)[50]} is stored, 99 is asked for" in told.reason
    assert model.ask(store, other) == 0
    assert store.explain(prompt(0)[:50] + [98] * 20).boundary == 50, "learned"
    assert "ends after token 69" in store.explain([*prompt(0), 1]).reason
    assert "last token" in store.explain(prompt(0)).reason
    assert "fewer than 4" in store.explain([1]).reason
    store.clear()
    assert store.list() == []
