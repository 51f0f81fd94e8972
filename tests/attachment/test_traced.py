"""`torch.compile` and `torch.export` of attached models: the same answers, or a refusal that says why."""

import pytest
import torch

from octavo import KVCache, attach, detach
from octavo.errors import UnsupportedModelError
from tiny import tiny_adapter, tiny_model, tokens
from tiny_decoders import tiny_decoder
from tiny_pictures import PICTURE, picture_model
from tiny_swift import model_of, pair
from tiny_windows import windowed_model

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]
CLOSE = {"rtol": 0, "atol": 1e-4}
MODELS = {
    "llama": lambda: tiny_model(num_hidden_layers=1),
    "windows, caps": lambda: windowed_model("gemma2"),
    "chunked windows": lambda: tiny_decoder("llama4_text"),
    "sinks": lambda: windowed_model("gpt-oss"),
    "learned positions": lambda: tiny_decoder("gpt2"),
    "swiftkv": model_of,
}


@pytest.fixture(autouse=True)
def _anew():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def made(kind, gates):
    model = MODELS[kind]()
    if kind == "swiftkv":
        return attach(model, pair(model, 1, True, window=6), chunk=16)
    return attach(model, tiny_adapter(model, window=6) if gates else None, chunk=16)


def inputs(kind):
    """Two rows, padded, packed or neither."""
    ids = tokens(2, 40)
    if kind == "packed":
        return {"input_ids": ids, "position_ids": torch.cat([torch.arange(n) for n in (11, 29)]).expand(2, -1)}
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[0, :7] = 0
    return {"input_ids": ids, **({"attention_mask": mask} if kind == "padded" else {})}


@pytest.mark.parametrize("gates", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_a_compiled_forward_without_a_cache_is_one_graph_and_the_same(kind, gates, full):
    if not full and (kind != "llama" or not gates):
        pytest.skip("each takes seconds")
    model = made(kind, gates)
    compiled = torch.compile(model.forward, fullgraph=True, backend="eager")
    with torch.no_grad():
        for each in ("plain", "padded", "packed"):
            given = inputs(each)
            real = given.get("attention_mask", torch.ones(2, 40)).bool()
            expected = model(**given, use_cache=False).logits[real]
            torch.testing.assert_close(compiled(**given, use_cache=False).logits[real], expected, **CLOSE)


@pytest.mark.parametrize("kind", ["llama", "windows, caps"])
def test_gradients_go_through_a_compiled_forward(kind, full):
    if not full and kind != "llama":
        pytest.skip("each takes seconds")
    model, ids = made(kind, gates=True).train(), tokens(2, 30)
    compiled, found = torch.compile(model, fullgraph=True, backend="aot_eager"), []
    for forward in (model, compiled):
        model.zero_grad()
        loss = forward(ids, labels=ids).loss
        loss.backward()
        found.append([loss, *(p.grad.clone() for p in model.parameters())])
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, **CLOSE)


def test_a_compiled_forward_with_a_cache_breaks_its_graph_and_is_the_same():
    model, ids = made("llama", gates=True), tokens(2, 40)
    compiled, cache = torch.compile(model.forward, backend="eager"), KVCache(model)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        got = [compiled(ids[:, :30], past_key_values=cache).logits]
        got += [compiled(ids[:, i : i + 1], past_key_values=cache).logits for i in range(30, 40)]
        torch.testing.assert_close(torch.cat(got, 1), expected, **CLOSE)
        torch.testing.assert_close(compiled(ids).logits, expected, **CLOSE)
        whole = torch.compile(model.forward, backend="eager", fullgraph=True)
        with pytest.raises(torch._dynamo.exc.Unsupported, match="Octavo takes and frees pages on the host"):
            whole(ids, past_key_values=KVCache(model))


def test_what_was_compiled_first_is_attached_at_the_model_inside():
    model, ids = tiny_model(num_hidden_layers=1), tokens(2, 40)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        plain = compiled(ids, use_cache=False).logits
        assert attach(compiled, tiny_adapter(model, window=6), chunk=16) is compiled
        hard = model(ids, use_cache=False).logits
        assert (hard - plain).abs().max() > 0.01
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, hard, **CLOSE)
        torch.testing.assert_close(compiled(ids, past_key_values=KVCache(compiled)).logits, hard, **CLOSE)
        detach(compiled)
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, plain, **CLOSE)


def test_layers_that_pass_nothing_on_run_as_they_are():
    model, ids = tiny_decoder("stablelm"), tokens(2, 30)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        compiled = torch.compile(attach(model), backend="eager")
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, expected, **CLOSE)
        with pytest.raises(UnsupportedModelError, match="its layers drop what Octavo tells them"):
            torch.export.export(model, (), {"input_ids": ids, "use_cache": False})


def test_a_model_that_reads_pictures_is_compiled_around_its_language_model():
    model, ids = picture_model("qwen2.5"), tokens(2, 30) % PICTURE
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        compiled = torch.compile(attach(model, chunk=16), backend="eager")
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, expected, **CLOSE)
        torch.testing.assert_close(compiled(ids).logits, expected, **CLOSE)


@pytest.mark.parametrize("gates", [False, True])
def test_a_forward_without_a_cache_can_be_exported_for_any_length(gates):
    model, ids = made("llama", gates), tokens(2, 40)
    shapes = {"input_ids": {1: torch.export.Dim("N", min=2, max=500)}, "use_cache": None}
    given = {"input_ids": ids, "use_cache": False}
    with torch.no_grad():
        program = torch.export.export(model, (), given, dynamic_shapes=shapes, strict=False)
        for length in (40, 77):
            given = {"input_ids": tokens(2, length), "use_cache": False}
            torch.testing.assert_close(program.module()(**given).logits, model(**given).logits, **CLOSE)


def test_what_cannot_be_exported_is_refused():
    model, given = made("llama", gates=True), {"input_ids": tokens(2, 40)}
    with pytest.raises(UnsupportedModelError, match=r"with a cache: Octavo takes and frees pages.*use_cache=False"):
        torch.export.export(model, (), given, strict=False)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="pass strict=False"):
        torch.export.export(model, (), {**given, "use_cache": False}, strict=True)
    program = torch.export.export(attach(model), (), {**given, "use_cache": False}, strict=True)
    with torch.no_grad():
        expected = model(**given, use_cache=False).logits
        torch.testing.assert_close(program.module()(**given, use_cache=False).logits, expected, **CLOSE)


def test_inductor_answers_the_same(full):
    if not full:
        pytest.skip("it compiles for a minute")
    model, ids = made("llama", gates=True), tokens(2, 40)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        got = torch.compile(model.forward, fullgraph=True)(ids, use_cache=False).logits
    torch.testing.assert_close(got, expected, **CLOSE)
