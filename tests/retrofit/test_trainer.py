"""A run learns, stops and goes on bit for bit, whatever the micro-batch and the number of processes."""

import json
import math
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from octavo import attach, load_adapter, save_published
from octavo.attachment import attachment_of
from octavo.errors import ConfigError, RetrofitError, RetrofitInterrupted
from octavo.retrofit.checkpoint import CHECKPOINT, LOG
from octavo.retrofit.data import Source
from octavo.retrofit.settings import GateSettings, RetrofitSettings, SwiftSettings
from octavo.retrofit.trainer import Retrofit

GATES = GateSettings(target=3, window=8, lr=1e-3)
SETTINGS = RetrofitSettings(GATES, steps=6, batch=2, micro_batch=2, length=96, recall=0.0, checkpoint_every=2)
FASTER = replace(SETTINGS, gates=replace(GATES, lr=3e-3))


def run(student, tokenizer, source, folder, settings=SETTINGS, **options):
    out = Retrofit(student, tokenizer, [source], settings, folder, **options)
    out.run()
    return out


def test_the_target_is_approached_and_everything_is_written(student, tokenizer, source, tmp_path):
    before = [p.clone() for p in student.parameters()]
    trained = run(student, tokenizer, source, tmp_path, replace(FASTER, steps=30, recall=0.3))
    log = [json.loads(line) for line in (tmp_path / LOG).read_text().splitlines()]
    assert [entry["step"] for entry in log] == list(range(1, 31))
    assert log[-1]["ratio"] > 2 > log[0]["ratio"]
    assert log[-1]["kl"] > 0
    assert all(torch.equal(a, b) for a, b in zip(before, student.parameters(), strict=True)), "the model is frozen"
    assert all(p.requires_grad for p in student.parameters())
    assert attachment_of(student) is None
    assert log[-1]["loss"] == pytest.approx(log[-1]["kl"] + log[-1]["missing"])
    assert log[-1]["mse"] is None
    (adapter,) = trained.adapters("mine")
    attach(student, adapter)
    assert adapter.card["settings"]["gates"]["target"] == 3
    assert torch.equal(adapter.gates.input_scale, torch.ones(2, 1)), "files hold the folded weight"


def test_marks_may_be_read_one_token_later(student, tokenizer, source, tmp_path):
    """As NVIDIA's layout has it, so that what is trained here can be written in it."""
    settings = replace(SETTINGS, gates=replace(GATES, shift=1), steps=2)
    trained = run(student, tokenizer, source, tmp_path / "run", settings)
    (adapter,) = trained.adapters("mine")
    assert adapter.gates.spec.eviction.shift == 1
    save_published(student, adapter, tmp_path / "out")
    written = load_adapter(tmp_path / "out").gates
    assert written.spec == adapter.gates.spec
    assert torch.equal(written.weight, adapter.gates.weight)
    with pytest.raises(ConfigError, match="shift must be 0 or 1, not 2"):
        replace(GATES, shift=2)


def test_exercises_are_drawn_and_named_on_the_card(student, tokenizer, source, tmp_path):
    settings = replace(SETTINGS, steps=2, length=400, exercises=1.0)
    trained = run(student, tokenizer, source, tmp_path, settings)
    drawn = trained._rows(0).tokens
    assert drawn.shape == (2, 400)
    assert not torch.equal(drawn, Retrofit(student, tokenizer, [source], SETTINGS, tmp_path)._rows(0).tokens)
    assert not torch.isin(drawn, torch.from_numpy(source.tokens.astype(int))).all(), "not the text as it stands"
    assert trained.adapters("mine")[0].card["settings"]["exercises"] == 1.0


def test_resume_continues_bit_for_bit(student, tokenizer, source, tmp_path):
    settings = replace(SETTINGS, recall=0.5)
    whole = run(student, tokenizer, source, tmp_path / "whole", settings)
    part = Retrofit(student, tokenizer, [source], settings, tmp_path / "part")

    def stop(report):
        if report.step == 3:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(RetrofitInterrupted, match=r"after step 3 of 6.*--resume"):
        part.run(stop)
    again = Retrofit(student, tokenizer, [source], settings, tmp_path / "part")
    again.resume()
    assert again.step == 3
    again.run()
    for a, b in zip(whole.gates.state_dict().values(), again.gates.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    logs = [(tmp_path / name / LOG).read_text().splitlines() for name in ("whole", "part")]
    strip = [[{**json.loads(line), "seconds": 0} for line in log] for log in logs]
    assert strip[0] == strip[1]


@pytest.mark.parametrize("place", ["forward", "after the optimiser"])
def test_an_interrupt_within_a_step_waits_for_its_end(place, student, tokenizer, source, tmp_path):
    part = Retrofit(student, tokenizer, [source], SETTINGS, tmp_path)
    handler, calls = signal.getsignal(signal.SIGINT), []

    def hook(*_):
        calls.append(1)
        if len(calls) == (8 if place == "forward" else 2):
            signal.raise_signal(signal.SIGINT)

    if place == "forward":
        handle = student.model.layers[1].mlp.register_forward_pre_hook(hook)
    else:
        handle = part.optimizer.register_step_post_hook(hook)
    with pytest.raises(RetrofitInterrupted):
        part.run()
    handle.remove()
    assert attachment_of(student) is None
    assert signal.getsignal(signal.SIGINT) is handler
    again = Retrofit(student, tokenizer, [source], SETTINGS, tmp_path)
    again.resume()
    assert 0 < again.step < 6
    again.run()
    whole = run(student, tokenizer, source, tmp_path / "whole")
    assert torch.equal(whole.gates.weight, again.gates.weight)


def test_the_second_interrupt_stops_at_once_and_saves_nothing(student, tokenizer, source, tmp_path):
    part = Retrofit(student, tokenizer, [source], SETTINGS, tmp_path)
    handler = signal.getsignal(signal.SIGINT)
    part.optimizer.register_step_post_hook(lambda *_: [signal.raise_signal(signal.SIGINT) for _ in range(2)])
    with pytest.raises(KeyboardInterrupt):
        part.run()
    assert part.step == 0
    assert not (tmp_path / CHECKPOINT).exists()
    assert attachment_of(student) is None
    assert signal.getsignal(signal.SIGINT) is handler


def test_an_unfinished_run_is_not_thrown_away(student, tokenizer, source, tmp_path):
    def stop(report):
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(RetrofitInterrupted):
        Retrofit(student, tokenizer, [source], SETTINGS, tmp_path).run(stop)
    with pytest.raises(RetrofitError, match="step 1 of 6; give --resume"):
        Retrofit(student, tokenizer, [source], SETTINGS, tmp_path).run()
    again = Retrofit(student, tokenizer, [source], SETTINGS, tmp_path)
    again.resume()
    again.run()
    run(student, tokenizer, source, tmp_path, replace(SETTINGS, steps=1))  # a finished one may be done again


def test_weights_that_are_not_finite_are_never_saved(student, tokenizer, source, tmp_path):
    part = Retrofit(student, tokenizer, [source], replace(SETTINGS, steps=1), tmp_path)
    part.optimizer.register_step_post_hook(lambda *_: part.gates.bias.data.fill_(float("nan")))
    with pytest.raises(RetrofitError, match=r"not finite after step 1.*another folder with a lower lr"):
        part.run()
    assert not (tmp_path / CHECKPOINT).exists()
    with torch.no_grad():
        student.model.norm.weight.fill_(float("nan"))
    with pytest.raises(RetrofitError, match=r"loss is not finite at step 1; begin again in another folder"):
        run(student, tokenizer, source, tmp_path)


def test_text_must_fit_the_model(student, tokenizer, source, tmp_path):
    with pytest.raises(ConfigError, match="length 1025 is past the model's 1024 positions"):
        Retrofit(student, tokenizer, [source], replace(SETTINGS, length=1025), tmp_path)
    strange = Source("strange", np.full(200, 49152, np.uint16), None, 1.0)
    with pytest.raises(ConfigError, match="strange holds token 49152, but the model knows 49152 tokens"):
        Retrofit(student, tokenizer, [source, strange], SETTINGS, tmp_path)


def test_cards_keep_every_source_and_their_own_start(student, tokenizer, source, tmp_path):
    first = run(student, tokenizer, source, tmp_path, replace(SETTINGS, steps=1)).adapters("first")[0]
    settings = replace(SETTINGS, swiftkv=SwiftSettings(1))
    joint = Retrofit(student, tokenizer, [source, replace(source, share=0.5)], settings, tmp_path, init=[first])
    swiftkv, gates = joint.adapters("both")
    assert (swiftkv.card["init"], gates.card["init"]) == (None, "first")
    assert swiftkv.card["data"] == {"random": 1.0, "random (2)": 0.5}


def test_micro_batches_only_split_the_work(student, tokenizer, source, tmp_path):
    """Without noise the gradient of a batch is the mean over its micro-batches."""
    gates = []
    for micro in (1, 2):
        settings = replace(SETTINGS, batch=4, micro_batch=micro, steps=1)
        part = Retrofit(student, tokenizer, [source], settings, tmp_path / str(micro))
        with torch.no_grad():
            part.gates.bias.fill_(0.05)
        part.noise = False
        part.run()
        gates.append(part.gates.weight.detach().clone())
    torch.testing.assert_close(gates[0], gates[1], rtol=1e-3, atol=1e-5)


def test_init_starts_from_an_adapter(student, tokenizer, source, tmp_path):
    first = run(student, tokenizer, source, tmp_path / "a", replace(FASTER, steps=12)).adapters("first")[0]
    settings = replace(SETTINGS, gates=replace(GATES, target=6, lr=1e-9))
    second = Retrofit(student, tokenizer, [source], settings, tmp_path / "b", init=[first])
    second.run()
    assert (first.card["init"], second.adapters("second")[0].card["init"]) == (None, "first")
    hidden = torch.randn(1, 20, 32)
    torch.testing.assert_close(second.gates.logits(0, hidden), first.gates.logits(0, hidden), rtol=1e-3, atol=1e-3)
    assert json.loads((tmp_path / "b" / LOG).read_text().splitlines()[0])["target"] > 3
    wider = replace(SETTINGS, gates=replace(GATES, window=9))
    third = Retrofit(student, tokenizer, [source], wider, tmp_path / "c", init=[first])
    assert third.gates.spec.eviction.window == 9
    torch.testing.assert_close(third.gates.logits(0, hidden), first.gates.logits(0, hidden))
    more = Retrofit(student, tokenizer, [source], SETTINGS, tmp_path / "e", init=[first.keeping_more(2)])
    torch.testing.assert_close(more.gates.logits(0, hidden), first.gates.logits(0, hidden) - 2, rtol=1e-4, atol=1e-4)
    assert more.gates.spec.offset == 5
    shifted = replace(SETTINGS, gates=replace(GATES, shift=1))
    with pytest.raises(ConfigError, match="other gate settings"):
        Retrofit(student, tokenizer, [source], shifted, tmp_path / "d", init=[first])


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 0}, {"recall": 2.0}, {"length": 8}, {"gates": None}, {"batch": -1}, {"recall": math.nan},
        {"seed": -1}, {"seed": 2**63},
    ],
)  # fmt: skip
def test_impossible_settings_are_refused(change):
    with pytest.raises(ConfigError):
        replace(SETTINGS, **change)


@pytest.mark.parametrize(
    "change",
    [
        {"target": 0.5}, {"lr": 0.0}, {"window": 0}, {"ramp": 0.0}, {"temperature": 0}, {"lr": 1e38},
        *({name: bad} for name in ("target", "lr", "temperature", "eviction_weight") for bad in (math.inf, math.nan)),
    ],
)  # fmt: skip
def test_impossible_gate_settings_are_refused(change):
    with pytest.raises(ConfigError):
        replace(GATES, **change)


@pytest.mark.parametrize("name", ["lr", "temperature", "mse_weight"])
@pytest.mark.parametrize("bad", [math.inf, math.nan, -1.0])
def test_impossible_swiftkv_settings_are_refused(name, bad):
    with pytest.raises(ConfigError, match=name):
        SwiftSettings(1, **{name: bad})


def test_a_run_without_text_is_refused(student, tokenizer, tmp_path):
    with pytest.raises(ConfigError, match="at least one source"):
        Retrofit(student, tokenizer, [], SETTINGS, tmp_path)


TWO_PROCESSES = """
import sys
import numpy as np, torch
from transformers import AutoModelForCausalLM, LlamaConfig
from octavo.retrofit.data import Source
from octavo.retrofit.settings import GateSettings, RetrofitSettings, SwiftSettings
from octavo.retrofit.trainer import Retrofit
torch.manual_seed(0)
model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=500, hidden_size=32, intermediate_size=32,
    num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)).eval()
tokens = np.random.default_rng(0).integers(5, 499, 4000).astype(np.uint16)
source = Source("r", tokens, None, 1.0, np.arange(25, 4001, 25))
common = dict(steps=3, batch=4, micro_batch=2, length=70, recall=0.0)
both = {"gates": (GateSettings(3, 8, 1e-3), None), "swiftkv": (None, SwiftSettings(1, start="regression")),
        "handing": (None, SwiftSettings(1, start="regression", before=6))}
for name, parts in both.items():
    run = Retrofit(model, None, [source], RetrofitSettings(*parts, **common), f"{sys.argv[1]}/{name}")
    run.run()
    part = run.gates if name == "gates" else run.transform
    total = sum(p.detach().double().abs().sum().item() for p in part.parameters())
    with open(f"{sys.argv[1]}/{name}-{run.accelerator.process_index}-of-{run.accelerator.num_processes}", "w") as f:
        f.write(repr(total))
"""


def test_two_processes_agree(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    out = subprocess.run([*launch, str(script), str(tmp_path / "run")], capture_output=True, text=True, timeout=300)
    for name in ("gates", "swiftkv", "handing"):
        files = sorted(Path(tmp_path / "run").glob(f"{name}-*"))
        assert [file.name for file in files] == [f"{name}-0-of-2", f"{name}-1-of-2"], out.stderr[-2000:]
        totals = [float(file.read_text()) for file in files]
        assert totals[0] == totals[1], "both hold the same weights"
        assert len(Path(tmp_path / "run" / name / LOG).read_text().splitlines()) == 3
        assert np.isfinite(totals[0])
