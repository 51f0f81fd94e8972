"""What the suite gives: for every policy its bytes and, for every set of cases, its scores; tables of them; JSON."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from statistics import fmean, stdev
from typing import Any

from octavo.errors import ConfigError, TextFileError
from octavo.retrofit.results import share_text
from octavo.retrofit.suite.settings import LongSettings


@dataclass(frozen=True)
class SetResult:
    """One policy's scores on one set of cases.

    `metric`: which of the shares the table shows. `nll`: nats per counted token, mean over all of them; `nlls` of each
    case. `exact`: share of answers right throughout; `hits` of each case. `same`: share of counted tokens that are the
    likeliest. `kept`: mean slots per KV head at the end of a case; None for the dense model and SwiftKV alone.
    """

    name: str
    length: int
    metric: str
    cases: int
    answers: int
    nll: float
    exact: float
    same: float
    kept: float | None
    nlls: list[float]
    hits: list[int]

    def to_dense(self, dense: "SetResult") -> tuple[float, float]:
        """(difference to the dense model's figure, its standard error over cases, NaN for one case)."""
        if self.metric == "same":
            return self.same - dense.same, math.nan
        differences = [(a - b) for a, b in zip(self._per_case(), dense._per_case(), strict=True)]
        error = _error(differences)
        return (self.nll - dense.nll if self.metric == "nll" else self.exact - dense.exact), error

    def error(self) -> float:
        """The standard error of the figure itself over cases; NaN for one case, and where cases were not kept."""
        return math.nan if self.metric == "same" else _error(self._per_case())

    def _per_case(self) -> list[float]:
        return self.nlls if self.metric == "nll" else [hits * self.cases / self.answers for hits in self.hits]


def _error(values: Sequence[float]) -> float:
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


@dataclass(frozen=True)
class PolicyResult:
    """One policy: `skipped` as in `results.Row`; `kept` slots per KV head, `nbytes` and `dense_nbytes` after
    `settings.held_at` tokens of the prose. Rivals hold as many slots as the gates named in `budget_of`, so their bytes
    are given as those. `seconds`: how long it was measured."""

    policy: str
    skipped: float | None
    kept: float
    nbytes: int
    dense_nbytes: int
    budget_of: str | None
    seconds: float
    sets: list[SetResult]


@dataclass(frozen=True)
class LongEvaluation:
    """All policies, the dense model first; what was said of the data in `notes`."""

    model: str
    settings: LongSettings
    notes: list[str] = field(default_factory=list)
    policies: list[PolicyResult] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """JSON values only."""
        return {"suite": "long", **asdict(self)}

    @staticmethod
    def from_json(record: Any, where: str = "the record") -> "LongEvaluation":
        """What `to_json` gave. Raises TextFileError for anything else."""
        try:
            settings = {f.name: record["settings"][f.name] for f in fields(LongSettings)}
            settings["lengths"] = tuple(settings["lengths"])
            policies = [
                PolicyResult(**{**row, "sets": [SetResult(**each) for each in row["sets"]]})
                for row in record["policies"]
            ]
            result = LongEvaluation(record["model"], LongSettings(**settings), list(record["notes"]), policies)
        except (KeyError, TypeError, AttributeError, ConfigError) as e:
            raise TextFileError(f"{where} is no record of the long suite: {e}") from e
        rows = [[(each.name, each.length, each.cases) for each in row.sets] for row in policies]
        if not rows or any(row != rows[0] for row in rows):
            raise TextFileError(f"{where} is no record of the long suite: its policies were not read on the same cases")
        return result


def merged(results: Sequence[LongEvaluation], common: bool = False) -> LongEvaluation:
    """Several evaluations on the same cases as one; a policy measured twice counts once.

    `common`: of the sets that all of them have, the others are left out. Raises ConfigError where models, settings or
    cases differ, and where there is no common set.
    """
    first, *rest = [_with_common(each, results) for each in results] if common else results
    policies = {row.policy: row for row in first.policies}
    notes = dict.fromkeys(first.notes)
    dense = first.policies[0]
    for other in rest:
        theirs = other.policies[0]
        same = [abs(a.nll - b.nll) < 0.01 for a, b in zip(dense.sets, theirs.sets, strict=False)]
        if (other.model, _kind(other)) != (first.model, _kind(first)) or not all(same):
            raise ConfigError(
                "records of other models, settings or cases cannot stand in one table; --common leaves out the sets of "
                "cases that not all of them have"
            )
        policies = {row.policy: row for row in other.policies} | policies
        notes |= dict.fromkeys(other.notes)
    ordered = [row for result in results for row in result.policies]
    names = list(dict.fromkeys(row.policy for row in ordered))
    return LongEvaluation(first.model, first.settings, list(notes), [policies[name] for name in names])


def _with_common(result: LongEvaluation, results: Sequence[LongEvaluation]) -> LongEvaluation:
    names, sets = [list(map(_cases, each.policies[0].sets)) for each in results], result.policies[0].sets
    shared = set(names[0]).intersection(*names[1:])
    if not shared:
        raise ConfigError("these records have no set of cases in common")
    kept = [
        replace(row, sets=[s for s, base in zip(row.sets, sets, strict=True) if _cases(base) in shared])
        for row in result.policies
    ]
    return replace(result, policies=kept)


def _cases(measured: SetResult) -> tuple[str, int, int, int]:
    """What tells a set of cases from another; chats of a model's own have other answers each time they are sampled."""
    return measured.name, measured.length, measured.cases, measured.answers


def _kind(result: LongEvaluation) -> Mapping[str, Any]:
    """The settings that decide what the cases are, and the sets that there are."""
    s = asdict(result.settings)
    for name in ("batch_tokens", "baselines", "every_budget"):
        del s[name]
    return {**s, "sets": list(map(_cases, result.policies[0].sets))}


def cells(result: LongEvaluation) -> list[list[str]]:
    """A table, its header first: one line per set of cases, one column per policy.

    NLL to the dense model's, which is given itself; shares in percent, those of exact answers or of equal tokens.
    Behind ±, where there are several cases, the standard error: of the difference to the dense model for NLL, else of
    the figure itself.
    """
    dense = result.policies[0]
    header = ["", *(row.policy for row in result.policies)]
    held = [share_text(row.nbytes, row.dense_nbytes) for row in result.policies]
    lines = [[f"bytes at {result.settings.held_at:,}", *held]]
    if any(row.skipped is not None for row in result.policies):
        lines.append(["layers skipped", *("" if r.skipped is None else f"{r.skipped:.0%}" for r in result.policies)])
    for i, base in enumerate(dense.sets):
        measures = [row.sets[i] for row in result.policies]
        if base.metric == "nll":
            shown = [f"{base.nll:.4f}{_behind(base.error(), '.4f')}"]
            shown += [f"{x:+.4f}{_behind(error, '.4f')}" for x, error in (m.to_dense(base) for m in measures[1:])]
        else:
            shares = [m.exact if base.metric == "exact" else m.same for m in measures]
            shown = [f"{x:.1%}{_behind(100 * m.error(), '.1f')}" for x, m in zip(shares, measures, strict=True)]
        lines.append([label(base), *shown])
    return [header, *lines]


def _behind(error: float, digits: str) -> str:
    return "" if math.isnan(error) else f" ±{error:{digits}}"


def label(each: SetResult) -> str:
    """A set as tables name it."""
    what = {"nll": ", NLL", "exact": "", "same": ", same tokens"}[each.metric]
    return f"{each.name} {each.length:,}{what}"


def markdown(result: LongEvaluation) -> str:
    """The table for a README or a card, with the notes below it."""
    header, *lines = cells(result)
    rows = [header, ["---", *["---:"] * (len(header) - 1)], *lines]
    table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
    return "\n".join([table, *([""] if result.notes else []), *(f"- {note}" for note in result.notes), ""])


def points(result: LongEvaluation) -> dict[str, list[tuple[float, float, str]]]:
    """What the plot draws: per panel, "title: figure (unit)", (share of dense bytes, figure, policy) of every policy.

    Panels: NLL to dense of texts and of repeats, means over sets; points of exact answers lost, mean over tasks; facts.
    """
    panels: dict[str, list[tuple[float, float, str]]] = {
        "texts: NLL to dense (nats per token)": [], "repeats: NLL to dense (nats per token)": [],
        "tasks: exact answers lost (percentage points)": [], "facts: exact answers (%)": [],
    }  # fmt: skip
    dense = result.policies[0]
    for row in result.policies:
        share = row.nbytes / row.dense_nbytes
        pairs = list(zip(row.sets, dense.sets, strict=True))
        repeats = [a.nll - b.nll for a, b in pairs if a.name.startswith("repeat ")]
        texts = [a.nll - b.nll for a, b in pairs if a.metric == "nll" and not a.name.startswith("repeat ")]
        lost = [100 * (b.exact - a.exact) for a, b in pairs if a.metric == "exact" and a.name != "facts"]
        facts = [100 * a.exact for a in row.sets if a.name == "facts"]
        for panel, values in zip(panels.values(), (texts, repeats, lost, facts), strict=True):
            if values:
                panel.append((share, fmean(values), row.policy))
    return {title: panel for title, panel in panels.items() if panel}
