"""`octavo chat --save` and `--resume`: a conversation goes on in another process as if it had never stopped."""

import os
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from octavo import KVCache, Snapshot, attach, detach
from octavo.cli import main as cli
from octavo.cli.chat import Conversation, Sampling
from octavo.cli.terminal import check_writable
from octavo.errors import CacheStateError, NotAttachedError, OutputFileError, SnapshotFileError
from tiny import tiny_adapter, tiny_model, tokens

FIRST, SECOND, THIRD = "Name a colour.", "And another one?", "Which of the two is warmer?"
OPTIONS = ["chat", "--max-new-tokens", "9", "--device", "cpu", "--dtype", "fp32"]


def run(*arguments, **options):
    return CliRunner().invoke(cli.app, [*OPTIONS, *arguments], **options)


def shell(*arguments, stdin=""):
    command = [sys.executable, "-c", "from octavo.cli.main import main; main()", *OPTIONS, *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, input=stdin, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )


def said(out):
    """Answers and counts, without what only a resumed or saved chat prints."""
    lines = [line.removeprefix("you> ").split(" tokens, ")[0] for line in out.splitlines()]
    return [line for line in lines if line.strip() and "going on" not in line and "saved" not in line]


def test_a_chat_goes_on_in_another_process(tmp_path):
    path = tmp_path / "talk.kv"
    whole = run(input=f"{FIRST}\n{SECOND}\n{THIRD}\n\n")
    begun = run("--save", str(path), input=f"{FIRST}\n{SECOND}\n")  # ends with the end of input
    assert begun.exit_code == whole.exit_code == 0, begun.exception or whole.exception
    resumed = shell("--resume", str(path), "--save", str(path), stdin=f"{THIRD}\n\n")
    assert resumed.returncode == 0, resumed.stderr
    assert said(begun.stdout) + said(resumed.stdout) == said(whole.stdout)
    assert "going on after" in resumed.stdout
    tokens_before = int(begun.stdout.rsplit("saved ", 1)[1].split(" tokens")[0])
    assert f"going on after {tokens_before:,} tokens" in resumed.stdout
    assert len(Snapshot.load(path).tokens) > tokens_before
    assert [p.name for p in tmp_path.iterdir()] == ["talk.kv"]
    with pytest.raises(CacheStateError, match="made under another window: 512, and this model has None"):
        run("--resume", str(path), "--adapter", "none", catch_exceptions=False)


@pytest.mark.parametrize("when", ["at the prompt", "in an answer"])
def test_an_interrupted_chat_is_saved(tmp_path, monkeypatch, smollm, when):
    model, tokenizer = smollm
    attach(model, "dms-8x")
    try:
        monkeypatch.setattr("octavo.cli.talk.load", lambda *options: (model, tokenizer))
        lines, asked = iter([FIRST, SECOND]), Conversation.ask

        def typed(*args):
            text = next(lines, None)
            if text is None or (text == SECOND and when == "at the prompt"):
                raise KeyboardInterrupt
            return text

        def interrupted(self, text):
            for n, piece in enumerate(asked(self, text)):
                if text == SECOND and n == 2:
                    raise KeyboardInterrupt
                yield piece

        monkeypatch.setattr("octavo.cli.talk.console.input", typed)
        monkeypatch.setattr(Conversation, "ask", interrupted)
        out = run("--save", str(tmp_path / "a.kv"))
        assert out.exit_code == 0, out.exception
        assert ("[interrupted]" in out.stdout) == (when == "in an answer")
        resumed = Conversation.resume(model, tokenizer, Snapshot.load(tmp_path / "a.kv"), Sampling(5))
        assert "".join(asked(resumed, THIRD))
    finally:
        detach(model)


def test_mistakes_are_one_line_before_the_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("octavo.cli.talk.load", None)
    with pytest.raises(OutputFileError, match="no folder"):
        run("--save", str(tmp_path / "missing" / "a.kv"), catch_exceptions=False)
    with pytest.raises(SnapshotFileError, match="cannot read"):
        run("--resume", str(tmp_path / "a.kv"), catch_exceptions=False)
    (tmp_path / "a.kv").write_bytes(b"no snapshot")
    with pytest.raises(SnapshotFileError, match="not a snapshot"):
        run("--resume", str(tmp_path / "a.kv"), catch_exceptions=False)


def test_where_a_chat_cannot_be_saved_is_known_before_it(tmp_path, monkeypatch):
    monkeypatch.setattr("octavo.cli.talk.load", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_bytes(b"kept")
    os.mkfifo(tmp_path / "pipe")
    for name, reason in {
        ".": "it is a folder", "": "it is a folder", str(tmp_path): "it is a folder", "pipe": "it is a device or pipe",
        "file/a.kv": "no folder file", "a" * 250: "File name too long",
    }.items():  # fmt: skip
        with pytest.raises(OutputFileError, match=reason):
            run("--save", name, catch_exceptions=False)
    check_writable(tmp_path / "file", replaced=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "pipe"]
    assert (tmp_path / "file").read_bytes() == b"kept"


def test_a_chat_without_a_turn_saves_nothing(tmp_path, monkeypatch, smollm):
    model, tokenizer = smollm
    attach(model)
    try:
        monkeypatch.setattr("octavo.cli.talk.load", lambda *options: (model, tokenizer))
        out = run("--save", str(tmp_path / "a.kv"), input="\n")
        assert out.exit_code == 0, out.exception
        assert not list(tmp_path.iterdir())
    finally:
        detach(model)


def test_what_cannot_be_saved_or_resumed_says_so(tmp_path):
    model = tiny_model()
    with pytest.raises(NotAttachedError, match="attached"):
        Conversation(model, None).save(tmp_path / "a.kv")
    attach(model, tiny_adapter(model))
    conversation = Conversation(model, None)
    with pytest.raises(CacheStateError, match="no sequence"):
        conversation.save(tmp_path / "a.kv")
    conversation._broken = True
    with pytest.raises(CacheStateError, match="not saved"):
        conversation.save(tmp_path / "a.kv")
    assert not list(tmp_path.iterdir())
    cache = KVCache(model)
    with torch.no_grad():
        model(input_ids=tokens(1, 30), past_key_values=cache)
    with pytest.raises(SnapshotFileError, match="no token ids"):
        Conversation.resume(model, None, cache.snapshot())
