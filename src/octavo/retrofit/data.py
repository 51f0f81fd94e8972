"""Training text: plain text, JSONL (optionally .xz or .gz) or ready token files, as seeded random sequences.

A source draws sequences of a fixed length. Running text is cut anywhere; chats are cut at their beginnings.
It also knows where its documents begin and end, for rows of whole documents (`packing.py`). What is drawn
depends only on the seed, the step and the rank, so that a resumed run sees the same data.
"""

import gzip
import json
import lzma
import math
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from octavo.errors import ConfigError, TextFileError

Tokens = npt.NDArray[np.integer[Any]]
Document = str | list[dict[str, str]]
LOOKED_AT = 4096  # characters of a file that tell whether it is text


@dataclass(frozen=True)
class Source:
    """A token stream with the places where a sequence may start (None: anywhere), and its share of the mix."""

    name: str
    tokens: Tokens  # [n] uint16 or uint32
    starts: npt.NDArray[np.int64] | None
    share: float
    ends: npt.NDArray[np.int64] | None = None  # of the documents; None: it is all one

    @property
    def bounds(self) -> npt.NDArray[np.int64]:
        """Where documents begin, then the end of the last: [documents + 1]."""
        return np.array([0, len(self.tokens)]) if self.ends is None else np.concatenate([[0], self.ends])

    def draw(self, rng: np.random.Generator, length: int) -> npt.NDArray[np.int64]:
        """`length` tokens [length] int64; a start too near the end wraps to the beginning."""
        if self.starts is None:
            first = int(rng.integers(0, len(self.tokens) - length + 1))
        else:
            first = int(rng.choice(self.starts))
        piece = self.tokens[first : first + length]
        if len(piece) < length:
            piece = np.concatenate([piece, self.tokens[: length - len(piece)]])
        return piece.astype(np.int64)


def read_documents(path: Path) -> Iterator[Document]:
    """Documents of a text or JSONL file: strings, or chats as lists of {"role", "content"}.

    JSONL lines hold `text` or `messages`; `.xz` and `.gz` are read through. Raises TextFileError.
    """
    inner = path.with_suffix("") if path.suffix in (".xz", ".gz") else path
    if inner.suffix == ".jsonl":
        for line, where in numbered_lines(path):
            yield _document(line, where)
    else:
        with _opened(path) as f:
            yield f.read()


def numbered_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Lines that are not blank, each with its "path:number" for errors; `.xz` and `.gz` are read through.

    Raises TextFileError.
    """
    with _opened(path) as f:
        for number, line in enumerate(f, 1):
            if line.strip():
                yield line, f"{path}:{number}"


def read_text(path: Path) -> str:
    """A whole text or JSONL file as one string. Raises TextFileError where there is none."""
    text = "\n".join(d if isinstance(d, str) else "\n".join(m["content"] for m in d) for d in read_documents(path))
    if not text.strip():
        raise TextFileError(f"{path} holds no text")
    return text


def load_source(path: str | Path, tokenizer: Any, length: int, share: float = 1.0) -> Source:
    """Tokenise a file, or open a `.npy` token file, as a source of sequences of `length` tokens.

    Raises TextFileError where the file cannot be read, holds no such tokens, or fewer than `length`.
    """
    path = Path(path)
    starts = ends = None
    if path.suffix == ".npy":
        try:
            tokens = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as e:
            raise TextFileError(f"cannot read {path}: {e}") from e
        if not isinstance(tokens, np.ndarray):
            tokens.close()
            raise TextFileError(f"{path} must hold one array, but is an archive of several (.npz)")
        if tokens.ndim != 1 or tokens.dtype not in (np.uint16, np.uint32):
            raise TextFileError(
                f"{path} must hold one row of uint16 or uint32 tokens, not {tokens.dtype} {tokens.shape}"
            )
    else:
        tokens, ends, chats = tokenize(path, tokenizer)
        starts = np.concatenate([[0], ends[:-1]]) if chats else None
    if len(tokens) < length:
        raise TextFileError(f"{path} has {len(tokens):,} tokens; sequences of {length:,} need at least as many")
    return Source(path.name, tokens, starts, share, ends)


def source_of(name: str, documents: Iterable[Document], tokenizer: Any, length: int, share: float) -> Source:
    """Documents in memory as a source of sequences of `length` tokens. Raises TextFileError where they hold fewer."""
    tokens, ends, chats = _tokenized(documents, name, tokenizer)
    if len(tokens) < length:
        raise TextFileError(f"{name} has {len(tokens):,} tokens; sequences of {length:,} need at least as many")
    return Source(name, tokens, np.concatenate([[0], ends[:-1]]) if chats else None, share, ends)


def tokenize(path: Path, tokenizer: Any) -> tuple[Tokens, npt.NDArray[np.int64], bool]:
    """(all documents as one stream; where each ends; whether any is a chat).

    The stream is [n] uint16 or uint32, the ends [documents] int64. Texts are closed by the end token where the
    tokenizer has one. Raises TextFileError where the file cannot be read, is no text or holds no documents.
    """
    return _tokenized(_checked(read_documents(path), str(path)), str(path), tokenizer)


def _checked(documents: Iterable[Document], name: str) -> Iterator[Document]:
    """The documents as they are. Raises TextFileError where the first characters of them are no text."""
    sample = ""
    for document in documents:
        if len(sample) < LOOKED_AT:
            sample += document[:LOOKED_AT] if isinstance(document, str) else "".join(m["content"] for m in document)
        yield document
    check_text(sample, name)


def _tokenized(documents: Iterable[Document], name: str, tokenizer: Any) -> tuple[Tokens, npt.NDArray[np.int64], bool]:
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
    pieces, chats = [], False
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for document in documents:
        if isinstance(document, str):
            ids = [*encode(tokenizer, document), *end]
        else:
            chats = True
            ids = chat_ids(tokenizer, document)
        if ids:
            pieces.append(np.array(ids, dtype=dtype))
    if not pieces:
        raise TextFileError(f"{name} holds no documents")
    return np.concatenate(pieces), np.cumsum([len(piece) for piece in pieces]), chats


def check_text(sample: str, name: str) -> None:
    """Raise TextFileError where more than one character in twenty cannot be printed."""
    if sum(not c.isprintable() and not c.isspace() for c in sample) + sample.count("\ufffd") > 0.05 * len(sample):
        raise TextFileError(f"{name} is no text: more than one character in twenty of it cannot be printed")


def chat_ids(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    """Token ids of a chat in the tokenizer's own format, or as plain lines where it has none."""
    if tokenizer.chat_template is None:
        text = "\n".join(f"{m['role'].capitalize()}: {m['content']}" for m in messages)
    else:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    return encode(tokenizer, text)


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text of any length, with nothing added."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def parse_mix(specs: list[str]) -> list[tuple[Path, float]]:
    """`path` or `path:share` (share > 0, finite) per source. Raises ConfigError."""
    mix = []
    for spec in specs:
        path, _, share = spec.rpartition(":")
        try:
            parsed = (Path(path), float(share)) if path else (Path(spec), 1.0)
        except ValueError:
            parsed = (Path(spec), 1.0)  # a colon that belongs to the path
        if not 0 < parsed[1] < math.inf:
            raise ConfigError(f"the share in {spec!r} must be positive and finite")
        mix.append(parsed)
    return mix


def source_names(paths: Sequence[Path]) -> list[str]:
    """What to call files on a card: their names, with the folder where two have one name."""
    count = Counter(path.name for path in paths)
    return [path.name if count[path.name] == 1 else f"{path.resolve().parent.name}/{path.name}" for path in paths]


def shares_by_name(sources: Sequence[Source]) -> dict[str, float]:
    """The share of every source; the second of two with one name is "name (2)"."""
    shares: dict[str, float] = {}
    for source in sources:
        name, count = source.name, 1
        while name in shares:
            count += 1
            name = f"{source.name} ({count})"
        shares[name] = source.share
    return shares


@contextmanager
def _opened(path: Path) -> Iterator[IO[str]]:
    try:
        with _open(path) as f:
            yield f
    except UnicodeDecodeError as e:
        raise TextFileError(f"cannot read {path}: {e.reason} at byte {e.start}; it must be text in UTF-8") from e
    except (OSError, lzma.LZMAError, zlib.error, EOFError) as e:
        raise TextFileError(f"cannot read {path}: {getattr(e, 'strerror', None) or e}") from e


def _open(path: Path) -> IO[str]:
    if path.suffix == ".xz":
        return lzma.open(path, "rt", encoding="utf-8")
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    return path.open(encoding="utf-8")


def _document(line: str, where: str) -> Document:
    try:
        record = json.loads(line)
    except ValueError as e:
        raise TextFileError(f"{where} is not valid JSON: {e}") from e
    text = record.get("text") if isinstance(record, dict) else None
    if isinstance(text, str):
        return text
    messages = record.get("messages") if isinstance(record, dict) else None
    if isinstance(messages, list) and messages and all(map(_is_message, messages)):
        return messages
    raise TextFileError(
        f"{where} has neither a 'text' string nor 'messages', a list of one or more with strings as role and content"
    )


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
