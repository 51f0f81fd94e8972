"""Snapshots: restored, a sequence goes on as if it had never stopped, here and in another process, to the last bit."""

import copy
import gc
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from kv.test_steps import SHAPE, H, L, check, crop, forward
from kv.test_steps import Sequences as Plain
from octavo import KVCache, Snapshot, attach, set_swiftkv
from octavo.config import NEVER, CacheSettings, Eviction
from octavo.errors import CacheBudgetError, CacheStateError, InputError, OutputFileError, SnapshotFileError
from octavo.kv import Memory, PagedCache
from tiny import tiny_adapter, tiny_model, tokens
from tiny_swift import model_of, pair

TESTS = Path(__file__).parent.parent


pytestmark = pytest.mark.usefixtures("one_thread")


def new_memory(page_size=4):
    return Memory(SHAPE.layout(CacheSettings(8, page_size)), H, SHAPE.device, None)


def wanted_at(tokens_, position, shift):
    """What is seen at a boundary: {(layer, head, position, expiry, key[0])}, and what of it is kept for ever."""
    seen, kept = set(), set()
    for layer in range(L):
        for head in range(H):
            for t in tokens_[:position]:
                is_open = shift and t.position == position - 1
                expiry = NEVER if is_open else int(t.expiry[layer, head])
                if expiry >= position:
                    seen.add((layer, head, t.position, expiry, t.key[layer, head, 0].item()))
                    if expiry == NEVER and not is_open:
                        kept.add((layer, head, t.position, expiry, t.key[layer, head, 0].item()))
    return seen, kept


def listed(parts):
    """The same of some parts of a snapshot, each slot once."""
    out = []
    for part in parts:
        at = 0
        for i, n in enumerate(part.counts.flatten().tolist()):
            positions = part.position[at : at + n].tolist()
            assert positions == sorted(set(positions)), "ordered by position"
            for j in range(at, at + n):
                expiry = NEVER if part.expiry is None else int(part.expiry[j])
                out.append((i // H, i % H, int(part.position[j]), expiry, part.key[j, 0].item()))
            at += n
        assert at == len(part.position) == len(part.key) == len(part.value)
    assert len(out) == len(set(out))
    return set(out)


@pytest.mark.parametrize("eviction", [None, Eviction(5), Eviction(5, 1), Eviction(20, 1)])
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31), page_size=st.sampled_from([1, 3, 4, 16]), undo=st.sampled_from([0, 9]))
def test_any_history_at_any_boundary_is_the_visibility_rule(eviction, seed, page_size, undo):
    dice, memory, shift = random.Random(seed), new_memory(page_size), eviction.shift if eviction else 0
    plain = Plain(PagedCache(SHAPE, eviction, memory, undo=undo), 2)
    for _ in range(dice.randint(3, 9)):
        if dice.random() < 0.2:
            crop(plain, dice.randint(1, 12))
            continue
        columns = dice.choice([1, 1, 2, 4, 9, 25, 40])
        pads = [dice.choice([0, 0, 2]), 0] if dice.random() < 0.3 else [0, 0]
        if dice.random() < 0.6:
            plain.cache.keep([plain.cache.seen + columns])
        forward(plain, columns, pads, dice.getrandbits(30), dice.choice([None, None, None, None, 0, 1, 2]))
    if not plain.cache.rows:
        return
    for b in range(len(plain.cache.rows)):
        if not plain.tokens[b]:
            continue
        made = plain.cache.snapshot_under({"of": "a test"}, None, b, None)
        assert made.boundaries[-1] == len(plain.tokens[b])
        for i, p in enumerate(made.boundaries):
            seen, kept = wanted_at(plain.tokens[b], p, shift)
            assert listed(made.segments[: i + 1]) == kept
            assert listed([*made.segments[: i + 1], made.tails[i]]) == seen
            twin = Plain(PagedCache(SHAPE, eviction, memory, undo=dice.choice([0, undo])), 1)
            twin.cache.sequences.restore(made.layout, made.at(p), p)
            twin.tokens = [copy.deepcopy(plain.tokens[b][:p])]
            if shift:
                twin.tokens[0][-1].expiry = torch.full((L, H), NEVER)
            twin.columns = [[True]] * p
            check(memory, [plain, twin])
            at_end = twin.cache.snapshot_under({"of": "a test"}, [p], 0, None)
            assert at_end.to_bytes() == at_end.from_bytes(at_end.to_bytes()).to_bytes()
            assert listed([*at_end.segments, at_end.tails[0]]) == seen
            for columns in dice.choices([1, 1, 2, 9, 30], k=3):
                crop(twin, dice.choice([0, 1, 3]))
                forward(twin, columns, [0], dice.getrandbits(30))
                check(memory, [plain, twin])
            del twin
            memory.reclaim()


# Models are made from their names, here and in the other process. With codes in pages they compute in float64: the last
# digit of a sum, which depends on the order of slots, would turn a code into the next one now and then.

MODELS = {
    "dense": lambda: attach(tiny_model(), chunk=16),
    "gates": lambda: gated(shift=0),
    "gates, shift 1": lambda: gated(shift=1),
    "gates, int8": lambda: gated(shift=0, kv_dtype="int8"),
    "gates, shift 1, int8": lambda: gated(shift=1, kv_dtype="int8"),
    "gates, fp8": lambda: gated(shift=0, kv_dtype="fp8"),
    "swiftkv": lambda: swift(False),
    "swiftkv, gates": lambda: swift(True),
    "swiftkv, gates, shift 1, int8": lambda: swift(True, kv_dtype="int8", shift=1),
    "swiftkv that hands on": lambda: swift(False, before=40),
    "swiftkv that hands on, gates, shift 1": lambda: swift(True, shift=1, before=40),
    "swiftkv that hands on, gates, int8": lambda: swift(True, kv_dtype="int8", before=40),
}
LENGTH = 150


@torch.no_grad()
def read(model, ids, cache):
    return model(input_ids=ids, past_key_values=cache)


def gated(shift, **options):
    model = tiny_model() if not options else tiny_model().double()
    return attach(model, tiny_adapter(model, window=9, shift=shift), chunk=16, **options)


def swift(evict, kv_dtype=None, shift=0, before=0):
    model = model_of() if kv_dtype is None else model_of().double()
    options = {"window": 9, "shift": shift} if evict else {}
    return attach(model, pair(model, 2, evict, before=before, **options), chunk=16, kv_dtype=kv_dtype)


def turns(dice):
    """Where each forward of a conversation ends: turns of random lengths, each of a prompt and single tokens."""
    ends = [0]
    while ends[-1] < LENGTH:
        for columns in [dice.choice([1, 3, 17, 40]), *[1] * dice.choice([0, 2, 12])]:
            ends.append(min(LENGTH, ends[-1] + columns))
    return ends


def converse(model, cache, ids, ends):
    """Logits [T, vocab] of all ids from where the cache is, in forwards that end at `ends`."""
    parts = []
    for end in ends:
        if end > cache.seen:
            parts.append(read(model, ids[None, cache.seen : end], cache).logits[0])
    return torch.cat(parts)


def continued(model, snapshot, boundary, ends):
    """Logits of what follows a boundary, from a restored cache.

    With codes in pages a token is seen exactly by its own chunk and rounded by later ones, so chunks must be the same.
    """
    cache = KVCache.restore(model, snapshot, boundary)
    cache.keep([p for p in snapshot.boundaries if p > boundary])
    return converse(model, cache, snapshot.tokens.long(), ends)


def elsewhere(folder):
    """Runs in another process: the continuations of all snapshots in a folder."""
    torch.set_num_threads(1)
    logits = {}
    for i, make in enumerate(MODELS.values()):
        model, snapshot = make(), Snapshot.load(folder / f"{i}.kv")
        for p in snapshot.boundaries[:-1]:
            logits[f"{i}.{p}"] = continued(model, snapshot, p, turns(random.Random(i)))
    (folder / "logits").write_bytes(save_tensors(logits))


def test_another_process_goes_on_at_every_boundary_as_if_it_had_never_stopped(tmp_path):
    never_stopped, evicted = {}, {}
    for i, (name, make) in enumerate(MODELS.items()):
        model, ids = make(), tokens(1, LENGTH, seed=i)[0]
        cache, boundaries = KVCache(model), sorted(random.Random(i).sample(range(1, LENGTH), 7))
        cache.keep(boundaries)
        logits = converse(model, cache, ids, turns(random.Random(i)))
        snapshot = cache.snapshot(tokens=ids)
        assert snapshot.boundaries == (*boundaries, LENGTH)
        assert snapshot.nbytes < 2 * cache.nbytes
        snapshot.save(tmp_path / f"{i}.kv")
        never_stopped |= {f"{i}.{p}": logits[p:] for p in boundaries}
        evicted[name] = any(int(snapshot.counts(p).min()) < p for p in boundaries)
    assert evicted == {name: "gates" in name for name in MODELS}
    code = "import sys; sys.path[:0] = [sys.argv[1]]\nfrom kv.test_snapshot import *; elsewhere(Path(sys.argv[2]))"
    subprocess.run([sys.executable, "-c", code, str(TESTS), str(tmp_path)], check=True)
    got = load_tensors((tmp_path / "logits").read_bytes())
    assert set(got) == set(never_stopped)
    worst = max((got[name] - expected).abs().max().item() for name, expected in never_stopped.items())
    print(f"{len(got)} boundaries, logits differ by {worst:.1e} at most")
    assert worst < 1e-4, "of logits of some 3"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kv_dtype", [None, "int8", "fp8"])
def test_bytes_are_the_same_after_a_file_and_a_cache(dtype, kv_dtype, tmp_path):
    model = tiny_model().to(dtype)
    attach(model, tiny_adapter(model, window=9, shift=1), kv_dtype=kv_dtype)
    ids, cache = tokens(1, 70)[0], KVCache(model)
    cache.keep([33])
    read(model, ids[None], cache)
    snapshot = cache.snapshot()
    snapshot.save(tmp_path / "a.kv")
    assert [p.name for p in tmp_path.iterdir()] == ["a.kv"], "nothing is left beside it"
    loaded = Snapshot.load(tmp_path / "a.kv")
    assert loaded.to_bytes() == snapshot.to_bytes() == (tmp_path / "a.kv").read_bytes()
    again = KVCache.restore(model, loaded)
    assert again.snapshot([70]).to_bytes() == cache.snapshot([70]).to_bytes()
    middle = KVCache.restore(model, loaded, 33).snapshot()
    assert {k: t.tolist() for k, t in middle.tails[0].tensors.items()} == {
        k: t.tolist() for k, t in snapshot.tails[0].tensors.items()
    }
    assert middle.to_bytes() == KVCache.restore(model, middle).snapshot().to_bytes()


def test_a_segment_is_the_same_in_every_longer_text():
    for shift in (0, 1):
        model = gated(shift)
        ids, made = tokens(1, 90)[0], []
        for length in (48, 90):
            cache = KVCache(model)
            cache.keep([p for p in (20, 48) if p <= length])
            read(model, ids[None, :length], cache)
            made.append(cache.snapshot([20, 48]))
        for kind in ("segments", "tails"):
            for short, long in zip(getattr(made[0], kind), getattr(made[1], kind), strict=True):
                assert short.tensors.keys() == long.tensors.keys()
                assert all(torch.allclose(short.tensors[k].float(), long.tensors[k].float()) for k in short.tensors)


def test_boundaries_follow_their_sequences():
    model = gated(1)
    ids, cache = tokens(2, 60), KVCache(model)
    cache.keep([20, 45])
    read(model, ids[:, :30], cache)
    before = [cache.snapshot([20], b).to_bytes() for b in (0, 1)]
    cache.reorder_cache(torch.tensor([1, 0, 1]))
    assert [cache.snapshot([20], b).to_bytes() for b in range(3)] == [before[1], before[0], before[1]]
    twin = copy.deepcopy(cache)
    other = KVCache(model)
    read(model, ids[:1, :25], other)
    other.join(cache)
    assert other.snapshot([20], 2).to_bytes() == before[0]
    assert twin.snapshot([20], -1).to_bytes() == before[1]
    read(model, tokens(3, 15), twin)
    assert twin.snapshot(None, 1).boundaries == (20, 45)
    assert KVCache.restore(model, twin.snapshot()).kept.shape == (1, 3, 2)
    with pytest.raises(CacheStateError, match="no sequence 3"):
        twin.snapshot(None, 3)
    twin.leave([0, 1])
    assert twin.snapshot([20]).to_bytes() == before[1]


def test_boundaries_past_the_end_of_a_crop_are_dropped_and_taken_anew():
    model = tiny_model()
    attach(model, tiny_adapter(model, window=40), chunk=16)
    ids, cache = tokens(1, 60)[0], KVCache(model)
    cache.keep([20, 30])
    read(model, ids[None, :35], cache)
    whole = cache.snapshot().to_bytes()
    cache.crop(-10)
    assert cache.snapshot().boundaries == (20, 25)
    with pytest.raises(CacheStateError, match="boundary 30 was not kept"):
        cache.snapshot([20, 30])
    read(model, ids[None, 25:35], cache)
    assert Snapshot.from_bytes(whole).boundaries == cache.snapshot().boundaries == (20, 30, 35)
    cache.crop(-35)
    read(model, ids[None, :35], cache)
    assert cache.snapshot().to_bytes() == whole
    cache.reset()
    read(model, ids[None, :35], cache)
    assert cache.snapshot().boundaries == (35,)


def test_without_eviction_any_boundary_is_to_be_had():
    model, ids = MODELS["dense"](), tokens(1, 50)[0]
    cache = KVCache(model)
    logits = read(model, ids[None], cache).logits[0]
    snapshot = Snapshot.from_bytes(cache.snapshot([7, 31], tokens=ids).to_bytes())
    for p in (7, 31):
        torch.testing.assert_close(continued(model, snapshot, p, (50,)), logits[p:], rtol=0, atol=1e-4)
    restored = KVCache.restore(model, snapshot, 31)
    restored.crop(-11)
    out = read(model, ids[None, 20:], restored).logits[0]
    torch.testing.assert_close(out, logits[20:], rtol=0, atol=1e-4)


def test_a_restored_cache_is_cropped_exactly_or_not_at_all():
    model, ids = gated(0), tokens(1, 60)[0]
    cache = KVCache(model)
    read(model, ids[None, :40], cache)
    restored = KVCache.restore(model, cache.snapshot())
    with pytest.raises(CacheStateError, match="already evicted"):
        restored.crop(-1)
    read(model, ids[None, 40:45], restored)
    restored.crop(-5)
    out = read(model, ids[None, 40:], restored).logits[0]
    torch.testing.assert_close(out, read(model, ids[None, 40:], cache).logits[0], rtol=0, atol=1e-4)


def test_a_snapshot_of_another_model_is_refused_by_name():
    model = gated(0)
    cache = KVCache(model)
    read(model, tokens(1, 30), cache)
    snapshot = cache.snapshot()
    for other, name in (
        (gated(1), "shift"), (gated(0, kv_dtype="int8").float(), "page_dtype"), (MODELS["dense"](), "window"),
        (swift(True), "layers"),
    ):  # fmt: skip
        with pytest.raises(CacheStateError, match=f"another {name}:"):
            KVCache.restore(other, snapshot)
    with torch.no_grad():
        model.base_model.layers[1].self_attn.v_proj.weight.data += 1e-3  # which moves no version
    with pytest.raises(CacheStateError, match="another weights:"):
        KVCache.restore(model, snapshot)


def test_a_restored_cache_runs_in_the_mode_it_was_made_in():
    model, ids = swift(True), tokens(1, 60)[0]
    for on in (True, False):
        set_swiftkv(model, on)
        cache = KVCache(model)
        read(model, ids[None, :40], cache)
        snapshot = cache.snapshot()
        expected = read(model, ids[None, 40:], cache).logits
        set_swiftkv(model, not on)
        restored = KVCache.restore(model, snapshot)
        got = read(model, ids[None, 40:], restored).logits
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    plain = attach(model_of())
    set_swiftkv(model, True)
    cache = KVCache(model)
    read(model, ids[None, :40], cache)
    with pytest.raises(CacheStateError, match="another kv_layers"):
        KVCache.restore(plain, cache.snapshot())


def small():
    model = gated(1)
    cache = KVCache(model)
    cache.keep([10])
    read(model, tokens(1, 30), cache)
    return model, cache.snapshot(tokens=tokens(1, 30)[0])


def test_a_damaged_file_is_refused(tmp_path):
    _, snapshot = small()
    data, dice = snapshot.to_bytes(), random.Random(0)
    path = tmp_path / "a.kv"
    for _ in range(60):
        at = dice.randrange(len(data))
        broken = bytearray(data)
        broken[at] ^= 1 << dice.randrange(8)
        path.write_bytes(broken if dice.random() < 0.7 else data[:at])
        with pytest.raises(SnapshotFileError, match=r"a\.kv"):
            Snapshot.load(path)
    for content in (b"", b"{}", save_tensors({"x": torch.zeros(3)}), save_tensors({}, {"octavo": "[]"})):
        with pytest.raises(SnapshotFileError, match="not a snapshot"):
            Snapshot.from_bytes(content)
    with pytest.raises(SnapshotFileError, match="cannot read"):
        Snapshot.load(tmp_path / "missing.kv")


@pytest.mark.parametrize(
    "change",
    [
        {"boundaries": (30, 10)},
        {"boundaries": (10,)},
        {"boundaries": ()},
        {"tokens": torch.zeros(29, dtype=torch.int32)},
        {"tokens": torch.zeros(30)},
        {"segments": ()},
    ],
)
def test_a_file_that_contradicts_itself_is_refused(change):
    _, snapshot = small()
    with pytest.raises(SnapshotFileError, match="contradicts"):
        Snapshot.from_bytes(replace(snapshot, **change).to_bytes())


def test_a_segment_that_contradicts_itself_is_refused():
    _, snapshot = small()
    counts = snapshot.segments[0].counts
    for part in (
        snapshot.segments[0]._replace(counts=counts + 1),
        snapshot.segments[0]._replace(counts=counts - counts.max() - 1),
        snapshot.segments[0]._replace(key=snapshot.segments[0].key.half()),
        snapshot.segments[0]._replace(expiry=snapshot.segments[0].position.clone()),
    ):
        wrong = replace(snapshot, segments=(part, snapshot.segments[1]))
        with pytest.raises(SnapshotFileError, match="contradicts"):
            Snapshot.from_bytes(wrong.to_bytes())


def test_slots_that_no_cache_can_have_held_are_refused():
    _, snapshot = small()
    segment, tail = snapshot.segments[1], snapshot.tails[1]
    for kind, i, part in (
        ("segments", 1, segment._replace(position=torch.full_like(segment.position, -5))),
        ("segments", 1, segment._replace(position=segment.position + 5000)),
        ("segments", 1, segment._replace(position=segment.position.flip(0))),
        ("tails", 1, tail._replace(expiry=torch.full_like(tail.expiry, 3))),
        ("tails", 1, tail._replace(expiry=torch.full_like(tail.expiry, NEVER))),
        ("tails", 1, tail._replace(position=torch.zeros_like(tail.position))),
    ):
        parts = list(getattr(snapshot, kind))
        parts[i] = part
        with pytest.raises(SnapshotFileError, match="contradicts"):
            Snapshot.from_bytes(replace(snapshot, **{kind: tuple(parts)}).to_bytes())
    model = attach(tiny_model().double(), kv_dtype="int8")
    cache = KVCache(model)
    read(model, tokens(1, 9), cache)
    made = cache.snapshot()
    part = made.segments[0]._replace(key_scale=torch.full_like(made.segments[0].key_scale, float("nan")))
    with pytest.raises(SnapshotFileError, match="finite"):
        Snapshot.from_bytes(replace(made, segments=(part,)).to_bytes())


def test_mistakes_are_refused_and_nothing_is_held(tmp_path):
    model, snapshot = small()
    with pytest.raises(CacheStateError, match="no boundary 11; it has 10, 30"):
        KVCache.restore(model, snapshot, 11)
    with pytest.raises(CacheBudgetError):
        KVCache.restore(model, snapshot, budget=100)
    cache = KVCache(model)
    memory = cache.memory
    assert memory.sequences == memory.pool.held() == 0
    with pytest.raises(CacheStateError, match="no sequence 0"):
        cache.snapshot()
    read(model, tokens(1, 30), cache)
    with pytest.raises(CacheStateError, match="has been passed: 30 columns"):
        cache.keep([31, 30])
    with pytest.raises(CacheStateError, match="29 token ids do not reach"):
        cache.snapshot(tokens=tokens(1, 29)[0])
    with pytest.raises(CacheStateError, match="at least one boundary"):
        cache.snapshot([])
    assert cache.snapshot(tokens=tokens(1, 30)[0].tolist()).tokens.tolist() == tokens(1, 30)[0].tolist()
    with pytest.raises(InputError, match="whole numbers"):
        cache.snapshot(tokens=tokens(1, 30)[0].float())
    with pytest.raises(CacheStateError, match="whole numbers"):
        cache.snapshot([20.5])
    for path in ("", tmp_path):
        with pytest.raises(OutputFileError, match="names a folder"):
            snapshot.save(path)
    cache.keep([40])
    with pytest.raises(CacheStateError, match="boundary 40 lies within an input"):
        model(input_ids=tokens(1, 30), past_key_values=cache)
    with pytest.raises(OutputFileError, match="cannot write"):
        snapshot.save(tmp_path / "no folder" / "a.kv")
    del model
    gc.collect()
    with pytest.raises(CacheStateError, match="is gone"):
        cache.snapshot()


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_a_tail_is_taken_without_waiting_and_goes_to_a_file_and_back():
    model, ids = gated(1).cuda(), tokens(1, 90)[0]
    cache = KVCache(model)
    cache.keep([40])
    read(model, ids[None, :60].cuda(), cache)
    sequences = cache.sequences
    torch.cuda.set_sync_debug_mode("error")
    try:
        sequences.boundaries.reached(sequences.tables, sequences.rows, sequences.index, 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    snapshot = cache.snapshot(tokens=ids)
    assert snapshot.boundaries == (40, 60)
    assert snapshot.segments[0].key.is_cuda
    loaded = Snapshot.from_bytes(snapshot.to_bytes())
    assert loaded.to("cuda").to_bytes() == snapshot.to_bytes()
    expected = read(model, ids[None, 60:].cuda(), cache).logits
    got = read(model, ids[None, 60:].cuda(), KVCache.restore(model, loaded)).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-3)
    at_40 = read(model, ids[None, 40:60].cuda(), KVCache.restore(model, loaded, 40)).logits
    whole = read(model, ids[None].cuda(), KVCache(model)).logits
    torch.testing.assert_close(at_40, whole[:, 40:60], rtol=0, atol=2e-3)
