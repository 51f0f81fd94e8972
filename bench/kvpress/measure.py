"""kvpress's methods on the tasks of `octavo evaluate --suite long`, at the slots that Octavo's gates keep there.

It needs an environment of its own, since kvpress wants one version of transformers (see README.md here), and writes a
record that `octavo compare --common` sets beside Octavo's own.

All tokens of a case before the first answer are one prefill, in which every token attends to all before it; then the
press takes away what it will; then questions and answers are read over what is left. So, unlike in kvpress's pipeline,
which shows a press no question, it sees the first one before it chooses, and chooses once. Gates choose while they read
and have seen no question.
Slots are counted at the end of a case: the press keeps so many of the context that with all tokens after it there are
as many as the gates hold, on average over heads.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from octavo.models.load import load_plain
from octavo.retrofit.readout import Readout, readout
from octavo.retrofit.suite import LongEvaluation, SuiteTexts, read_suite_text
from octavo.retrofit.suite.cases import CaseSet
from octavo.retrofit.suite.results import PolicyResult, SetResult
from octavo.retrofit.suite.run import summed
from octavo.retrofit.suite.scoring import Scores, score_case
from octavo.retrofit.suite.tasks import task_sets

SAME = 0.01  # nats by which machines may differ
LEAST = 64  # slots of a context that every press keeps: windows of the newest tokens are as long


def presses() -> dict[str, Callable[[float], Any]]:
    """By name, what makes a press of a compression ratio: the share of a context's slots that go."""
    import kvpress

    return {
        "StreamingLLM": lambda ratio: kvpress.StreamingLLMPress(ratio),
        "Knorm": lambda ratio: kvpress.KnormPress(ratio),
        "SnapKV": lambda ratio: kvpress.SnapKVPress(ratio),
        "PyramidKV": lambda ratio: kvpress.PyramidKVPress(ratio),
        "TOVA": lambda ratio: kvpress.TOVAPress(ratio),
        "ExpectedAttention": lambda ratio: kvpress.ExpectedAttentionPress(ratio),
        "KeyDiff": lambda ratio: kvpress.KeyDiffPress(ratio),
        "AdaKV SnapKV": lambda ratio: kvpress.AdaKVPress(kvpress.SnapKVPress(ratio)),
        "AdaKV ExpectedAttention": lambda ratio: kvpress.AdaKVPress(kvpress.ExpectedAttentionPress(ratio)),
    }


@contextmanager
def over_what_is_left(model: PreTrainedModel, cache: DynamicCache, tokens: int) -> Iterator[None]:
    """Let `tokens` new tokens see all slots that a press left, whatever their number in a layer, and each other.

    AdaKV leaves all slots and names those that a head may not see; with many queries kvpress's way to hide them fails
    (it looks for one key that is far from all of them), so they are masked here.
    """

    def mask(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        held = cache.layers[module.layer_idx].keys.shape[2]
        heads, groups = model.config.num_attention_heads, module.num_key_value_groups
        seen = torch.ones(1, heads, tokens, held + tokens, dtype=torch.bool, device=model.device)
        seen[..., held:] = seen[..., held:].tril()
        hidden = getattr(module, "masked_key_indices", None)
        if hidden is not None:
            _, head, slot = hidden
            for each in range(groups):
                seen[0, head * groups + each, :, slot] = False
            module.masked_key_indices = None
        return args, {**kwargs, "attention_mask": seen}

    layers: Any = model.base_model.layers
    hooks = [layer.self_attn.register_forward_pre_hook(mask, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def read(model: PreTrainedModel, press: Any, ids: Tensor, first: int) -> tuple[Tensor, float]:
    """(last hidden states [T, hidden], zero before token `first` - 1; slots per head at the end, mean over layers).

    `ids` [T]; `press` None keeps everything. All tokens before the first answer are the prefill, whose last state says
    the answer's first token: it was computed before anything was taken away.
    """
    cache, base = DynamicCache(config=model.config), model.base_model
    ids = ids.to(model.device)[None]
    with nullcontext() if press is None else press(model):
        read_first = base(input_ids=ids[:, :first], past_key_values=cache, use_cache=True).last_hidden_state[0]
    modules = [layer.self_attn for layer in base.layers]
    gone = [getattr(module, "masked_key_indices", None) for module in modules]
    rest = ids.shape[1] - first
    kv_heads = model.config.num_key_value_heads
    left = [
        layer.keys.shape[2] - (0 if hidden is None else len(hidden[0]) / kv_heads)
        for layer, hidden in zip(cache.layers, gone, strict=True)
    ]
    positions = torch.arange(first, ids.shape[1], device=model.device)
    with over_what_is_left(model, cache, rest):
        out = base(
            input_ids=ids[:, first:], past_key_values=cache, use_cache=True, position_ids=positions[None],
            cache_position=positions,
        ).last_hidden_state  # fmt: skip
    states = torch.zeros(ids.shape[1], out.shape[-1], dtype=out.dtype, device=out.device)
    states[first - 1], states[first:] = read_first[-1], out[0]
    return states, sum(left) / len(left) + rest


def measure(
    model: PreTrainedModel, head: Readout, cases: CaseSet, make: Callable[[float], Any] | None, kept: float | None
) -> SetResult:
    """One press (None: dense) on a set of cases; `kept`: slots per head that it may hold at the end of a case."""
    out, held = Scores([], [], [], [], None), []
    for ids, spans in zip(cases.ids, cases.spans, strict=True):
        context = spans[0][0]
        press = None
        if make is not None:
            assert kept is not None
            wanted = max(LEAST, kept - (cases.length - context))
            press = make(max(0.0, 1 - wanted / context))
        states, slots = read(model, press, ids, spans[0][0])
        held.append(slots)
        score_case(head, states, ids, spans, out)
    return summed(cases, out, None if make is None else sum(held) / len(held))


def begun(out: Path, ours: LongEvaluation, gates: str, sets: list[tuple[str, int]]) -> list[PolicyResult]:
    """The rows of an interrupted or earlier run over the same `sets`, (name, length), at the slots of the same gates;
    none where there was none."""
    if not out.exists():
        return []
    found = LongEvaluation.from_json(json.loads(out.read_text()), str(out))
    if (found.model, found.settings) != (ours.model, ours.settings) or any(
        [(each.name, each.length) for each in row.sets] != sets or row.budget_of not in (None, gates)
        for row in found.policies
    ):
        raise SystemExit(f"{out} is of another run: other cases, lengths, gates or model; name another file")
    return found.policies


def check_same(dense: list[SetResult], ours: list[SetResult]) -> None:
    """Exit where the dense model does not read the cases as it did in Octavo's record."""
    expected = {(each.name, each.length): each.nll for each in ours}
    for each in dense:
        wanted = expected[each.name, each.length]
        if abs(each.nll - wanted) > SAME:
            raise SystemExit(
                f"{each.name} at {each.length} has NLL {each.nll:.4f}, in the record {wanted:.4f}: give the same texts "
                "and the same model"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path, help="JSON of 'octavo evaluate --suite long', whose cases are read")
    parser.add_argument("--as", dest="gates", required=True, help="the policy in it whose slots the presses keep")
    parser.add_argument("--text", type=Path, required=True, help="the prose that it was made with")
    parser.add_argument("--code", type=Path, help="and the code")
    parser.add_argument("--press", nargs="*", help="some of them; all by default")
    parser.add_argument("--lengths", type=int, nargs="*", help="some of its lengths; all by default")
    parser.add_argument("--out", type=Path, required=True, help="record; rows that it has already are not read again")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    ours = LongEvaluation.from_json(json.loads(args.record.read_text()), str(args.record))
    found = {row.policy: row for row in ours.policies}
    if args.gates not in found or any(each.kept is None for each in found[args.gates].sets):
        parser.error(f"{args.record} holds no gates {args.gates!r}; it has {', '.join(found)}")
    made, all_presses = {}, presses()
    for name in args.press or all_presses:
        if name not in all_presses:
            parser.error(f"no press {name!r}; there are {', '.join(all_presses)}")
        made[name] = all_presses[name]
    model, tokenizer = load_plain(dtype=torch.bfloat16 if args.device == "cuda" else torch.float32, device=args.device)
    model.eval()
    settings = replace(ours.settings, lengths=tuple(args.lengths or ours.settings.lengths))
    longest = max(ours.settings.nll_length, ours.settings.held_at, *ours.settings.lengths)
    texts = SuiteTexts(
        read_suite_text(args.text, tokenizer, longest),
        None if args.code is None else read_suite_text(args.code, tokenizer, longest),
    )
    sets, head, theirs = list(task_sets(tokenizer, texts, settings)), readout(model), found[args.gates]
    kept = {(each.name, each.length): each.kept for each in theirs.sets}
    policies = begun(args.out, ours, args.gates, [(each.name, each.length) for each in sets])
    for name, make in [("dense", None), *made.items()]:
        if name in {row.policy for row in policies}:
            continue
        start = time.perf_counter()
        row = [measure(model, head, each, make, kept[each.name, each.length]) for each in sets]
        if make is None:
            check_same(row, found["dense"].sets)
        dense = found["dense"] if make is None else theirs  # what it may hold is what the gates hold
        policies.append(
            PolicyResult(
                name, None, dense.kept, dense.nbytes, dense.dense_nbytes, None if make is None else args.gates,
                time.perf_counter() - start, row,
            )
        )  # fmt: skip
        for each in row:
            print(
                f"{name:24} {each.name:16} {each.length:6,} NLL {each.nll:.4f} exact {each.exact:.1%} kept {each.kept}"
            )
        note = f"kvpress: one prefill that sees the first question, then a choice; slots as {args.gates}"
        result = LongEvaluation(ours.model, ours.settings, [note], policies)
        args.out.write_text(json.dumps(result.to_json()) + "\n")


if __name__ == "__main__":
    main()
