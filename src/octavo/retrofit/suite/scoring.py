"""Reads the cases of a set under a policy, without a cache, where what is forgotten is masked: the same function."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from octavo.dms import HardGates, Policy
from octavo.retrofit.measuring import at_once
from octavo.retrofit.readout import Readout
from octavo.retrofit.suite.cases import CaseSet
from octavo.swiftkv import SwiftKV

PART = 1024  # tokens whose logits are made at once


@dataclass(frozen=True)
class Scores:
    """Of every case: mean NLL of its counted tokens, exact answers, tokens that were the likeliest, tokens counted.

    `kept`: mean slots per KV head at the end of a case under gates, recent ones included; None without gates.
    """

    nll: list[float]
    exact: list[list[bool]]
    likeliest: list[int]
    counted: list[int]
    kept: float | None


@torch.no_grad()
def score(
    model: PreTrainedModel,
    head: Readout,
    policy: Policy | None,
    transform: SwiftKV | None,
    cases: CaseSet,
    batch_tokens: int,
) -> Scores:
    """All cases of a set; `head` reads the model's logits.

    All batches have one shape, since kernels are compiled for shapes; the last is filled up.
    """
    read = at_once(model, policy, transform)
    out = Scores([], [], [], [], None)
    held: list[Tensor] = []
    total = len(cases.ids)
    batch = min(total, max(1, batch_tokens // cases.length))
    for first in range(0, total, batch):
        real = min(batch, total - first)
        rows = torch.arange(first, first + batch).clamp(max=total - 1)
        ids = cases.ids[rows]
        hidden = read(ids)
        for row in range(real):
            score_case(head, hidden[row], ids[row], cases.spans[first + row], out)
        if isinstance(policy, HardGates):
            marked = torch.stack(policy.marked)[:, :real]  # [L, B, H, T]
            old = max(0, cases.length - policy.window)
            held.append(cases.length - marked[..., :old].sum(-1).float().mean(dim=(0, 2)))
    kept = torch.cat(held).mean().item() if held else None
    return Scores(out.nll, out.exact, out.likeliest, out.counted, kept)


def score_case(head: Readout, hidden: Tensor, ids: Tensor, spans: list[tuple[int, int]], out: Scores) -> None:
    """Add one case's scores: hidden [T, hidden], ids [T]."""
    at = torch.cat([torch.arange(a, b) for a, b in spans])
    gold = ids[at].to(hidden.device)
    states = hidden[(at - 1).to(hidden.device)]
    total, right = 0.0, []
    for part, expected in zip(states.split(PART), gold.split(PART), strict=True):  # type: ignore[no-untyped-call]
        logits = head(part).float()
        total += F.cross_entropy(logits, expected, reduction="sum").item()
        right.append(logits.argmax(-1) == expected)
    hits = torch.cat(right).cpu()
    sizes = [b - a for a, b in spans]
    out.nll.append(total / len(hits))
    out.exact.append([bool(part.all()) for part in hits.split(sizes)])  # type: ignore[no-untyped-call]
    out.likeliest.append(int(hits.sum()))
    out.counted.append(len(hits))
