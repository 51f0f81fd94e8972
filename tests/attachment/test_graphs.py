"""Decode steps from graphs, without a GPU: what a graph would do is run by hand, in Triton's interpreter.

So everything around the graph is tested: tokens, positions and rows that it reads, pages that it may take, and what the
host notes. `tests/test_cuda.py` tests the graphs themselves.
"""

import functools
import gc
import random
import threading
import weakref
from contextlib import contextmanager, nullcontext, suppress
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from transformers.models.llama import modeling_llama
from transformers.models.qwen3 import modeling_qwen3

pytest.importorskip("triton", reason="Triton is not installed")
if torch.cuda.is_available():
    pytest.skip("tests/test_cuda.py captures real graphs", allow_module_level=True)

import octavo.kv.chunk_step
import octavo.kv.late
import octavo.kv.pool
import octavo.kv.sequences
from octavo import KVCache, attach
from octavo.attachment import Attachment, graphs, require_attachment
from octavo.attachment import compiled as compiled_code
from octavo.attachment.forward import Forward
from octavo.attachment.projections import computed_once
from octavo.attachment.prompt_graphs import PromptGraphs
from octavo.attachment.sums import Sum
from octavo.attention import cuda
from octavo.attention.cuda.launch import Launcher
from octavo.engine import Engine, SamplingParams
from octavo.errors import CacheBudgetError, ConfigError, UnsupportedModelError
from octavo.kv.fused_step import Replayed
from tiny import attention_of, check_answers, tiny_adapter, tiny_model, tokens
from tiny_windows import windowed_model


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
            for module in (octavo.kv.sequences, octavo.kv.pool, octavo.kv.late):
                patch.setattr(module, "capturing", lambda device: True)
            captured = self.cache.begin_capture(rows, search)
            forward = Forward(attachment.layout, self.cache, attachment.modes.folded(mode), keep=1)
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
    addresses = graphs.places(self._attachment.model)
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
    monkeypatch.setattr(PromptGraphs, "suits", lambda *args: False)  # see test_prompt_graphs.py


@pytest.mark.parametrize(("shift", "undo"), [(0, None), (1, 5)])
def test_replayed_steps_answer_as_others(by_hand, monkeypatch, shift, undo):
    model, ids = tiny_model(), tokens(2, 30)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    options = {"do_sample": False, "max_new_tokens": 20, "min_new_tokens": 20, "attention_mask": mask}
    attach(model, tiny_adapter(model, window=8, shift=shift), cuda_graphs=True, undo=undo)
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
    attach(model, tiny_adapter(model, window=8) if evict else None, cuda_graphs=True, undo=3)
    cache, parts = KVCache(model), []
    with torch.no_grad():
        for first, last in [
            (0, 20),
            *((i, i + 1) for i in range(20, 30)),
            (30, 36),
            *((i, i + 1) for i in range(36, 40)),
        ]:
            parts.append(model(ids[:, first:last], past_key_values=cache).logits)
        held = cache.tables.length[cache.rows[0]].clone()
        for _ in range(2):
            cache.crop(-3)
            parts[-3:] = [model(ids[:, at : at + 1], past_key_values=cache).logits for at in range(37, 40)]
        assert bool((cache.tables.length[cache.rows[0]] <= held).all())  # slots of what was taken back are taken again
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


@pytest.mark.parametrize(("shift", "seed"), [(0, 0), (1, 2)])
def test_sequences_that_join_and_leave_at_random_answer_as_alone(by_hand, shift, seed):
    model, ids, rng = tiny_model(), tokens(3, 24), random.Random(seed)
    attach(model, tiny_adapter(model, window=8, shift=shift), cuda_graphs=True)
    batches, here = [KVCache(model), KVCache(model)], [[], []]  # two caches share the graphs
    waiting = list(range(len(ids)))
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        while waiting or any(here):
            which = rng.randrange(2)
            cache, mine = batches[which], here[which]
            if waiting and rng.random() < 0.4:
                one, length = KVCache(model), rng.randint(9, 16)
                model(ids[waiting[-1:], :length], past_key_values=one)
                cache.join(one)
                mine.append([waiting.pop(), length])
            for _ in range(rng.randint(0, 4) if mine else 0):
                token = torch.stack([ids[i, [at]] for i, at in mine])
                logits = model(token, past_key_values=cache).logits
                for row, each in enumerate(mine):
                    torch.testing.assert_close(logits[row, 0], expected[each[0], each[1]], rtol=0, atol=1e-4)
                    each[1] += 1
                gone = [row for row, (_, at) in enumerate(mine) if at == 24 or rng.random() < 0.05]
                cache.leave(gone)
                mine[:] = [each for row, each in enumerate(mine) if row not in gone]
                if not mine:
                    cache.reset()
                    break
    assert sum(each.graph.replays for each in require_attachment(model).graphs._captured.values()) > 3


def test_a_budget_that_is_reached_leaves_the_cache_as_it_was(by_hand):
    model, ids = tiny_model(), tokens(2, 400)
    attach(model, tiny_adapter(model, window=8), cuda_graphs=True, budget=2**18)
    cache, read = KVCache(model), 40
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        model(ids[:, :read], past_key_values=cache)
        with suppress(CacheBudgetError):
            while read < 400:
                got = model(ids[:, read : read + 1], past_key_values=cache).logits
                torch.testing.assert_close(got, expected[:, read : read + 1], rtol=0, atol=1e-4)
                read += 1
        for _ in range(2):
            with pytest.raises(CacheBudgetError):
                model(ids[:, read : read + 1], past_key_values=cache)
        assert (cache.seen, cache.position.tolist()) == (read, [read, read])
        cache.leave([0])
        for at in range(read, read + 9):
            got = model(ids[1:, at : at + 1], past_key_values=cache).logits
            torch.testing.assert_close(got, expected[1:, at : at + 1], rtol=0, atol=1e-4)


def test_the_host_never_counts_fewer_pages_than_are_in_use(by_hand):
    model = tiny_model()
    attach(model, cuda_graphs=True)
    cache, counted = KVCache(model), []
    with torch.no_grad():
        model(tokens(1, 30), past_key_values=cache)
        pool = cache.tables.pool
        for i in range(20):
            model(tokens(1, 1, seed=i), past_key_values=cache)
            counted.append(pool.demand.most - (pool.size - int(pool.free_count)))
    assert min(counted) >= 0
    assert sum(each.graph.replays for each in require_attachment(model).graphs._captured.values()) > 10


@pytest.mark.parametrize("change", ["assign", "attribute"])
def test_a_parameter_that_is_another_one_is_noticed(by_hand, change):
    model, ids = tiny_model(), tokens(1, 30)
    attach(model, cuda_graphs=True)
    options = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
    model.generate(ids, **options)
    captured = require_attachment(model).graphs._captured
    (before,) = captured.values()
    if change == "assign":
        model.load_state_dict({name: t.clone() for name, t in model.state_dict().items()}, assign=True)
    else:
        layer = model.model.layers[1].mlp.up_proj
        layer.weight = torch.nn.Parameter(layer.weight.detach() * 2)
    model.generate(ids, **options)
    (after,) = captured.values()
    assert after is not before


def test_masks_that_are_refused_are_refused_in_every_step(by_hand):
    model, ids = tiny_model(), tokens(1, 30)
    attach(model, cuda_graphs=True)
    cache = KVCache(model)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        for seen in range(30, 33):
            with pytest.raises(UnsupportedModelError, match="4-D"):
                model(ids[:, :1], past_key_values=cache, attention_mask=torch.ones(1, 1, 1, seen + 1))
            model(ids[:, :1], past_key_values=cache)
    assert len(require_attachment(model).graphs._captured) == 1


def test_models_in_training_have_graphs_of_their_own(by_hand):
    model, ids = tiny_model(), tokens(1, 30)
    attach(model, cuda_graphs=True)
    cache = KVCache(model)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        for training in (True, True, False, False):
            model.train(training)
            model(ids[:, :1], past_key_values=cache)
    assert [kind[-1] for kind in require_attachment(model).graphs._captured] == [True, False]


def test_an_interrupted_step_leaves_no_place_taken(by_hand):
    model, ids = tiny_model(), tokens(3, 30)
    attach(model, cuda_graphs=True)
    cache = KVCache(model)
    with torch.no_grad():
        for first, last in ((0, 20), (20, 21), (21, 22)):
            model(ids[:, first:last], past_key_values=cache)
    (captured,) = require_attachment(model).graphs._captured.values()
    step, rows, no = captured.step._step, cache.sequences.row_ids, cache.tables.flags[0]
    replayed = Replayed(step)
    step.rows.fill_(-1)
    new, step.new = step.new, None  # so that it fails in its middle
    with pytest.raises(TypeError):
        replayed.prepare(rows, no, False)
    step.new = new
    replayed.prepare(rows[:1], no, False)
    assert step.rows.tolist() == [rows[0], -1, -1, -1]


def test_graphs_end_with_the_memory_that_they_hold(by_hand):
    model, ids = tiny_model(), tokens(1, 30)
    attach(model, cuda_graphs=True)
    options = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
    model.generate(ids, **options)
    before = require_attachment(model)
    (captured,) = before.graphs._captured.values()
    tables, captured = weakref.ref(captured.step._step.batch.tables), None
    model.double()
    model.generate(ids, **options)
    gc.collect()
    assert tables() is None
    assert len(before.graphs._captured) == 1


def test_the_engine_answers_as_generate_with_arrivals_and_preemptions(by_hand):
    model, rng = tiny_model(), random.Random(3)
    attach(model, tiny_adapter(model, window=8), cuda_graphs=True)
    engine, requests = Engine(model, max_batch=2, step_tokens=24), []
    while len(requests) < 4 or engine.unfinished:
        if len(requests) < 4 and rng.random() < 0.5:
            params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=rng.randint(2, 8))
            requests.append(engine.add(tokens(1, rng.randint(1, 50), len(requests))[0].tolist(), params))
        if engine.scheduler.running and rng.random() < 0.1:
            engine.preempt(rng.choice(engine.scheduler.running))
        engine.step()
    captured = require_attachment(model).graphs._captured
    assert sum(each.graph.replays for each in captured.values()) > 3
    attach(model, tiny_adapter(model, window=8))
    check_answers(model, requests)


def test_a_capture_that_fails_leaves_stream_and_allocator_as_they_were(monkeypatch):
    """PyTorch's own block of a capture, over stand-ins for what needs a GPU."""
    device, done = torch.device("cuda", 0), []
    here, aside = mock.Mock(), mock.Mock()
    now = [here]
    made = mock.Mock(capture_begin=lambda *args, **kwargs: done.append("begins"))
    made.capture_end.side_effect = lambda: done.append("ends")

    @contextmanager
    def on(stream):
        before, now[0] = now[0], stream
        yield  # as PyTorch's, which is not left where the block's end fails
        now[0] = before

    for name, stand_in in (
        ("device", lambda given: nullcontext()), ("synchronize", lambda *args: None), ("CUDAGraph", lambda: made),
        ("current_stream", lambda *args: now[0]), ("Stream", lambda given: aside), ("current_device", lambda: 0),
        ("stream", on), ("set_stream", lambda stream: now.__setitem__(0, stream)), ("empty_cache", lambda: None),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: None, raising=False)
    ended = mock.Mock()
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", ended, raising=False)
    graphs._stream.cache_clear()
    rehearsed = mock.Mock()
    graph, out = graphs.recorded(rehearsed, lambda: now[0], device, (0, 7))
    assert (graph, out, now[0], done) == (made, aside, here, ["begins", "ends"])
    assert rehearsed.called
    made.capture_end.side_effect = RuntimeError("operation failed due to a previous error during capture")
    with pytest.raises(RuntimeError, match="previous error"):
        graphs.recorded(rehearsed, lambda: now[0], device, (0, 7))
    assert now[0] is here
    ended.assert_called_once_with(0, (0, 7))
    graphs._stream.cache_clear()


def test_what_asks_a_device_is_found_and_what_is_only_sent_is_not():
    device, values = torch.device("cpu"), torch.arange(4)
    graphs.check_waits(lambda: values.add(1).mul(2)[values].to(torch.float32), device)
    for asks in (
        lambda: bool(values.sum() > 0),
        lambda: values.nonzero(),
        lambda: values[values > 1],
        lambda: [int(value) for value in values],
        lambda: torch.equal(values, values),
    ):
        with pytest.raises(RuntimeError, match="asks the device"):
            graphs.check_waits(asks, device)
    meta = torch.zeros(3, device="meta")  # in place of a GPU's
    for blocks in (False, True):
        watch = graphs._Watch(torch.device("meta"))
        copy = mock.Mock(side_effect=lambda to, *args: to, overloadpacket=SimpleNamespace(__name__="copy_"))
        with pytest.raises(RuntimeError, match="asks the device") if blocks else nullcontext():
            watch.__torch_dispatch__(copy, (), (torch.zeros(3), meta, not blocks))


def test_a_decode_step_asks_the_device_for_nothing(monkeypatch):
    """What a capture is refused for, looked for in its rehearsal; the kernels themselves are left out."""
    monkeypatch.setattr(Launcher, "__call__", lambda *args, **kwargs: None)
    rehearsed = []

    def capture(self, cache):
        tokens, rows = torch.zeros(1, 1, dtype=torch.int64), torch.full((1,), -1, dtype=torch.int32)
        search = torch.zeros((), dtype=torch.int32)
        step = functools.partial(self._step, cache, tokens, torch.zeros_like(tokens), rows, search, rehearsal=True)
        with torch.inference_mode(False), torch.no_grad():
            graphs.check_waits(step, cache.shape.device)
        rehearsed.append(1)
        raise torch.OutOfMemoryError  # so that nothing is captured

    monkeypatch.setattr(graphs.Graphs, "_capture", capture)
    for family, shift in (("llama", 0), ("qwen3", 1)):
        model = tiny_model(family)
        attach(model, tiny_adapter(model, window=8, shift=shift), cuda_graphs=True)
        cache = KVCache(model)
        with torch.no_grad():
            model(tokens(1, 30), past_key_values=cache)
            with monkeypatch.context() as patch:
                patch.setattr(cuda, "available", lambda device: True)
                for i in range(2):
                    model(tokens(1, 1, seed=i), past_key_values=cache)
    assert len(rehearsed) == 2


def test_buckets_are_few_and_large_enough():
    sizes = [graphs.bucket(n) for n in range(1, 65)]
    assert all(size >= n for n, size in enumerate(sizes, 1))
    assert sorted(set(sizes)) == [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64]


def test_compiled_pieces_compute_the_same_and_leave_nothing_behind(monkeypatch):
    compiled_code._compiled.cache_clear()
    monkeypatch.setattr(compiled_code, "_inductor", lambda graph, inputs: computed_once(graph))
    model, ids = tiny_model(), tokens(2, 12)
    attach(model)
    attachment = require_attachment(model)
    rotary = modeling_llama.apply_rotary_pos_emb
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        with compiled_code.compiled(model.base_model, attachment.layout.attention):
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


def test_steps_are_captured_with_additions_that_wait_for_norms(monkeypatch):
    """A stand-in for the capture says how it was called, as an error; the step then runs as usual."""

    def recorded(rehearse, run, device, pool):
        raise RuntimeError(f"sums {compiled_code._sums.get()}")

    monkeypatch.setattr(cuda, "available", lambda device: True)
    monkeypatch.setattr(PromptGraphs, "suits", lambda *args: False)
    monkeypatch.setattr(graphs, "recorded", recorded)
    monkeypatch.setattr(graphs, "check_waits", lambda run, device: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    for compiles in (True, False):
        model = tiny_model()
        attach(model, tiny_adapter(model), cuda_graphs=True, compile=compiles)
        with pytest.warns(UserWarning, match=f"without a CUDA graph: sums {compiles}"):
            model.generate(tokens(1, 9), max_new_tokens=4, do_sample=False)
    assert not compiled_code._sums.get()


def test_compiled_pieces_are_gone_after_an_error_and_leave_out_what_is_watched(monkeypatch):
    compiled_code._compiled.cache_clear()
    monkeypatch.setattr(compiled_code, "_inductor", lambda graph, inputs: computed_once(graph))
    model = tiny_model("qwen3")
    layer, seen = model.model.layers[1], []
    layer.mlp.down_proj.register_forward_hook(lambda *args: seen.append(1))
    layer.self_attn.q_norm.register_forward_pre_hook(lambda *args: seen.append(2))
    layer.input_layernorm.forward = layer.input_layernorm.forward
    own = [layer.mlp, layer.self_attn.q_norm]
    rotary = modeling_qwen3.apply_rotary_pos_emb

    def fails():
        with compiled_code.compiled(model.model, attention_of(model)):
            assert not any("forward" in m.__dict__ for m in own)
            assert isinstance(model.model.layers[0].self_attn.q_norm.forward, functools.partial)
            model(tokens(1, 9), use_cache=False)
            raise ZeroDivisionError

    with torch.no_grad(), pytest.raises(ZeroDivisionError):
        fails()
    assert sorted(seen) == [1, 2]
    assert modeling_qwen3.apply_rotary_pos_emb is rotary
    assert [m for m in model.modules() if "forward" in m.__dict__] == [layer.input_layernorm]
    compiled_code._compiled.cache_clear()


def test_a_mixture_of_experts_is_not_compiled():
    model = windowed_model("gpt-oss")
    kinds = {type(m).__name__ for m in model.modules()}
    assert "GptOssMLP" in kinds
    compiles = {type(m).__name__ for m in model.modules() if compiled_code._is_piece(m)}
    assert compiles == {"GptOssRMSNorm"}


def test_threads_that_compile_at_once_do_not_disturb_each_other(monkeypatch):
    calls = []
    monkeypatch.setattr(
        compiled_code,
        "_compiled",
        lambda function, dynamic: lambda *args: calls.append(threading.current_thread().name) or function(*args),
    )
    model, rotary, failed = tiny_model(), modeling_llama.apply_rotary_pos_emb, []
    attention, ids = attention_of(model), tokens(1, 5)
    each = 4 * len(attention) + 1  # two norms, an MLP and a rotary embedding for each layer, and a last norm: compiled

    @torch.no_grad()
    def compiles():
        for turn in range(20):
            before = calls.count(threading.current_thread().name)
            with compiled_code.compiled(model.model, attention, sums=turn % 3 == 0):
                out = model(ids, use_cache=False, output_hidden_states=turn % 3 != 0)
            if any(isinstance(x, Sum) for x in out.hidden_states or ()):
                failed.append("sums in a thread that did not ask for them")
            if calls.count(threading.current_thread().name) - before != each:
                failed.append(calls.count(threading.current_thread().name) - before)

    @torch.no_grad()
    def does_not():
        for _ in range(20):
            model(ids, use_cache=False)

    threads = [threading.Thread(target=target, name=name) for name, target in
               (("one", compiles), ("two", compiles), ("plain", does_not))]  # fmt: skip
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert "plain" not in calls
    assert modeling_llama.apply_rotary_pos_emb is rotary
    assert not any("forward" in m.__dict__ for m in model.modules())
    assert compiled_code._replaced == {}


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_prompts_run_with_compiled_pieces_and_few_tokens_without(monkeypatch, family):
    compiled_code._compiled.cache_clear()
    monkeypatch.setattr(compiled_code, "_inductor", lambda graph, inputs: computed_once(graph))
    monkeypatch.setattr(Attachment, "_compiles", lambda self: not torch.is_grad_enabled())
    model = tiny_model(family)
    attach(model, tiny_adapter(model, window=8), chunk=32)
    ids, entered = tokens(2, 75), []
    with torch.no_grad():
        expected = model(ids).logits
    attach(model, tiny_adapter(model, window=8), chunk=32, cuda_graphs=True, compile=True)
    real = compiled_code._put
    monkeypatch.setattr(compiled_code, "_put", lambda *args: entered.append(args) or real(*args))
    with torch.no_grad():
        cache = KVCache(model)
        got = model(ids, past_key_values=cache).logits
        pieces = len(entered)
        model(ids[:, :1], past_key_values=cache)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    norms = 4 if family == "qwen3" else 2
    assert pieces == 2 * ((norms + 5) * len(model.model.layers) + 2)  # of three chunks the last is of 11 tokens
    assert len(entered) == pieces
    model(ids, past_key_values=KVCache(model))
    assert len(entered) == pieces  # gradients were wanted
    assert not any("forward" in m.__dict__ for m in model.modules() if type(m).__name__.endswith(("Norm", "MLP")))
    compiled_code._compiled.cache_clear()


def test_compiling_needs_graphs():
    with pytest.raises(ConfigError, match="cuda_graphs"):
        attach(tiny_model(), compile=True)
