"""Training text that the model writes itself: its answers to made-up prompts, and texts that it goes on with.

Distillation asks a student to say what the model says, so text in the model's own words is what it needs, and no data
have to be found. What is written is added batch by batch to two files in the run's folder: `sampled.jsonl`, the
documents as `load_source` reads them, and `sampled.json`, which batches there are and what they were made with. A batch
depends only on that, its size and its number, so an interrupted run goes on where it stopped, and a longer one adds to
what a shorter one wrote.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from octavo.attachment.supported import fingerprint
from octavo.errors import ConfigError, OutputFileError, RetrofitError
from octavo.retrofit.chats import sampled_chats, sampled_texts
from octavo.retrofit.data import Source, encode, numbered_lines, source_of
from octavo.retrofit.openings import made_openings
from octavo.retrofit.prompts import made_prompts
from octavo.retrofit.settings import RetrofitSettings

TEXT, RECORD = "sampled.jsonl", "sampled.json"
CHATS, COMPLETIONS = "chats", "completions"
READ = 8  # times that a sampled token is trained on, where the amount is left to `amount_for`
MOST, MOST_ON_CPU = 2_000_000, 250_000  # tokens sampled then; longer runs read them more often
LEAST = 4  # tokens per answer on average, below which a model is taken to say nothing
WAITS = 1.0  # seconds between looks at what another process samples


@dataclass(frozen=True)
class SamplingSettings:
    """`tokens` to sample at least, in answers of `max_new_tokens` at most, `batch` at once. Raises ConfigError."""

    tokens: int
    seed: int = 0
    batch: int = 32
    max_new_tokens: int = 256

    def __post_init__(self) -> None:
        for name in ("tokens", "batch", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"the {name} of sampling must be at least 1, not {getattr(self, name)}")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed must lie in 0..2**63 - 1, not {self.seed}")


@dataclass(frozen=True)
class Batch:
    """One batch as `sampled.json` lists it: prompts `asked`, documents `kept`, and the model's own `tokens` in them."""

    kind: str
    asked: int
    kept: int
    tokens: int


def amount_for(settings: RetrofitSettings, device: str) -> int:
    """Tokens to sample for a run: its tokens over `READ`, at most `MOST`; four rows of it at least."""
    trained = settings.steps * settings.batch * settings.length
    return max(4 * settings.length, min(MOST_ON_CPU if device == "cpu" else MOST, trained // READ))


def batch_for(model: PreTrainedModel, tokens: int, max_new_tokens: int) -> int:
    """Answers to sample at once: 64 on a CPU, as many on a GPU as leave most of its free memory alone, 256 at most.

    Fewer where so few `tokens` are wanted that two batches would hold many more.
    """
    needed = -(-tokens // (2 * max_new_tokens))
    if model.device.type != "cuda":
        return min(64, needed)
    c = model.config
    heads = c.num_key_value_heads * (getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads)
    each = 2 * max_new_tokens * 2 * c.num_hidden_layers * heads * model.dtype.itemsize  # of a cache, prompt included
    return int(min(256, needed, max(8, torch.cuda.mem_get_info(model.device)[0] // 4 // each)))


def sample(
    model: PreTrainedModel,
    tokenizer: Any,
    settings: SamplingSettings,
    folder: Path,
    resume: bool = False,
    on_tokens: Callable[[int], None] = lambda tokens: None,
) -> None:
    """Sample until `folder` holds enough; what it holds already of the same model and seed counts.

    `resume`: refuse what was made with anything else, which is replaced otherwise. `on_tokens` hears how many tokens
    there are. Raises RetrofitError for that, and for a model that says nothing; OutputFileError; KeyboardInterrupt
    leaves whole batches.
    """
    made_with, batches = _begun(model, tokenizer, settings, folder, resume)
    on_tokens(sum(each.tokens for each in batches))
    while (kind := _next(batches, settings.tokens, tokenizer)) is not None:
        seed = int(np.random.SeedSequence((settings.seed, len(batches))).generate_state(1, np.uint64)[0] >> 1)
        documents = _documents(model, tokenizer, kind, settings.batch, settings.max_new_tokens, seed)
        kept = [(document, tokens) for document, tokens in documents if tokens]
        batches.append(Batch(kind, settings.batch, len(kept), sum(tokens for _, tokens in kept)))
        try:
            with (folder / TEXT).open("a", encoding="utf-8") as f:
                f.writelines(json.dumps(document, ensure_ascii=False) + "\n" for document, _ in kept)
            _write_record(folder, made_with, batches)
        except OSError as e:
            raise OutputFileError(f"cannot write {folder / TEXT}: {e.strerror or e}") from e
        on_tokens(sum(each.tokens for each in batches))


def wait(model: PreTrainedModel, tokenizer: Any, settings: SamplingSettings, folder: Path) -> None:
    """Return when another process has sampled enough."""
    while True:
        try:
            made_with, batches = _read_record(folder)
        except RetrofitError:
            made_with, batches = {}, []
        if made_with == _made_with(model, settings) and _next(batches, settings.tokens, tokenizer) is None:
            return
        time.sleep(WAITS)


def load_sampled(
    tokenizer: Any, settings: SamplingSettings, folder: Path, length: int
) -> tuple[list[Source], dict[str, Any]]:
    """What `sample` wrote as sources of `length` tokens, and the card's line on it.

    Completions come first: facts to recall are hidden in running text. Raises TextFileError and RetrofitError.
    """
    _, batches = _read_record(folder)
    used = batches[: _enough(batches, settings.tokens)]
    documents: dict[str, list[Any]] = {COMPLETIONS: [], CHATS: []}
    lines = numbered_lines(folder / TEXT)
    for each in used:
        records = [json.loads(line) for line, _ in islice(lines, each.kept)]
        documents[each.kind] += [record.get("text") or record["messages"] for record in records]
    mute = _mute(used)
    found = {kind: of_it for kind, of_it in documents.items() if of_it and kind not in mute}
    sources = [source_of(f"sampled {kind}", of_it, tokenizer, length, 1 / len(found)) for kind, of_it in found.items()]
    card: dict[str, Any] = {
        "tokens": sum(each.tokens for each in used),
        "prompts": sum(each.asked for each in used),
        **{kind: len(of_it) for kind, of_it in found.items()},
        "seed": settings.seed,
        "notes": [f"{kind}: the model said next to nothing, left out" for kind in mute],
    }
    if tokenizer.chat_template is None:
        card["notes"].append("the tokenizer has no chat template: completions only")
    return sources, card


def _begun(
    model: PreTrainedModel, tokenizer: Any, settings: SamplingSettings, folder: Path, resume: bool
) -> tuple[dict[str, Any], list[Batch]]:
    """(what batches are made with, those that there are), with the text cut to whole ones."""
    ours = _made_with(model, settings)
    try:
        theirs, batches = _read_record(folder)
        text = (folder / TEXT).read_text(encoding="utf-8").split("\n")[:-1] if (folder / TEXT).exists() else []
        whole = sum(each.kept for each in batches)
        if theirs == ours and len(text) >= whole:
            if len(text) > whole:
                (folder / TEXT).write_text("".join(f"{line}\n" for line in text[:whole]), encoding="utf-8")
            return ours, batches
        why = "was sampled from another model, or with another seed or dtype" if theirs != ours else "lacks documents"
        if resume:
            raise RetrofitError(f"{folder / TEXT} {why}; resume with what it was made with, or train in another folder")
    except (OSError, UnicodeDecodeError, RetrofitError):
        if resume and (folder / RECORD).exists():
            raise
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / TEXT).unlink(missing_ok=True)
        _write_record(folder, ours, [])
    except OSError as e:
        raise OutputFileError(f"cannot write to {folder}: {e.strerror or e}") from e
    return ours, []


def _made_with(model: PreTrainedModel, settings: SamplingSettings) -> dict[str, Any]:
    dtype = str(model.dtype).removeprefix("torch.")
    made = {"model": fingerprint(model), "dtype": dtype, "seed": settings.seed, "max_new": settings.max_new_tokens}
    return json.loads(json.dumps(made))  # type: ignore[no-any-return]


def _read_record(folder: Path) -> tuple[dict[str, Any], list[Batch]]:
    """(what batches were made with, the batches). Raises RetrofitError."""
    path = folder / RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return dict(record["made_with"]), [Batch(**each) for each in record["batches"]]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise RetrofitError(f"cannot read {path}: {e}; remove it to sample again") from e


def _write_record(folder: Path, made_with: dict[str, Any], batches: list[Batch]) -> None:
    aside = folder / f"{RECORD}.new"
    record = {"made_with": made_with, "batches": [asdict(each) for each in batches]}
    aside.write_text(json.dumps(record) + "\n", encoding="utf-8")
    aside.replace(folder / RECORD)


def _enough(batches: list[Batch], tokens: int) -> int | None:
    """How many of the batches hold `tokens` tokens together; None where all of them hold fewer."""
    reached = np.flatnonzero(np.cumsum([each.tokens for each in batches]) >= tokens)
    return int(reached[0]) + 1 if len(reached) else None


def _mute(batches: list[Batch]) -> list[str]:
    """The kinds of text in which the model says next to nothing, after one batch of them."""
    sums = {kind: [each for each in batches if each.kind == kind] for kind in (COMPLETIONS, CHATS)}
    return [k for k, of_it in sums.items() if of_it and sum(b.tokens - LEAST * b.asked for b in of_it) < 0]


def _next(batches: list[Batch], tokens: int, tokenizer: Any) -> str | None:
    """The kind that has fewest tokens yet; None where there is enough. Raises RetrofitError."""
    kinds = [COMPLETIONS, *([CHATS] if tokenizer.chat_template is not None else [])]
    able = [kind for kind in kinds if kind not in _mute(batches)]
    if not able:
        raise RetrofitError(
            f"the model ends its text at once or says nothing that is text, after {sum(b.asked for b in batches)} "
            "prompts: there is nothing to train on. See what it says with 'octavo generate', and whether its end token "
            "is right, or train on text of your own with --data FILE --no-sampled"
        )
    if _enough(batches, tokens) is not None:
        return None
    return min(able, key=lambda kind: sum(each.tokens for each in batches if each.kind == kind))


def _documents(
    model: PreTrainedModel, tokenizer: Any, kind: str, count: int, most: int, seed: int
) -> list[tuple[dict[str, Any], int]]:
    """Documents with the tokens that the model wrote of each, 0 where it said nothing."""
    if kind == CHATS:
        chats = sampled_chats(model, tokenizer, made_prompts(count, seed), most, seed=seed)
        return [({"messages": chat}, len(encode(tokenizer, chat[-1]["content"]))) for chat in chats]
    openings = made_openings(count, seed)
    texts = sampled_texts(model, tokenizer, openings, most, seed=seed)
    return [
        ({"text": opening + text}, len(encode(tokenizer, text)) if text.strip() else 0)
        for opening, text in zip(openings, texts, strict=True)
    ]
