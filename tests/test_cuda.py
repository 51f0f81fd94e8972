"""The identities on a GPU: FlexAttention's mask, the torch path over pages, and the CPU agree."""

import pytest
import torch

from octavo import KVCache, ReuseStore, attach
from octavo.attachment import prompt_graphs, require_attachment
from octavo.dms import SoftGates
from octavo.engine import Engine, SamplingParams
from octavo.kv import hosted
from octavo.swiftkv import initial
from tiny import check_answers, feed, in_pieces, tiny_adapter, tiny_model, tokens
from tiny_swift import LAYERS, full, model_of, pair, swiftkv_for

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("chunk", [7, 64, 512])
def test_eviction_on_the_gpu_is_the_mask_and_the_cpu(chunk, shift):
    model = tiny_model()
    adapter = tiny_adapter(model, shift=shift)
    ids = tokens(2, 300)
    attach(model, adapter)
    with torch.no_grad():
        on_cpu = model(ids, use_cache=False).logits
    model.cuda()
    adapter.gates.cuda()
    attach(model, adapter, chunk=chunk)
    with torch.no_grad():
        masked = model(ids.cuda(), use_cache=False).logits.cpu()
    paged, cache = feed(model, ids.cuda(), 280)
    torch.testing.assert_close(masked, on_cpu, rtol=0, atol=2e-3)
    torch.testing.assert_close(paged.cpu(), on_cpu, rtol=0, atol=2e-3)
    assert cache.memory.pool.pages.key.is_cuda


@pytest.mark.parametrize("before", [0, 40])
@pytest.mark.parametrize("evict", [False, True])
@pytest.mark.parametrize("chunk", [64, 512])
def test_skipping_prefill_on_the_gpu_is_the_full_forward(chunk, evict, before):
    model, ids = model_of(), tokens(2, 230).cuda()
    adapters = pair(model, 2, evict, before=before)
    attach(model.cuda(), adapters, chunk=chunk)
    expected, cache = full(model, ids), KVCache(model)
    with torch.no_grad():
        parts = [model(ids[:, :200], past_key_values=cache, logits_to_keep=3).logits[:, -3:]]
        parts += [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(200, 230)]
    torch.testing.assert_close(torch.cat(parts, 1), expected[:, 197:], rtol=0, atol=2e-3)


def test_a_transform_begins_with_the_same_numbers_where_tensors_are_made_on_the_gpu():
    model = model_of()
    expected = initial(model, 2, before=40).hand
    with torch.device("cuda"):
        found = initial(model.cuda(), 2, before=40).hand
    assert found.is_cuda
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=0)


def test_packed_documents_on_the_gpu_are_those_of_the_cpu():
    model, ids = model_of(), tokens(2, 128)
    transform = swiftkv_for(model).transform
    document = torch.arange(128).expand(2, -1).div(torch.tensor([[50], [37]]), rounding_mode="floor").int()
    positions = torch.arange(128).expand(2, -1) % torch.tensor([[50], [37]])
    out = []
    for device in ("cpu", "cuda"):
        attach(model.to(device))
        run = require_attachment(model).run_layers
        options = {"transform": transform.to(device), "document": document.to(device)}
        with torch.no_grad():
            embedded = model.model.embed_tokens(ids.to(device))
            out.append(run(embedded, 0, LAYERS, positions.to(device), **options)[-1].cpu())
    torch.testing.assert_close(out[1], out[0], rtol=0, atol=2e-2 * out[0].abs().max().item())


def test_left_padded_generate_is_token_for_token_the_same():
    model, ids = tiny_model().cuda(), tokens(3, 40).cuda()
    mask = torch.ones_like(ids)
    mask[0, :13] = 0
    options = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 20}
    expected = model.generate(ids, **options)
    assert torch.equal(attach(model, chunk=16).generate(ids, **options), expected)
    assert torch.equal(attach(model).generate(ids, **options), expected)
    assert require_attachment(model).settings.chunk == 8192


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo of torch 2.11 looks at every tensor's
def test_gradients_through_flex_are_those_of_the_cpu():
    model = tiny_model().requires_grad_(False)
    adapter, ids, grads = tiny_adapter(model), tokens(2, 256), []
    direction = torch.randn(2, 256, 96, generator=torch.Generator().manual_seed(0))
    for device in ("cpu", "cuda"):
        model.to(device)
        gates = adapter.gates.to(device)
        gates.zero_grad()
        attach(model)
        with require_attachment(model).using(SoftGates(gates, 1.0, None)):
            out = model.model(ids.to(device), use_cache=False).last_hidden_state
        (out * direction.to(device)).sum().backward()
        grads.append(gates.weight.grad.cpu().clone())
    torch.testing.assert_close(grads[1], grads[0], rtol=2e-2, atol=2e-2 * grads[0].abs().max().item())


def prefilled(model, ids, copies):
    """As many equal caches that have read all of `ids` but the last token, and the logits of no more."""
    caches = [KVCache(model) for _ in range(copies)]
    with torch.no_grad():
        for cache in caches:
            model(ids[:, :-1], past_key_values=cache, logits_to_keep=1)
    return caches


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize(("evict", "shift"), [(False, 0), (True, 0), (True, 1)])
def test_a_decode_step_never_waits_for_the_device(evict, shift):
    model, ids = tiny_model().cuda(), tokens(2, 90).cuda()
    attach(model, tiny_adapter(model, shift=shift) if evict else None)
    (cache,) = prefilled(model, ids, 1)
    token = ids[:, -1:]
    with torch.no_grad():
        try:
            for i in range(60):
                if i == 4:  # the first steps load kernels, which waits
                    torch.cuda.set_sync_debug_mode("error")
                position = torch.full_like(token, 89 + i)
                token = model(token, position_ids=position, past_key_values=cache).logits[:, -1:].argmax(-1)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert cache.seen == 149


@pytest.mark.parametrize(("evict", "shift"), [(False, 0), (True, 0), (True, 1)])
def test_a_decode_step_in_a_cuda_graph_replayed_500_times_is_eager(evict, shift):
    model, ids = tiny_model().cuda(), tokens(2, 90).cuda()
    attach(model, tiny_adapter(model, shift=shift) if evict else None)
    eager, captured = prefilled(model, ids, 2)
    token, position = ids[:, -1:].clone(), torch.full((2, 1), 89, device="cuda")
    out = torch.zeros(2, 1, model.config.vocab_size, device="cuda")
    found, expected = [], []
    with torch.no_grad():

        def step(cache):
            out.copy_(model(token, position_ids=position, past_key_values=cache).logits)
            token.copy_(out.argmax(-1))
            position.add_(1)

        captured.reserve(600)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step(captured)
                found.append((token.clone(), out.clone()))
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step(captured)
        for _ in range(500):
            graph.replay()
            found.append((token.clone(), out.clone()))
        captured.replayed(500)
        for _ in range(10):  # and eager again
            step(captured)
            found.append((token.clone(), out.clone()))
        token.copy_(ids[:, -1:])
        position.fill_(89)
        for _ in range(513):
            step(eager)
            expected.append((token.clone(), out.clone()))
    for (a, x), (b, y) in zip(found, expected, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(x, y, rtol=0, atol=1e-3)
    assert captured.seen == eager.seen == 602
    assert torch.equal(captured.kept, eager.kept)
    assert captured.nbytes <= eager.nbytes * 1.1


def evicting(shift=0, **settings):
    model = tiny_model().cuda()
    adapter = tiny_adapter(model, shift=shift)
    return attach(model, adapter, **settings)


@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")  # torch.compile says so of float32
@pytest.mark.parametrize(("shift", "kv_dtype"), [(0, None), (1, None), (0, "int8")])
def test_decode_steps_from_graphs_answer_as_eager_ones(shift, kv_dtype):
    ids = tokens(3, 60).cuda()
    mask = torch.ones_like(ids)
    mask[0, :13] = 0
    options = {"do_sample": False, "max_new_tokens": 80, "min_new_tokens": 80}
    answers = []
    for graphs, compiles in ((False, False), (True, False), (True, True)):
        model = evicting(shift, kv_dtype=kv_dtype, cuda_graphs=graphs, compile=compiles)
        answers.append([
            model.generate(ids[:1], **options),
            model.generate(ids, **options),
            model.generate(ids, attention_mask=mask, **options),
            model.generate(ids[:1], **options),  # the first graph again, with rows of other sequences
        ])  # fmt: skip
        kinds = require_attachment(model).graphs
        assert (kinds is not None and len(kinds._captured) == 2) == graphs
    for eager, replayed, compiled in zip(*answers, strict=True):
        assert torch.equal(eager, replayed)
        assert torch.equal(eager, compiled)


def prompt_in_pieces(model, ids, pieces, mask=None):
    """(logits of all real tokens, visible slots) after some pieces of a prompt."""
    logits, cache = in_pieces(model, ids, pieces, mask)
    return logits if mask is None else logits[mask[:, : sum(pieces)].bool()], cache.kept


@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("evict", "kv_dtype"), [(False, None), (True, None), (True, "int8")])
def test_prompts_from_graphs_are_those_of_the_model(evict, kv_dtype, padded):
    mask = torch.ones(2, 700, dtype=torch.int64, device="cuda")
    mask[0, :30] = 0
    found = {}
    for graphs, compiles in ((False, False), (True, False), (True, True)):
        model = tiny_model().cuda()
        adapter = tiny_adapter(model) if evict else None
        attach(model, adapter, kv_dtype=kv_dtype, cuda_graphs=graphs, compile=compiles)
        for turn in range(6):
            for length in (90, 333):
                ids = tokens(2, length + 260, seed=turn).cuda()
                pieces = [length, 200, 1, 1, 1, 57]
                found.setdefault((turn, length), []).append(
                    prompt_in_pieces(model, ids, pieces, mask if padded else None)
                )
        if graphs:
            captured = require_attachment(model).prompts._captured
            assert {(columns, goes_on) for _, columns, _, goes_on, *_ in captured} >= {
                (96, False),
                (384, False),
                (224, True),
            }
    for (expected, kept), *others in found.values():
        for got, left in others:
            differ = (got - expected).abs().amax(-1)
            if kv_dtype:  # where a code rounds otherwise, a gate may decide otherwise: a few tokens see another slot
                assert (differ > 2e-3).float().mean() <= 0.1
                assert differ.max() <= 0.2
                assert (left - kept).abs().max() <= 2
            else:
                assert differ.max() <= 2e-3
                assert torch.equal(left, kept)


@pytest.mark.parametrize("before", [0, 40])
def test_skipping_prompts_and_steps_from_graphs_are_the_full_forward(before):
    model = model_of()
    adapters = pair(model, 2, True, before=before)
    attach(model.cuda(), adapters, cuda_graphs=True)
    for turn in range(6):
        ids, cache = tokens(2, 230, seed=turn).cuda(), KVCache(model)
        expected = full(model, ids)
        with torch.no_grad():
            parts = [model(ids[:, :200], past_key_values=cache, logits_to_keep=1).logits[:, -1:]]
            parts += [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(200, 230)]
        torch.testing.assert_close(torch.cat(parts, 1), expected[:, 199:], rtol=0, atol=2e-3)
    assert [kind[2] for kind in require_attachment(model).prompts._captured] == [1]


def test_places_for_longer_prompts_drop_the_graphs_of_shorter_ones(monkeypatch):
    monkeypatch.setattr(prompt_graphs, "SMALLEST", 1)
    model, found = evicting(cuda_graphs=True), {}
    for _ in range(2):  # the second time from graphs that were captured anew
        for length in (30, 60, 200, 40, 400, 60):
            for turn in range(4):
                ids = tokens(1, length, seed=turn).cuda()
                found.setdefault((length, turn), []).append(in_pieces(model, ids, [length])[0])
    assert {kind[1] for kind in require_attachment(model).prompts._captured} >= {40, 64, 448}
    for first, *others in found.values():
        for got in others:
            torch.testing.assert_close(got, first, rtol=0, atol=2e-3)


def test_a_model_that_asks_the_device_runs_without_graphs():
    model, ids, asked = evicting(cuda_graphs=True), tokens(1, 90).cuda(), []
    hook = model.model.layers[1].mlp.register_forward_hook(lambda module, args, out: asked.append(bool(out.sum() > 0)))
    first, kept = prompt_in_pieces(model, ids, [90])
    options = {"max_new_tokens": 4, "min_new_tokens": 4}
    with pytest.warns(UserWarning, match="asks the device"):
        others = [prompt_in_pieces(model, ids, [90]) for _ in range(3)]
    with pytest.warns(UserWarning, match="asks the device"):  # decode steps
        answer = model.generate(ids, do_sample=False, **options)
    others.append(prompt_in_pieces(model, ids, [90]))
    for got, left in others:
        torch.testing.assert_close(got, first, rtol=0, atol=1e-5)
        assert torch.equal(left, kept)
    assert require_attachment(model).prompts._captured == {}
    assert torch.equal(answer, model.generate(ids, do_sample=False, **options))
    assert model.generate(ids, do_sample=True, **options).shape == (1, 94)  # the device is as it was
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    hook.remove()
    for _ in range(3):
        in_pieces(model, ids, [70])
    assert len(require_attachment(model).prompts._captured) == 1


def test_a_graph_is_captured_anew_where_parameters_have_moved():
    model, ids = evicting(cuda_graphs=True), tokens(1, 40).cuda()
    options = {"do_sample": False, "max_new_tokens": 20, "min_new_tokens": 20}
    model.generate(ids, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = parameter.data * 1.01
    got, plain = model.generate(ids, **options), evicting()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.data = parameter.data * 1.01
    assert torch.equal(got, plain.generate(ids, **options))


@pytest.mark.parametrize("at_once", [False, True])
def test_the_engine_on_the_gpu_answers_as_generate(at_once):
    model = evicting(cuda_graphs=True)
    engine, requests = Engine(model, max_batch=4, step_tokens=400 if at_once else 64), []
    for i in range(9):
        params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=5 + 7 * i)
        requests.append(engine.add(tokens(1, 10 + 13 * i, i)[0].tolist(), params))
        if not at_once:  # else prompts of about one length are read in one forward
            engine.step()
    engine.step()
    engine.preempt(requests[1])
    while engine.unfinished:
        engine.step()
    check_answers(model, requests)


@pytest.mark.parametrize("small", [0, hosted.SMALL])
@pytest.mark.parametrize("shift", [0, 1])
def test_what_a_store_restores_on_the_gpu_is_what_is_computed(shift, small, tmp_path, monkeypatch):
    """Boundaries lie within chunks, in memory and on disk; copies on the host are ordinary ones, or known to CUDA."""
    monkeypatch.setattr(hosted, "SMALL", small)
    store = ReuseStore("20MB", tmp_path, shortest=8, back=24)
    plain, model = evicting(shift, chunk=512), evicting(shift, chunk=512, reuse=store)
    options = {"do_sample": False, "max_new_tokens": 9, "output_logits": True, "return_dict_in_generate": True}
    stem = tokens(1, 150)[0]
    for i, keep in enumerate([150, 150, 90, 90, 140, 30, 150]):
        ids = torch.cat([stem[:keep], tokens(1, 5 + 9 * i, seed=i)[0]])[None].cuda()
        expected, got = plain.generate(ids, **options), model.generate(ids, **options)
        assert torch.equal(got.sequences, expected.sequences)
        torch.testing.assert_close(torch.stack(got.logits), torch.stack(expected.logits), atol=1e-4, rtol=1e-4)
        if i == 4:
            store.flush()
            store.close()
            store = ReuseStore("20MB", tmp_path, shortest=8, back=24)
            require_attachment(model).reuse = store
    assert store.stats().reused > 0
