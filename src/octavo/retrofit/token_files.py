"""Token files: a sample of a text, tokenised once, for training where the text is too large to bring along."""

from pathlib import Path
from typing import Any

import numpy as np

from octavo.errors import ConfigError, OutputFileError
from octavo.retrofit.data import Tokens, tokenize

PIECE = 65536  # tokens; longer documents are sampled in pieces of this size, so that a few do not make up the sample


def sampled(path: Path, tokenizer: Any, limit: int | None, seed: int = 0) -> Tokens:
    """Tokens of a text or JSONL file [n] uint16 or uint32, in whole pieces of documents drawn without replacement.

    All of them, in the file's order, where `limit` is None or not reached. Raises TextFileError and ConfigError.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit must be at least 1, not {limit}")
    if not 0 <= seed < 2**63:
        raise ConfigError(f"seed must lie in 0..2**63 - 1, not {seed}")
    tokens, ends, _ = tokenize(path, tokenizer)
    if limit is None or limit >= len(tokens):
        return tokens
    bounds = np.unique(np.concatenate([[0], ends, np.arange(0, len(tokens), PIECE)]))
    taken: list[Tokens] = []
    left = limit
    for which in np.random.default_rng(seed).permutation(len(bounds) - 1):
        piece = tokens[bounds[which] : bounds[which + 1]][:left]
        taken.append(piece)
        left -= len(piece)
        if left == 0:
            break
    return np.concatenate(taken)


def write_tokens(tokens: Tokens, out: Path) -> None:
    """Write a `.npy` file that `load_source` reads, aside and renamed. Raises ConfigError and OutputFileError."""
    if out.suffix != ".npy":
        raise ConfigError(f"a token file ends with .npy, which training knows it by; {out} does not")
    aside = out.with_name(out.name + ".new")
    try:
        with aside.open("wb") as f:
            np.save(f, tokens, allow_pickle=False)
        aside.replace(out)
    except OSError as e:
        raise OutputFileError(f"cannot write {out}: {e.strerror or e}") from e
