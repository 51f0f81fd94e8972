"""Sources of training text, chats about facts, and prompts: what is read, what is drawn, what is refused."""

import copy
import gzip
import json
import lzma
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from octavo.errors import ConfigError, TextFileError
from octavo.retrofit.data import (
    Source,
    load_source,
    parse_mix,
    read_documents,
    read_text,
    shares_by_name,
    source_names,
    tokenize,
)
from octavo.retrofit.recall import recall_sequence

CHAT = [{"role": "user", "content": "Two and two?"}, {"role": "assistant", "content": "Four."}]


def test_text_jsonl_and_compressed_files_read_the_same(tmp_path):
    lines = json.dumps({"text": "one\n"}) + "\n\n" + json.dumps({"messages": CHAT}) + "\n"
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.jsonl.xz").write_bytes(lzma.compress(lines.encode()))
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    for name in ("a.jsonl", "b.jsonl.xz", "c.jsonl.gz"):
        assert list(read_documents(tmp_path / name)) == ["one\n", CHAT]
    (tmp_path / "d.txt").write_text("plain text")
    assert list(read_documents(tmp_path / "d.txt")) == ["plain text"]
    assert read_text(tmp_path / "a.jsonl") == "one\n\nTwo and two?\nFour."


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"{", "not valid JSON"),
        ("a.jsonl", b'{"other": 1}', "neither"),
        ("a.jsonl", b'{"messages": ["x"]}', "neither"),
        ("a.jsonl", b'{"text": "x"}\n{"messages": []}', r"a\.jsonl:2 has neither"),
        ("a.jsonl", b'{"messages": [{"role": "user", "content": null}]}', "neither"),
        ("a.jsonl", b'{"messages": [{"role": "user", "content": 7}]}', "neither"),
        ("a.jsonl", b'{"messages": [{"role": "user", "content": ["x"]}]}', "neither"),
        ("a.jsonl", b'{"messages": [{"role": 1, "content": "x"}]}', "neither"),
        ("a.txt.gz", gzip.compress(b"text " * 99, mtime=0)[:12] + b"\xff" * 20, "cannot read"),
        ("a.txt", b"\xff\xfe\xfa", "cannot read"),
        ("a.jsonl.xz", b"not xz", "cannot read"),
        ("a.txt", b"  \n ", "holds no text"),
    ],
)
def test_unreadable_text_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TextFileError, match=message):
        read_text(tmp_path / name)
    with pytest.raises(TextFileError, match="cannot read"):
        read_text(tmp_path / "missing.txt")


def test_documents_are_closed_and_chats_start_at_their_beginnings(tmp_path, tokenizer):
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": "one two"}) + "\n" + json.dumps({"text": "three"}))
    tokens, ends, chats = tokenize(tmp_path / "t.jsonl", tokenizer)
    assert not chats
    assert [tokenizer.decode(t) for t in np.split(tokens, ends[:-1])] == ["one two<|im_end|>", "three<|im_end|>"]
    assert load_source(tmp_path / "t.jsonl", tokenizer, 2).starts is None
    assert tokenizer.decode(tokens) == "one two<|im_end|>three<|im_end|>"
    (tmp_path / "c.jsonl").write_text("\n".join(json.dumps({"messages": CHAT}) for _ in range(3)))
    tokens, ends, chats = tokenize(tmp_path / "c.jsonl", tokenizer)
    source = load_source(tmp_path / "c.jsonl", tokenizer, 10)
    starts = source.starts
    assert chats
    assert len(starts) == 3
    assert source.bounds.tolist() == [0, *ends]
    assert all(tokenizer.decode(tokens[s : s + 2]).startswith("<|im_start|>system") for s in starts)


def test_draws_are_reproducible_and_have_the_right_length(source):
    one = source.draw(np.random.default_rng(3), 100)
    assert one.shape == (100,)
    assert one.dtype == np.int64
    assert np.array_equal(one, source.draw(np.random.default_rng(3), 100))
    chat = Source("c", np.arange(50, dtype=np.uint16), np.array([40]), 1.0)
    assert chat.draw(np.random.default_rng(0), 20).tolist() == [*range(40, 50), *range(10)]


def test_token_files_are_checked(tmp_path, tokenizer):
    np.save(tmp_path / "ok.npy", np.arange(100, dtype=np.uint16))
    assert len(load_source(tmp_path / "ok.npy", tokenizer, 50).tokens) == 100
    with pytest.raises(TextFileError, match="need at least"):
        load_source(tmp_path / "ok.npy", tokenizer, 101)
    np.save(tmp_path / "bad.npy", np.zeros((3, 3)))
    with pytest.raises(TextFileError, match="uint16"):
        load_source(tmp_path / "bad.npy", tokenizer, 1)
    for junk in (b"junk", b""):
        (tmp_path / "junk.npy").write_bytes(junk)
        with pytest.raises(TextFileError, match="cannot read"):
            load_source(tmp_path / "junk.npy", tokenizer, 1)
    np.savez(tmp_path / "several.npz", np.arange(9))
    (tmp_path / "several.npz").rename(tmp_path / "several.npy")
    with pytest.raises(TextFileError, match="an archive of several"):
        load_source(tmp_path / "several.npy", tokenizer, 1)


def test_mix_takes_shares():
    assert [(str(p), s) for p, s in parse_mix(["a.txt", "b.npy:0.25", "odd:name"])] == [
        ("a.txt", 1.0),
        ("b.npy", 0.25),
        ("odd:name", 1.0),
    ]
    for share in ("0", "inf", "nan", "-1"):
        with pytest.raises(ConfigError, match="positive and finite"):
            parse_mix([f"a:{share}"])


def test_sources_of_one_name_are_told_apart(source):
    paths = [Path(p) for p in ("/x/a/t.txt", "/x/b/t.txt", "u.txt")]
    assert source_names(paths) == ["a/t.txt", "b/t.txt", "u.txt"]
    twice = [replace(source, share=share) for share in (1.0, 2.0, 3.0)]
    assert shares_by_name(twice) == {"random": 1.0, "random (2)": 2.0, "random (3)": 3.0}


def test_texts_are_not_closed_where_the_tokenizer_has_no_end(tmp_path, tokenizer):
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    (tmp_path / "t.txt").write_text("one two")
    assert tokenizer.decode(tokenize(tmp_path / "t.txt", endless)[0]) == "one two"


@pytest.mark.parametrize("template", [True, False])
def test_recall_hides_what_it_asks_for(tokenizer, source, template, monkeypatch):
    if not template:
        monkeypatch.setattr(tokenizer, "chat_template", None)
    ids = recall_sequence(tokenizer, source, np.random.default_rng(1), 1500, facts=6, questions=4)
    assert len(ids) == 1500
    text = tokenizer.decode(ids)
    mark = "<|im_start|>assistant\n" if template else "\nAnswer: "
    answers = [part.split("<|im_end|>" if template else "\nQuestion")[0] for part in text.split(mark)[1:]]
    assert len(answers) == 4
    for answer in answers:
        value = answer.rstrip().rstrip(".").split()[-1]
        assert text.count(value) >= 2, f"{value} stands in the text and in its answer"


def test_recall_fits_any_length(tokenizer, source):
    for length in (40, 64, 200, 700):
        assert len(recall_sequence(tokenizer, source, np.random.default_rng(2), length)) == length
