"""The identity of what a cache holds: it tells models, adapters and settings apart, the same in every process."""

import json
import math
import mmap
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GraniteConfig

from octavo import KVCache, Snapshot, attach, set_swiftkv
from octavo.attachment import require_attachment
from octavo.attachment.identity import (
    BLOCK,
    BLOCKS,
    Digests,
    _in_probes,
    _probed,
    _probes,
    difference,
    digest,
    identity,
    weights,
)
from octavo.errors import CacheStateError
from tiny import SHAPE, tiny_adapter, tiny_model, tokens
from tiny_swift import model_of, pair

TESTS = Path(__file__).parent.parent
LARGE = 1024  # rows and columns of matrices of which a sample is read


def of(model, swiftkv=False):
    attachment = require_attachment(model)
    return identity(attachment, attachment.modes.shape(swiftkv), swiftkv)


def large(layers=6, dtype=torch.bfloat16, seed=0):
    """Matrices as large as real ones in what matters: their spread, and that only a part of each is read."""
    g = torch.Generator().manual_seed(seed)
    module = nn.Module()
    for i in range(layers):
        module.register_parameter(f"w{i}", nn.Parameter((torch.randn(LARGE, LARGE, generator=g) * 0.02).to(dtype)))
        module.register_parameter(f"norm{i}", nn.Parameter(torch.ones(LARGE, dtype=dtype)))
    return module


def merge(weight, rank=4, std=1e-4, seed=1):
    """W + B A, with the typical element of the product at `std`: weights are some 0.02."""
    g = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rank, weight.shape[1], generator=g), torch.randn(weight.shape[0], rank, generator=g)
    return (weight.detach().float() + b @ a * (std / rank**0.5)).to(weight.dtype)


@pytest.mark.parametrize(
    ("shape", "dtype", "whole_probes"),
    [
        ((600, 300), torch.bfloat16, True),
        ((64, 64), torch.float32, True),
        ((4097,), torch.uint8, False),
        ((16,), torch.bfloat16, True),
        ((8192,), torch.int8, True),
        ((8193,), torch.int8, True),
        ((3, 5, 7, 32), torch.float16, True),
        ((), torch.float32, False),
    ],
)
def test_probes_of_another_device_are_what_is_read_here(shape, dtype, whole_probes):
    tensor = torch.randint(0, 100, (2, *shape), generator=torch.Generator().manual_seed(0)).to(dtype)[1]
    assert _in_probes(tensor) == whole_probes
    if whole_probes:
        assert _probes(tensor).flatten().numpy().tobytes() == _probed(tensor)


def test_a_column_that_was_a_row_is_probed_on_another_device(monkeypatch):
    monkeypatch.setattr("octavo.attachment.identity._on_host", lambda tensor: False)
    module, digests = torch.nn.Module(), Digests()
    module.weight = torch.nn.Parameter(torch.arange(4096.0)[None].t())
    assert module.weight.is_contiguous()
    assert module.weight.stride() == (1, 4096)
    before = digests.of("weights", module)
    assert digests.of("weights", module) == before
    module.weight.data[0] = 7.0
    assert digests.of("weights", module) != before


@pytest.mark.parametrize("on_host", [True, False])
@pytest.mark.parametrize("how", ["copied in", "through data", "replaced"])
@pytest.mark.parametrize("std", [1e-6, 1e-4])
def test_a_low_rank_change_of_one_matrix_is_seen(how, std, on_host, monkeypatch):
    monkeypatch.setattr("octavo.attachment.identity._on_host", lambda tensor: on_host)
    module, digests = large(), Digests()
    before, unmerged = digests.of("weights", module), module.w3.detach().clone()
    merged = merge(module.w3, std=std)
    assert 0 < (merged != module.w3).float().mean() < 1
    with torch.no_grad():
        if how == "copied in":
            module.w3.copy_(merged)
        elif how == "through data" and std > 1e-5:  # what no version tells, the probe must see
            module.w3.data[:] = merged
        else:
            module.w3 = nn.Parameter(merged)
    assert digests.of("weights", module) == digest(weights(module).items()) != before
    with torch.no_grad():
        module.w3.copy_(unmerged)
    assert digests.of("weights", module) == before


def test_a_digest_that_still_holds_is_not_made_again(monkeypatch):
    module, digests = large(), Digests()
    first = digests.of("weights", module)
    monkeypatch.setattr("octavo.attachment.identity.digest", None)
    assert digests.of("weights", module) == first


def test_every_small_element_is_read_and_every_name_shape_and_dtype():
    def changed(**tensors):
        plain = {"a": torch.arange(BLOCK * BLOCKS // 4).float(), "b": torch.zeros(3, 4)}
        return digest({**plain, **tensors}.items())

    last = torch.arange(BLOCK * BLOCKS // 4).float()
    last[-1] += 1
    digests = [
        changed(), changed(a=last), changed(b=torch.zeros(4, 3)), changed(b=torch.zeros(3, 4, dtype=torch.int32)),
        changed(c=torch.zeros(0)), digest([("x", torch.zeros(2))]), digest([("y", torch.zeros(2))]),
        digest([("x", torch.zeros(2))], {"scale": 1}), digest([]),
    ]  # fmt: skip
    assert len(set(digests)) == len(digests)
    assert changed(b=torch.zeros(4, 3).T) == digests[0], "how a tensor lies in memory says nothing"


def test_casting_changes_it():
    kinds = torch.bfloat16, torch.float16, torch.float32
    assert len({digest(weights(large(1, dtype)).items()) for dtype in kinds}) == 3
    model = attach(tiny_model())
    before = of(model)
    after = of(model.half())
    assert difference(before, after) == "compute_dtype"
    assert before["weights"] != after["weights"]


def test_buffers_that_follow_from_the_configuration_do_not_count():
    names = weights(attach(tiny_model()).base_model)
    assert not any("inv_freq" in name for name in names)
    assert {"embed_tokens.weight", "norm.weight"} <= set(names)


CHANGES = {
    "weights": lambda: attach(tiny_model(seed=1)),
    "config.rope_parameters": lambda: attach(tiny_model(rope_parameters={"rope_type": "default", "rope_theta": 5e5})),
    "config.rms_norm_eps": lambda: attach(tiny_model(rms_norm_eps=1e-3)),
    "window": lambda: attach(tiny_model(), tiny_adapter(tiny_model())),
    "page_dtype": lambda: attach(tiny_model(), kv_dtype="int8"),
    None: lambda: attach(tiny_model(), chunk=7, page_size=5),
}


@pytest.mark.parametrize("field", CHANGES)
def test_what_makes_other_keys_is_another_identity(field):
    assert difference(of(attach(tiny_model())), of(CHANGES[field]())) == field


def test_adapters_and_modes_are_told_apart():
    def gated(**options):
        return of(attach(tiny_model(), tiny_adapter(tiny_model(), **options)))

    assert difference(gated(), gated()) is None
    assert difference(gated(), gated(window=21)) == "window"
    assert difference(gated(), gated(shift=1)) == "shift"
    assert difference(gated(), gated(rate=0.6)) == "gates"
    model = model_of()
    attach(model, pair(model, 2, True))
    on, off = of(model, True), of(model, False)
    assert on["swiftkv_group"] == 2
    assert off["swiftkv"] is off["gates"] is None
    set_swiftkv(model, False)
    assert of(model, True) == on
    with torch.no_grad():
        require_attachment(model).modes.swiftkv.transform.q[0, 0, 0] += 1
    assert difference(on, of(model, True)) == "swiftkv"


class Lora(nn.Module):
    """A low-rank adapter around a layer, switched on and off and scaled as libraries of adapters do."""

    def __init__(self, base):
        super().__init__()
        self.base, self.a = base, nn.Linear(base.in_features, 4, bias=False)
        self.b = nn.Linear(4, base.out_features, bias=False)
        self.scaling, self._disable_adapters, self._active_adapter = {"default": 2.0}, False, ["default"]

    def forward(self, x):
        return self.base(x) if self._disable_adapters else self.base(x) + self.b(self.a(x)) * self.scaling["default"]


def wrapped():
    model = tiny_model()
    torch.manual_seed(0)
    for layer in model.model.layers:
        layer.self_attn.k_proj = Lora(layer.self_attn.k_proj)
    return attach(model)


@pytest.mark.parametrize(
    "change",
    [{"_disable_adapters": True}, {"scaling": {"default": 1.0}}, {"_active_adapter": ["other"]}],
    ids=["switched off", "scaled", "another active"],
)
def test_an_adapter_that_is_switched_at_run_time_is_another_identity(change):
    model = wrapped()
    before, lora = of(model), model.model.layers[2].self_attn.k_proj
    held = {name: getattr(lora, name) for name in change}
    lora.__dict__.update(change)
    assert difference(before, of(model)) == "modules"
    lora.__dict__.update(held)
    assert of(model) == before


def test_settings_that_modules_hold_count_and_their_passing_states_do_not():
    model = attach(tiny_model())
    before = of(model)
    model.train().requires_grad_(False)
    model.model.gradient_checkpointing = True
    model.model.layers[0].mlp.register_forward_hook(lambda *a: None)
    model.config._name_or_path, model.config.use_cache = "elsewhere", False
    assert of(model) == before
    model.model.layers[1].self_attn.scaling *= 2
    assert difference(before, of(model)) == "modules"


@pytest.mark.parametrize("name", ["residual_multiplier", "attention_multiplier", "embedding_multiplier"])
def test_any_number_of_the_configuration_counts(name):
    def granite(**changes):
        torch.manual_seed(0)
        return of(attach(AutoModelForCausalLM.from_config(GraniteConfig(**SHAPE, **changes))))

    assert difference(granite(), granite(**{name: 0.22})) == f"config.{name}"


@pytest.mark.parametrize("rows", [slice(3, None), slice(500, 800), slice(0, 200)])
def test_many_rows_that_were_written_through_data_are_seen(rows):
    module, digests = large(2), Digests()
    before = digests.of("weights", module)
    module.w1.data[rows] *= 1.5
    assert digests.of("weights", module) == digest(weights(module).items()) != before


def test_a_snapshot_of_another_format_of_identity_says_so():
    model, cache = attach(tiny_model()), None
    cache = KVCache(model)
    with torch.no_grad():
        model(tokens(1, 20), past_key_values=cache)
    snapshot = cache.snapshot()
    older = Snapshot(**{**vars(snapshot), "identity": {**snapshot.identity, "format": 1}})
    with pytest.raises(CacheStateError, match="in format 1, and this version of Octavo knows format 2; read its text"):
        KVCache.restore(model, older)


def test_it_is_the_same_in_another_process():
    code = (
        "import sys, json; sys.path[:0] = [sys.argv[1]]\n"
        "from tiny_swift import model_of, pair\nfrom octavo import attach\n"
        "from attachment.test_identity import of, large, digest, weights\n"
        "model = model_of(); attach(model, pair(model, 2, True))\n"
        "print(json.dumps([of(model, True), digest(weights(large()).items())]))"
    )
    out = subprocess.run([sys.executable, "-c", code, str(TESTS)], capture_output=True, text=True, check=True)
    model = model_of()
    attach(model, pair(model, 2, True))
    assert json.loads(out.stdout) == [of(model, True), digest(weights(large()).items())]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_it_is_the_same_on_a_gpu():
    module = large()
    assert digest(weights(module).items()) == digest(weights(module.cuda()).items())
    model = attach(tiny_model(), tiny_adapter(tiny_model()))
    before = of(model)
    assert of(model.cuda()) == before


def mapped(path):
    """Tensors as Llama 3.1 8B has them, over one file of zeros that takes no room on the disk."""
    hidden, kv, mlp = 4096, 1024, 14336
    layer = {"q": (hidden, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, hidden), "n1": (hidden,)}
    layer |= {"gate": (mlp, hidden), "up": (mlp, hidden), "down": (hidden, mlp), "n2": (hidden,)}
    shapes = {"embed": (128256, hidden), "norm": (hidden,)}
    shapes |= {f"{name}{i}": shape for i in range(32) for name, shape in layer.items()}
    sizes = [math.prod(shape) for shape in shapes.values()]
    with path.open("wb") as file:
        file.truncate(2 * sum(sizes))
    with path.open("r+b") as file:
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    memory.madvise(mmap.MADV_RANDOM)  # a file that a model was loaded from is in memory; this one is not to be read
    module, parts = nn.Module(), torch.frombuffer(memory, dtype=torch.bfloat16).split(sizes)
    for part, (name, shape) in zip(parts, shapes.items(), strict=True):
        module.register_buffer(name, part.view(shape))
    return module


def test_an_8b_model_takes_a_moment(tmp_path):
    module, known = mapped(tmp_path / "weights"), Digests()
    first = timed(known, module)
    anew, again = min(timed(Digests(), module) for _ in range(3)), min(timed(known, module) for _ in range(3))
    print(f"{first:.3f} s from a mapped file, {anew:.3f} s from memory, {again:.4f} s where nothing changed")
    assert anew < 0.3
    assert again < 0.05


def test_the_settings_of_the_modules_of_a_deep_model_take_milliseconds():
    model, took = attach(tiny_model(num_hidden_layers=32)), []
    for _ in range(5):
        began = time.perf_counter()
        of(model)
        took.append(time.perf_counter() - began)
    print(f"{took[0]:.4f} s at first, {min(took):.4f} s afterwards")
    assert min(took) < 0.03


def timed(digests, module):
    began = time.perf_counter()
    digests.of("weights", module)
    return time.perf_counter() - began
