"""The walk over every decoder class: attached and without an adapter, is it what it is unattached? And do gates evict
from pages what the hard mask hides?

    PYTHONPATH=src:tests python tests/decoder_walk.py

walks them all, in about four minutes, and writes what it finds to src/octavo/models/decoders.json and docs/models.md.
"""

import inspect
import json
import warnings
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from octavo import KVCache, attach, detach
from octavo.errors import UnsupportedModelError
from tiny import tiny_adapter, tokens
from tiny_decoders import KINDS, tiny_decoder

ROOT = Path(__file__).parents[1]
RECORD, PAGE = ROOT / "src/octavo/models/decoders.json", ROOT / "docs/models.md"
TEMPLATE = Path(__file__).with_name("models_page.md")  # the page's prose
LENGTH, PROMPT, NEW, CLOSE = 45, 38, 12, 1e-4


class Outcome(NamedTuple):
    """What became of one class: "exact", "refused" (at `attach`), "no model" (none this small), or what must not be:
    "wrong", "crashes", "late" (refused only when it runs)."""

    status: str
    why: str = ""


class Answer(NamedTuple):
    logits: Tensor
    sequences: Tensor
    steps: Tensor


def padded(batch: int) -> tuple[Tensor, Tensor]:
    """(ids, mask) of prompts longer than every window; in a batch the first is shorter and padded on the left."""
    ids, mask = tokens(batch, LENGTH), torch.ones(batch, LENGTH, dtype=torch.int64)
    if batch > 1:
        ids[0, :19], mask[0, :19] = 0, 0
    return ids, mask


def answer(model: PreTrainedModel, batch: int) -> Answer:
    """The logits of a prompt, and what is generated after it."""
    ids, mask = padded(batch)
    given = {"attention_mask": mask, "use_cache": True}
    if "position_ids" in inspect.signature(model.forward).parameters:
        given["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(input_ids=ids, **given).logits
        out = model.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW, output_logits=True,
            return_dict_in_generate=True, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
    return Answer(logits[mask.bool()], out.sequences, torch.stack(out.logits))


def compared(model: PreTrainedModel, chunks: tuple[int, ...] = (16, 512), batches: tuple[int, ...] = (1, 2)) -> Outcome:
    """Attach a model that has not been attached and compare."""
    expected = {batch: answer(model, batch) for batch in batches}
    worst = 0.0
    for chunk in chunks:
        try:
            attach(model, chunk=chunk)
        except UnsupportedModelError as e:
            return Outcome("refused", str(e))
        except Exception as e:
            return Outcome("crashes", f"attach: {type(e).__name__}: {e}")
        for batch in batches:
            try:
                got = answer(model, batch)
            except UnsupportedModelError as e:
                return Outcome("late", str(e))
            except Exception as e:
                return Outcome("crashes", f"{type(e).__name__}: {e}")
            where = f"batch {batch}, chunk {chunk}"
            off = float((got.logits - expected[batch].logits).abs().max())
            worst = max(worst, off)
            if not off <= CLOSE:
                return Outcome("wrong", f"{where}: logits off by {off:.1e}")
            if not torch.equal(got.sequences, expected[batch].sequences):
                return Outcome("wrong", f"{where}: other tokens")
            off = float((got.steps - expected[batch].steps).abs().max())
            worst = max(worst, off)
            if not off <= CLOSE:
                return Outcome("wrong", f"{where}: logits of steps off by {off:.1e}")
        detach(model)
    return Outcome("exact", f"within {worst:.0e}")


def evicted(model: PreTrainedModel) -> float:
    """How far logits of a model with random gates are off in pages, where they evict, from those under the hard mask.

    In chunks with left padding, then token by token.
    """
    ids, mask = padded(2)
    given = {"attention_mask": mask}
    if "position_ids" in inspect.signature(model.forward).parameters:
        given["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    attach(model, tiny_adapter(model, window=6), chunk=16)
    with torch.no_grad():
        expected = model(input_ids=ids, **given, use_cache=False).logits
        cache, parts = KVCache(model), []
        for first, last in ((0, PROMPT), *((i, i + 1) for i in range(PROMPT, LENGTH))):
            part = {name: value[:, first:last] for name, value in given.items()}
            part["attention_mask"] = mask[:, :last]
            parts.append(model(input_ids=ids[:, first:last], **part, past_key_values=cache).logits)
    assert cache.kept.amin() < LENGTH - 19, "nothing was evicted"
    detach(model)
    return float((torch.cat(parts, 1) - expected)[mask.bool()].abs().max())


def outcome(kind: str, **how: tuple[int, ...]) -> Outcome:
    """Of the class of a model type."""
    try:
        model = tiny_decoder(kind)
    except Exception as e:
        return Outcome("no model", _said(e))
    try:
        found = compared(model, **how)
    except Exception as e:  # the unattached model itself
        return Outcome("no model", f"unattached: {_said(e)}")
    if found.status == "exact" and not (off := evicted(model)) <= CLOSE:
        return Outcome("wrong", f"with gates: logits off by {off:.1e}")
    return found


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def record(found: dict[str, Outcome]) -> dict[str, Any]:
    """What is kept of a walk."""
    classes = []
    for kind, each in sorted(found.items()):
        why = "" if each.status == "exact" else " ".join(each.why.split())
        name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]
        classes.append({"type": kind, "class": name, "outcome": each.status, "why": why})
    return {"transformers": transformers.__version__, "classes": classes}


def page(walked: dict[str, Any]) -> str:
    """docs/models.md of a record."""
    by_type = {each["type"]: each for each in walked["classes"]}
    counts = Counter(each["outcome"] for each in walked["classes"])
    most = [by_type[kind] for kind in MOST_RUN]
    exact = sum(each["outcome"] == "exact" for each in most)
    counted = f"{counts['exact']} exact, {counts['refused']} refused by `attach`, {counts['no model']} not tried"
    return TEMPLATE.read_text().format(
        version=walked["transformers"], all=len(by_type), counted=counted, exact=exact, most=len(most),
        most_run=_table(most), others=_table([e for e in walked["classes"] if e["type"] not in MOST_RUN]),
    )  # fmt: skip


def _table(classes: list[dict[str, str]]) -> str:
    rows = ["| class | model type | outcome | why |", "| --- | --- | --- | --- |"]
    for each in classes:
        rows.append(f"| {each['class']} | {each['type']} | {each['outcome']} | {each['why'].replace('|', '/')} |")
    return "\n".join(rows)


MOST_RUN = """
    llama qwen2 qwen3 qwen2_moe qwen3_moe qwen3_next qwen3_5 mistral mixtral ministral3 gemma gemma2 gemma3 gemma3n_text
    gemma4 gpt_oss llama4 phi phi3 phimoe gpt2 gpt_neo gpt_neox gptj gpt_bigcode opt bloom falcon falcon_h1 deepseek_v2
    deepseek_v3 smollm3 olmo olmo2 olmo3 olmoe granite granitemoe granitemoehybrid stablelm starcoder2 codegen cohere
    cohere2 glm glm4 glm4_moe exaone4 lfm2 jamba bamba mamba nemotron nemotron_h ernie4_5 ernie4_5_moe hunyuan_v1_dense
    seed_oss minimax_m2 apertus
""".split()

if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    walked = {}
    for each in KINDS:
        walked[each] = outcome(each)
        print(f"{walked[each].status:9} {each:26} {' '.join(walked[each].why.split())[:110]}", flush=True)
    RECORD.write_text(json.dumps(record(walked), indent=1) + "\n")
    PAGE.write_text(page(json.loads(RECORD.read_text())))
    print(Counter(each.status for each in walked.values()))
