"""`octavo retrofit` on text that the model samples: what is kept, shown, noted and refused beforehand."""

import functools
import io
import json

import pytest
from rich.console import Console
from typer.testing import CliRunner

from octavo.cli import main as cli
from octavo.cli.training_text import TrainingText, gather
from octavo.errors import ConfigError, RetrofitError, RetrofitInterrupted, TextFileError
from octavo.retrofit import sampling
from octavo.retrofit.checkpoint import CHECKPOINT
from octavo.retrofit.sampling import RECORD, TEXT
from octavo.retrofit.settings import GateSettings, RetrofitSettings
from tiny import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS = RetrofitSettings(GateSettings(window=8), steps=2, batch=1, micro_batch=1, length=64)


@pytest.fixture(scope="module")
def tokenizer():
    from octavo.models import default_model, load_tokenizer

    return load_tokenizer(default_model())


@pytest.fixture
def model():
    return tiny_model(vocab_size=49152)


@pytest.fixture
def quick(monkeypatch):
    """Sampling that takes no time; how often it was asked."""
    calls = []

    def texts(model, tokenizer, openings, most, seed):
        calls.append("texts")
        return [f" went on for {seed} days and nobody knew why it had begun at all." for _ in openings]

    def chats(model, tokenizer, prompts, most, seed):
        calls.append("chats")
        answer = {"role": "assistant", "content": f"It is {seed}, as far as anybody who counted could tell."}
        return [[{"role": "user", "content": prompt}, answer] for prompt in prompts]

    monkeypatch.setattr(sampling, "sampled_texts", texts)
    monkeypatch.setattr(sampling, "sampled_chats", chats)
    return calls


def gathered(text, model, tokenizer, folder, settings=SETTINGS, resume=False):
    return gather(text, model, tokenizer, settings, folder, resume, Console(file=io.StringIO()))


def test_no_data_are_needed(tmp_path, tokenizer, model, monkeypatch):
    short = functools.partial(sampling.SamplingSettings, max_new_tokens=16)
    monkeypatch.setattr("octavo.cli.training_text.SamplingSettings", short)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    run = ["retrofit", "dms", str(tmp_path / "run"), "--model", str(tmp_path / "model"), "--length", "100",
           "--window", "16", "--steps", "2", "--batch", "2", "--micro-batch", "2", "--device", "cpu",
           "--dtype", "fp32"]  # fmt: skip
    out = CliRunner().invoke(cli.app, run)
    assert out.exit_code == 0, out.exception
    assert out.stdout.index("sampling") < out.stdout.index("tokens sampled") < out.stdout.index("step 2/2")
    card = json.loads((tmp_path / "run" / "adapter.json").read_text())["card"]
    assert set(card["data"]) == set(card["tokens"]) == {"sampled completions", "sampled chats"}
    assert card["sampled"]["tokens"] >= 400
    assert f"seed 0: {card['sampled']['chats']} chats and" in (tmp_path / "run" / "README.md").read_text()
    assert (tmp_path / "run" / TEXT).exists()


def test_the_user_s_files_come_beside_it(tmp_path, tokenizer, model, quick):
    (tmp_path / "t.txt").write_text(
        "Ein ruhiger Hafen, und 春天来了，花开了。 Ничего не случилось. " * 40, encoding="utf-8"
    )
    sources, said = gathered(TrainingText([f"{tmp_path / 't.txt'}:2"]), model, tokenizer, tmp_path / "run")
    assert [(s.name, s.share) for s in sources] == [
        ("t.txt", 2.0), ("sampled completions", 0.5), ("sampled chats", 0.5),
    ]  # fmt: skip
    assert said["sampled"]["tokens"] >= 4 * SETTINGS.length
    sources, said = gathered(TrainingText([str(tmp_path / "t.txt")], sampled=False), model, tokenizer, tmp_path / "no")
    assert [(s.name, s.share) for s in sources] == [("t.txt", 1.0)]
    assert not said
    assert not (tmp_path / "no").exists()


def test_a_run_of_before_resumes_on_its_files(tmp_path, tokenizer, model, quick):
    (tmp_path / "t.txt").write_text("It was a quiet harbour town. " * 40)
    (tmp_path / CHECKPOINT).write_bytes(b"")
    sources, _ = gathered(TrainingText([str(tmp_path / "t.txt")]), model, tokenizer, tmp_path, resume=True)
    assert [source.name for source in sources] == ["t.txt"]
    with pytest.raises(RetrofitError, match="holds no text that the model sampled"):
        gathered(TrainingText([]), model, tokenizer, tmp_path, resume=True)
    assert not quick


def test_what_is_sampled_is_not_sampled_again(tmp_path, tokenizer, model, quick):
    first, _ = gathered(TrainingText([]), model, tokenizer, tmp_path)
    quick.clear()
    again, _ = gathered(TrainingText([]), model, tokenizer, tmp_path, resume=True)
    assert not quick
    assert all((a.tokens == b.tokens).all() for a, b in zip(first, again, strict=True))


def test_bad_input_is_refused_before_the_sampling(tmp_path, tokenizer, model, quick):
    (tmp_path / "nul.txt").write_bytes(b"\x00\x01\x02\x03" * 200)
    (tmp_path / "binary.txt").write_bytes(b"text and \xff\xfe" * 200)
    with pytest.raises(TextFileError, match=r"nul\.txt is no text"):
        gathered(TrainingText([str(tmp_path / "nul.txt")]), model, tokenizer, tmp_path)
    with pytest.raises(TextFileError, match=r"binary\.txt: invalid start byte at byte 9; it must be text in UTF-8"):
        gathered(TrainingText([str(tmp_path / "binary.txt")]), model, tokenizer, tmp_path)
    long = RetrofitSettings(GateSettings(window=8), length=2000)
    with pytest.raises(ConfigError, match="past the model's 1024 positions"):
        gathered(TrainingText([]), model, tokenizer, tmp_path, long)
    assert not quick
    assert not (tmp_path / RECORD).exists()


def test_ctrl_c_while_sampling_says_how_to_go_on(tmp_path, tokenizer, model, quick, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(sampling, "sampled_chats", stop)
    with pytest.raises(RetrofitInterrupted, match="the same command goes on"):
        gathered(TrainingText([]), model, tokenizer, tmp_path)
    assert len((tmp_path / TEXT).read_text().splitlines()) == 1, "the batch before is kept"
