"""An adapter's card in Markdown: what it is, what it was trained with, what was measured."""

from collections.abc import Sequence
from typing import Any

from octavo.dms import Adapter
from octavo.retrofit.results import Row, cells
from octavo.swiftkv import SwiftKVAdapter


def card_text(adapter: Adapter | SwiftKVAdapter) -> str:
    """The card as Markdown text; what `adapter.card` lacks is left out."""
    card = adapter.card
    settings = _flat(card.get("settings", {}))
    data = card.get("data", {})
    lines = [f"# {adapter.name}", "", *_what(adapter), ""]
    lines.append(f"Started from {card.get('init') or _fresh(adapter)}.")
    lines.append("Training: " + ", ".join(f"{k} {v}" for k, v in settings.items()) + ".")
    lines.append("Data: " + ", ".join(_source(k, v, card.get("tokens", {}).get(k)) for k, v in data.items()) + ".")
    if "sampled" in card:
        lines.append(_sampled(card["sampled"]))
    if "evaluation" in card:
        lines += ["", *_evaluation(card["evaluation"])]
    if "search" in card:
        lines += ["", *_search(card["search"])]
    return "\n".join(lines) + "\n"


def _what(adapter: Adapter | SwiftKVAdapter) -> list[str]:
    kind = adapter.fingerprint["model_type"]
    if isinstance(adapter, SwiftKVAdapter):
        spec = adapter.transform.spec
        shared = "" if spec.group == 1 else f", in groups of {spec.group} that share keys and values"
        handed = f" Tokens hand {spec.before} numbers to the one after them." if spec.before else ""
        return [
            f"SwiftKV weights for a {kind} model: prompt tokens skip {spec.upper} of {spec.layers} layers "
            f"({spec.upper / spec.layers:.0%}; K={spec.kv_layers}){shared}.{handed}"
        ]
    gates = adapter.gates.spec
    on = f", made on SwiftKV with K={adapter.made_on['kv_layers']}" if adapter.made_on else ""
    if adapter.made_on and adapter.made_on.get("before"):
        on += f" whose tokens hand on {adapter.made_on['before']} numbers"
    places = f"{gates.layers} layers" if not adapter.made_on else f"{gates.layers} KV layers"
    return [
        f"DMS gates for a {kind} model with {places}{on}; window "
        f"{gates.eviction.window}, shift {gates.eviction.shift}, one decision per {gates.granularity}, "
        f"trained for {adapter.target:g} tokens per kept token."
    ]


def _fresh(adapter: Adapter | SwiftKVAdapter) -> str:
    if isinstance(adapter, Adapter):
        return "gates that keep everything"
    start = adapter.card.get("settings", {}).get("swiftkv", {}).get("start")
    return "keys and values fitted by regression" if start == "regression" else "the model's own projections"


def _source(name: str, share: float, tokens: int | None) -> str:
    return f"{name} (share {share:g}{'' if tokens is None else f', {tokens:,} tokens'})"


def _sampled(found: dict[str, Any]) -> str:
    kinds = " and ".join(f"{found[kind]:,} {kind}" for kind in ("chats", "completions") if found.get(kind))
    notes = "".join(f" {note[0].upper()}{note[1:]}." for note in found["notes"])
    return (
        f"The model sampled {found['tokens']:,} tokens at temperature 0.7 from {found['prompts']:,} made-up prompts, "
        f"seed {found['seed']}: {kinds}.{notes}"
    )


def _evaluation(measured: dict[str, Any]) -> list[str]:
    s, questions = measured["settings"], measured.get("questions")
    asked = f", greedy answers to {questions} questions" if questions else ""
    return [
        f"Measured on held-out text: NLL past token {s['nll_from']} of {s['nll_length']} ({s['texts']} texts)"
        f"{needles_phrase(s['lengths'], s['cases'])}, bytes after the first text{asked}.",
        "",
        *_table(cells(s["lengths"], [Row(**row) for row in measured["rows"]])),
    ]


def needles_phrase(lengths: Sequence[int], cases: int) -> str:
    """For captions, after what else was measured: how many needles, or nothing where none were looked for."""
    return f", {cases} needles per length" if lengths else ""


def _search(found: dict[str, Any]) -> list[str]:
    s = found["evaluation"]
    rows = [
        [
            row["name"],
            f"{row['skip']:.1%}",
            str(row["group"]),
            f"{row['loss']:.4f}",
            f"{row['nll']:.4f}",
            f"{row['to_base']:+.4f}",
        ]
        for row in found["rows"]
    ]
    return [
        f"Shares of one search, {found['settings']['steps']} steps each: NLL past token {s['nll_from']} of "
        f"{s['nll_length']} ({s['texts']} texts), "
        f"base {found['base_nll']:.4f}, limit {found['limit']:+.3f}.",
        "",
        *_table([["adapter", "layers skipped", "group", "final loss", "NLL", "to base"], *rows]),
    ]


def _table(lines: list[list[str]]) -> list[str]:
    heads, *rows = ["| " + " | ".join(line) + " |" for line in lines]
    return [heads, "|" + " --- |" * len(lines[0]), *rows]


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of parts get the part's name."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        parts = {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
        flat |= parts
    return flat
