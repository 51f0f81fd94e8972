"""Decode steps from graphs, without a GPU: what a graph would do is run by hand, in Triton's interpreter.

So everything around the graph is tested: tokens, positions and rows that it reads, pages that it may take, and what the
host notes. `tests/test_cuda.py` tests the graphs themselves.
"""

import functools
import gc

import pytest
import torch
from transformers.models.llama import modeling_llama

pytest.importorskip("triton", reason="Triton is not installed")
if torch.cuda.is_available():
    pytest.skip("tests/test_cuda.py captures real graphs", allow_module_level=True)

import octavo.kv.chunk_step
import octavo.kv.pool
import octavo.kv.sequences
from octavo import KVCache, attach
from octavo.attachment import compiled as compiled_code
from octavo.attachment import graphs, require_attachment
from octavo.attachment.forward import Forward
from octavo.attention import cuda
from octavo.errors import ConfigError
from tiny import tiny_adapter, tiny_model, tokens


class ByHand:
    """In place of a captured graph: runs the step anew, and writes where the graph would."""

    def __init__(self, owner, cache, tokens, positions, rows, search):
        self.owner, self.cache, self.inputs = owner, cache, (tokens, positions, rows, search)
        self.step, self.out, self.replays = None, None, 0

    def replay(self):
        (tokens, positions, rows, search), sequences = self.inputs, self.cache.sequences
        step, state = sequences.step, sequences._holding.state
        attachment, mode = self.owner._attachment, self.cache.swiftkv_on
        with pytest.MonkeyPatch.context() as patch:
            for module in (octavo.kv.sequences, octavo.kv.pool):
                patch.setattr(module, "capturing", lambda device: True)
            captured = self.cache.begin_capture(rows, search)
            forward = Forward(attachment.attention, self.cache, attachment.modes.folded(mode), keep=1)
            out = attachment.original(
                input_ids=tokens, position_ids=positions, past_key_values=self.cache, use_cache=True,
                octavo_forward=forward,
            )  # fmt: skip
            forward.commit()
        if self.out is None:
            self.step, self.out = captured, out
        else:
            self.out.last_hidden_state.copy_(out.last_hidden_state)
            for there, made in zip(self.step._step.new[:4], captured.new[:4], strict=True):
                there.copy_(made)
            self.step._step.found.copy_(captured._step.found)
            self.replays += 1
        sequences.step, sequences._holding.state = step, state


def capture_by_hand(self, cache):
    B = graphs.bucket(len(cache.rows))
    ids, positions = torch.zeros(2, B, 1, dtype=torch.int64)
    rows, search = torch.full((B,), -1, dtype=torch.int32), torch.zeros((), dtype=torch.int32)
    graph = ByHand(self, cache, ids, positions, rows, search)
    with torch.inference_mode(False), torch.no_grad():
        graph.replay()  # as in a capture, with no sequence to run
        first = graph.step._step
        first.rows, first.search = rows, search
    addresses = [(p, p.data_ptr()) for p in self._attachment.model.parameters()]
    return graphs._Captured(
        graph,
        ids,
        positions,
        graph.step,
        type(graph.out),
        graph.out.last_hidden_state,
        cache.tables.generation,
        addresses,
    )


@pytest.fixture
def by_hand(monkeypatch):
    monkeypatch.setattr(cuda, "available", lambda device: True)
    monkeypatch.setattr(graphs.Graphs, "_capture", capture_by_hand)


@pytest.mark.parametrize("shift", [0, 1])
def test_replayed_steps_answer_as_others(by_hand, monkeypatch, shift):
    model, ids = tiny_model(), tokens(2, 30)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    options = {"do_sample": False, "max_new_tokens": 20, "min_new_tokens": 20, "attention_mask": mask}
    attach(model, tiny_adapter(model, window=8, shift=shift), cuda_graphs=True)
    replayed = model.generate(ids, **options)
    captured = list(require_attachment(model).graphs._captured.values())
    assert sum(each.graph.replays for each in captured) > 10
    memory = require_attachment(model)._memory
    monkeypatch.undo()
    attach(model, tiny_adapter(model, window=8, shift=shift))
    assert torch.equal(replayed, model.generate(ids, **options))
    captured.clear()
    gc.collect()
    memory.reclaim()
    assert memory.pool.held() == 0


@pytest.mark.parametrize("evict", [False, True])
def test_a_cache_goes_on_after_replays_as_without(by_hand, evict):
    model, ids = tiny_model(), tokens(1, 40)
    attach(model, tiny_adapter(model, window=8) if evict else None, cuda_graphs=True)
    cache, parts = KVCache(model), []
    with torch.no_grad():
        for first, last in [
            (0, 20),
            *((i, i + 1) for i in range(20, 30)),
            (30, 36),
            *((i, i + 1) for i in range(36, 40)),
        ]:
            parts.append(model(ids[:, first:last], past_key_values=cache).logits)
        if not evict:  # with eviction, what would be seen again is gone
            cache.crop(-2)
            parts[-2:] = [model(ids[:, 38:], past_key_values=cache).logits]
        expected = model(ids, use_cache=False).logits
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=0, atol=1e-4)
    assert (cache.seen, cache.position.tolist()) == (40, [40])


def test_places_of_a_bucket_that_no_sequence_has_stay_empty(by_hand):
    model, ids, stay = tiny_model(), tokens(5, 23), [1, 2, 4]
    attach(model, tiny_adapter(model, window=8), cuda_graphs=True)
    cache = KVCache(model)
    with torch.no_grad():
        model(ids[:, :17], past_key_values=cache)
        parts = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(17, 20)]
        cache.leave([0, 3])
        rest = [model(ids[stay, i : i + 1], past_key_values=cache).logits for i in range(20, 23)]
        expected = model(ids, use_cache=False).logits
    torch.testing.assert_close(torch.cat(parts, 1), expected[:, 17:20], rtol=0, atol=1e-4)
    torch.testing.assert_close(torch.cat(rest, 1), expected[stay, 20:], rtol=0, atol=1e-4)
    captured = require_attachment(model).graphs._captured
    assert sorted(len(each.tokens) for each in captured.values()) == [4, 8]
    assert cache.memory.sequences == len(stay)


def test_buckets_are_few_and_large_enough():
    sizes = [graphs.bucket(n) for n in range(1, 65)]
    assert all(size >= n for n, size in enumerate(sizes, 1))
    assert sorted(set(sizes)) == [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64]


def test_compiled_pieces_compute_the_same_and_leave_nothing_behind(monkeypatch):
    compiled_code._compiled.cache_clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    model, ids = tiny_model(), tokens(2, 12)
    attach(model)
    attachment = require_attachment(model)
    rotary = modeling_llama.apply_rotary_pos_emb
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        with compiled_code.compiled(model.base_model, attachment.attention):
            pieces = [
                m
                for m in model.modules()
                if "forward" in m.__dict__ and type(m).__name__ in ("LlamaRMSNorm", "LlamaMLP")
            ]
            assert modeling_llama.apply_rotary_pos_emb is not rotary
            got = model(ids, use_cache=False).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    assert len(pieces) == 3 * len(model.model.layers) + 1
    assert modeling_llama.apply_rotary_pos_emb is rotary
    assert not any("forward" in m.__dict__ for m in pieces)
    compiled_code._compiled.cache_clear()


def test_compiling_needs_graphs():
    with pytest.raises(ConfigError, match="cuda_graphs"):
        attach(tiny_model(), compile=True)
