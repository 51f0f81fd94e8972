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
    return PROSE.format(
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

PROSE = """# Which models can be attached

Made by `PYTHONPATH=src:tests python tests/decoder_walk.py` with transformers {version}, which makes a tiny random model of each of the
{all} types that `AutoModelForCausalLM` knows. *Exact*: attached without an adapter, in chunks of 16 and 512, alone and in a
left-padded batch of two, in float32, logits and 12 greedy tokens are those of the unattached model within 1e-4; and with random gates,
logits over pages from which tokens were evicted are those under the hard mask within 1e-4. *Refused*: `octavo.attach` raises
`UnsupportedModelError` with the reason, before anything runs. *No model*: transformers makes none that small here. A test walks a few
types in each run and all with `--full`, and compares this page with what it finds.

Of all: {counted}. Of the {most} text-generation architectures that people run most ([below](#the-most-run), chosen from transformers'
documentation): {exact} exact.

`octavo models` prints the table, `octavo models ID` what `attach` would do with a model by its configuration alone.

## What goes with what

`attach` runs three tokens through a model to see which modules attend, to which keys, and what they tell their attention. So a model
with code of its own is attached or refused like any other.

| layers | pages | gates | snapshots, reuse store | `crop` |
| --- | --- | --- | --- | --- |
| full attention | yes | yes | yes | yes |
| sliding and chunked windows | a window of slots | can only shorten it | snapshots; no store | within the window |
| linear attention, Mamba, short convolutions | states beside the pages, as transformers keeps them | in the layers that attend | refused | refused |
| layers that read another layer's keys (Gemma 3n, Gemma 4) | stored once | those of the layer that stores them | yes | yes |
| layers of unequal heads or head sizes (Gemma 4, MiMo) | a head that a layer lacks holds one slot; shorter keys are filled up | yes | yes | within the window |

Where a model reads pictures too, `attach` joins the language model inside it, and pictures enter as embeddings; masks in which the tokens
of a picture see each other in both directions are refused when such a picture comes. Jamba's Mamba layers go on from a state with one
token at a time, so its first prompt is read in one piece and later ones token by token.

## Why latent attention is refused

DeepSeek V2 and V3, Kimi, GLM 4 MoE Lite and others project keys and values of all heads from one latent vector, and transformers
caches that latent and one rotary key per token and layer. What it gives to the attention function is every head's keys and values,
made anew of all latents in each step. Octavo's pages would hold those, in these many elements per token and layer (from the models'
configurations):

| model | latent and rotary key | all heads' keys and values | ratio | ratio with 7 of 8 evicted |
| --- | ---: | ---: | ---: | ---: |
| DeepSeek V3 (128 heads) | 576 | 40,960 | 71 | 8.9 |
| MiniCPM3 (40 heads) | 288 | 6,400 | 22 | 2.8 |
| GLM 4 MoE Lite (20 heads) | 576 | 10,240 | 18 | 2.2 |
| DeepSeek V2 Lite (16 heads) | 576 | 5,120 | 8.9 | 1.1 |

So even with gates it would cost memory. DMS that pays there decides once per layer about a slot of the latent, which needs attention
over latents (queries turned into their space), and gates trained for one decision per layer.

## The most run

{most_run}

## All others

{others}
"""

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
