"""Chats in the model's own words: prompts are checked first, and an earlier file stays until a whole one is there."""

import json

import pytest
from typer.testing import CliRunner

from octavo.cli import main as cli
from octavo.errors import ConfigError, OutputFileError, TextFileError
from octavo.retrofit.chats import read_prompts, write_chats


def test_prompts_are_read(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"question": "a"}\n\n{"prompt": "b\u2028"}\n{"text": "c"}\n', encoding="utf-8")
    assert read_prompts(path) == ["a", "b\u2028", "c"]
    assert read_prompts(path, 2) == ["a", "b\u2028"]
    with pytest.raises(TextFileError, match="cannot read"):
        read_prompts(tmp_path / "none.jsonl")
    with pytest.raises(ConfigError, match="limit must be at least 1"):
        read_prompts(path, 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"answer": "a"}', r"p\.jsonl:1 holds none"),
        ('{"prompt": "a"}\n{"prompt": 7}', r"p\.jsonl:2 holds none"),
        ('{"prompt": " "}', "holds none"),
        ("[1]", "holds none"),
        ("{", "not valid JSON"),
        ("\n", "holds no prompts"),
    ],
)
def test_what_is_no_prompt_is_refused(content, message, tmp_path):
    (tmp_path / "p.jsonl").write_text(content)
    with pytest.raises(TextFileError, match=message):
        read_prompts(tmp_path / "p.jsonl")


def test_every_prompt_is_answered(student, tokenizer, tmp_path):
    done = []
    prompts = ["Three and three?", "Two?", "One and one?"]
    write_chats(student, tokenizer, prompts, tmp_path / "c.jsonl", batch=2, max_new_tokens=3, on_batch=done.append)
    chats = [json.loads(line)["messages"] for line in (tmp_path / "c.jsonl").read_text().splitlines()]
    assert sorted(chat[0]["content"] for chat in chats) == sorted(prompts)
    assert all([m["role"] for m in chat] == ["user", "assistant"] for chat in chats)
    assert done == [2, 3]
    assert [file.name for file in tmp_path.iterdir()] == ["c.jsonl"]


MISTAKES = [{"batch": 0}, {"max_new_tokens": 0}, {"seed": -1}, {"prompts": []}]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_refused_run_leaves_the_file_before(mistake, student, tokenizer, tmp_path):
    out = tmp_path / "c.jsonl"
    out.write_text("before")
    with pytest.raises(ConfigError):
        write_chats(student, tokenizer, out=out, **{"prompts": ["a"], **mistake})
    assert out.read_text() == "before"


def test_an_interrupted_run_leaves_the_file_before(student, tokenizer, tmp_path):
    def stop(done):
        raise KeyboardInterrupt

    out = tmp_path / "c.jsonl"
    out.write_text("before")
    with pytest.raises(KeyboardInterrupt):
        write_chats(student, tokenizer, ["a", "b"], out, batch=1, max_new_tokens=1, on_batch=stop)
    assert out.read_text() == "before"


def test_what_cannot_be_written_is_an_octavo_error(student, tokenizer, tmp_path):
    (tmp_path / "c.jsonl.new").mkdir()
    with pytest.raises(OutputFileError, match="cannot write"):
        write_chats(student, tokenizer, ["a"], tmp_path / "c.jsonl", max_new_tokens=1)


def test_the_prompts_are_not_overwritten(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n')
    out = CliRunner().invoke(cli.app, ["retrofit", "chats", str(path), "--prompts", str(path)])
    assert isinstance(out.exception, ConfigError)
    assert "holds the prompts" in str(out.exception)
