"""Trains a small Qwen3 on a CPU in minutes: a model of a family that is not Llama, for docs/retrofit.md.

    python bench/small_model.py small --data books.txt --held-out other.txt

Passages return after other text in every row, or gates would have nothing to lose. Copying what followed last time
takes two layers together, which are slow to find each other: training begins with short rows of tokens in no order
that return, while the first layer sees one token back, and both grow. Logits over the embedded default's 49,152
tokens would take most of the time, so its tokenizer learns a small vocabulary. FOLDER-returns.txt is held-out text
with passages that return.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from octavo.models import load_tokenizer

Ids = npt.NDArray[np.int64]
Row = tuple[Ids, npt.NDArray[np.bool_]]  # token ids, and which of them are told by what went before
TOKENS, LR, CUES = 2048, 4e-3, 4  # tokens in a step; the first ones of a passage, which tell what returns
# Until this share of the steps: tokens in a row, tokens that the first layer sees (0: all), share of rows in no order.
STAGES = ((0.24, 64, 2, 1.0), (0.32, 128, 4, 0.25), (0.40, 256, 8, 0.25), (0.48, 256, 32, 0.25), (0.82, 256, 0, 0.25),
          (1.0, 1024, 0, 0.0))  # fmt: skip


def small_qwen3(tokenizer: Any, hidden: int, layers: int) -> PreTrainedModel:
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=hidden * 8 // 3, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, head_dim=hidden // 4, max_position_embeddings=4096,
        initializer_range=hidden**-0.5, tie_word_embeddings=True, **ids,
    )  # fmt: skip
    return Qwen3ForCausalLM(config)


def text_row(text: Ids, length: int, rng: np.random.Generator) -> Row:
    """`length` tokens of running text in which passages return after other text."""
    first = int(rng.integers(0, len(text) - length + 1))
    ids, returned = text[first : first + length].copy(), np.zeros(length, dtype=bool)
    for _ in range(1 + length // 64):
        size = int(rng.integers(16, min(80, length // 3)))
        to = int(rng.integers(size, length - size + 1))
        source = int(rng.integers(0, to - size + 1))
        ids[to : to + size] = ids[source : source + size].copy()
        returned[to : to + size] = np.arange(size) >= CUES
    return ids, returned


def rows(text: Ids, length: int, rng: np.random.Generator, drilled: int = 0, vocabulary: int = 0) -> list[Tensor]:
    """Both parts of rows [TOKENS // length, length], `drilled` of them in no order, which return again and again."""
    periods = (int(rng.integers(8, length // 2)) for _ in range(drilled))
    made = [(np.resize(rng.integers(0, vocabulary, n), length), np.arange(length) > n) for n in periods]
    made += [text_row(text, length, rng) for _ in range(TOKENS // length - drilled)]
    return [torch.from_numpy(np.stack(part)) for part in zip(*made, strict=True)]


def losses(model: PreTrainedModel, ids: Tensor, seen: int = 0) -> Tensor:
    """Nats per token [B, T - 1]; the first layer sees `seen` tokens, itself included, or all where that is 0."""
    mask = None
    if seen:
        back = torch.arange(ids.shape[1] - 1)[:, None] - torch.arange(ids.shape[1] - 1)
        mask = {"sliding_attention": ((back >= 0) & (back < seen))[None, None], "full_attention": None}
    model.config.layer_types[0] = "sliding_attention" if seen else "full_attention"
    logits = model(input_ids=ids[:, :-1], attention_mask=mask, use_cache=False).logits.float()
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(ids), -1)


def train(model: PreTrainedModel, text: Ids, steps: int) -> None:
    rng, began = np.random.default_rng(0), time.perf_counter()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.98), weight_decay=0.01)
    for step in range(steps):
        _, length, seen, drills = next(stage for stage in STAGES if step < stage[0] * steps)
        optimizer.param_groups[0]["lr"] = LR * min((step + 1) / 50, 1.0, 2 * (steps - step) / steps)
        ids, returned = rows(text, length, rng, round(drills * TOKENS / length), model.config.vocab_size)
        with torch.autocast("cpu", torch.bfloat16):
            each = losses(model, ids, seen)
        each.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 99:
            new, told = each[~returned[:, 1:]].mean().item(), each[returned[:, 1:]].mean().item()
            at = f"step {step + 1}, {time.perf_counter() - began:.0f} s"
            print(f"{at}: new {new:.3f}, returned {told:.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    for name in ("--data", "--held-out"):
        parser.add_argument(name, type=Path, required=True, help="Text, of other books than the other one.")
    for name, default in {"steps": 1700, "hidden": 128, "layers": 4, "vocabulary": 2048}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    texts = [path.read_text(encoding="utf-8") for path in (args.data, args.held_out)]
    pieces = [texts[0][i : i + 10_000] for i in range(0, len(texts[0]), 10_000)]
    tokenizer = load_tokenizer().train_new_from_iterator(pieces, args.vocabulary)
    train_ids, held = (np.array(tokenizer(text, verbose=False)["input_ids"], dtype=np.int64) for text in texts)
    torch.manual_seed(0)
    model = small_qwen3(tokenizer, args.hidden, args.layers)
    print(f"{model.num_parameters():,} parameters, {len(train_ids):,} tokens of text")
    train(model, train_ids, args.steps)
    rng = np.random.default_rng(1)
    ids, returned = (torch.cat(part) for part in zip(*(rows(held, 1024, rng) for _ in range(32)), strict=True))
    with torch.no_grad():
        each = torch.cat([losses(model, part) for part in ids.split(4)])
    new, told = each[~returned[:, 1:]].mean().item(), each[returned[:, 1:]].mean().item()
    print(f"held out, rows of 1,024: new {new:.3f}, returned {told:.3f} nats per token")
    for part in (model, tokenizer):
        part.save_pretrained(args.out)
    Path(f"{args.out}-returns.txt").write_text("\n".join(tokenizer.batch_decode(ids)), encoding="utf-8")


if __name__ == "__main__":
    main()
