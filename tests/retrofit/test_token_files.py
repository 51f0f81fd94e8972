"""Token files and made-up prompts: what is sampled, what is refused."""

import json

import numpy as np
import pytest

from octavo.errors import ConfigError, OutputFileError
from octavo.retrofit.data import load_source, tokenize
from octavo.retrofit.prompts import made_prompts
from octavo.retrofit.token_files import sampled, write_tokens


def test_a_sample_holds_whole_pieces_of_the_text_and_trains(tmp_path, tokenizer):
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps({"text": f"document number {i} " * 9}) + "\n" for i in range(40)))
    whole, ends, _ = tokenize(path, tokenizer)
    assert np.array_equal(sampled(path, tokenizer, None), whole)
    some = sampled(path, tokenizer, len(whole) // 2, seed=3)
    assert len(some) == len(whole) // 2
    documents = {tuple(d) for d in np.split(whole, ends[:-1])}
    pieces = np.split(some, np.flatnonzero(some == tokenizer.eos_token_id) + 1)
    assert all(tuple(piece) in documents for piece in pieces[:-1])
    assert len({tuple(piece) for piece in pieces}) == len(pieces)
    assert np.array_equal(some, sampled(path, tokenizer, len(whole) // 2, seed=3))
    assert not np.array_equal(some, sampled(path, tokenizer, len(whole) // 2, seed=4))
    write_tokens(some, tmp_path / "t.npy")
    assert np.array_equal(load_source(tmp_path / "t.npy", tokenizer, 100).tokens, some)


def test_bad_token_files_are_refused(tmp_path, tokenizer):
    (tmp_path / "t.txt").write_text("one two three")
    for limit, seed in ((0, 0), (5, -1)):
        with pytest.raises(ConfigError, match="must"):
            sampled(tmp_path / "t.txt", tokenizer, limit, seed)
    with pytest.raises(ConfigError, match=r"ends with \.npy"):
        write_tokens(np.zeros(3, np.uint16), tmp_path / "t.bin")
    with pytest.raises(OutputFileError, match="cannot write"):
        write_tokens(np.zeros(3, np.uint16), tmp_path / "no" / "t.npy")


def test_prompts_are_many_and_repeatable():
    prompts = made_prompts(500, seed=1)
    assert prompts == made_prompts(500, seed=1)
    assert len(set(prompts)) > 400
    assert all(prompt[-1] in ".?" for prompt in prompts)
    with pytest.raises(ConfigError, match="at least 1"):
        made_prompts(0)
