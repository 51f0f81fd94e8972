"""Timing on a noisy machine: whatever is compared runs in every round, in a new order each time.

A ratio is taken within each round, between neighbours in time; its median and quartiles over the rounds are reported.
"""

import math
import os
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import import_module
from typing import Any, NamedTuple

from octavo.vdb import kernels


class Spread(NamedTuple):
    """Median and quartiles."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Measurement:
    """One engine in one case: what it took, round by round."""

    part: str  # exact, build, graph, calls, files
    case: dict[str, Any]  # what every engine of a comparison was asked to do; the engines of a case ran alternating
    engine: str
    unit: str  # "queries/s", of which more is better; "s" or "us", of which less is
    samples: list[float]  # one per round
    facts: dict[str, Any] = field(default_factory=dict)  # recall, bytes

    @property
    def spread(self) -> Spread:
        """Median and quartiles of the samples."""
        return spread(self.samples)

    def to_json(self) -> dict[str, Any]:
        """All fields, and the median and quartiles of the samples."""
        return {**asdict(self), **self.spread._asdict()}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "Measurement":
        """The inverse of `to_json`."""
        return cls(**{name: record[name] for name in ("part", "case", "engine", "unit", "samples", "facts")})


def spread(samples: Sequence[float]) -> Spread:
    """Median and quartiles of at least one number."""
    if len(samples) == 1:
        return Spread(samples[0], samples[0], samples[0])
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Spread(statistics.median(samples), low, high)


def cases(measured: Iterable[Measurement], part: str) -> list[tuple[dict[str, Any], dict[str, Measurement]]]:
    """The cases of a part in their order, each with its engines by name."""
    found: list[tuple[dict[str, Any], dict[str, Measurement]]] = []
    for m in measured:
        if m.part == part:
            engines = next((engines for case, engines in found if case == m.case), None)
            if engines is None:
                engines = {}
                found.append((m.case, engines))
            engines[m.engine] = m
    return found


def times_better(ours: Measurement, theirs: Measurement) -> Spread:
    """How many times better than `theirs` the first is; above 1 it wins. Round by round, both of one case."""
    pairs = zip(ours.samples, theirs.samples, strict=True)
    return spread([a / b if ours.unit == "queries/s" else b / a for a, b in pairs])


def alternate(tasks: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Samples [rounds] of every task. Each runs once a round, in an order drawn anew: no fixed neighbours."""
    samples: dict[str, list[float]] = {name: [] for name in tasks}
    draw = random.Random(0)
    order = list(tasks)
    for _ in range(rounds):
        draw.shuffle(order)
        for name in order:
            samples[name].append(tasks[name]())
    return samples


def seconds(call: Callable[[], object]) -> float:
    """Wall-clock seconds of one call; what it returns is freed afterwards."""
    began = time.perf_counter()
    kept = call()
    took = time.perf_counter() - began
    del kept
    return took


def rate(call: Callable[[int], object], aim: float) -> Callable[[], float]:
    """A task that measures calls per second over as many calls as fill about `aim` seconds.

    `call` is given a running number and has been called twice when this returns.
    """
    call(0)
    took = seconds(lambda: call(1))
    count = min(max(math.ceil(aim / max(took, 1e-9)), 1), 100_000)

    def task() -> float:
        began = time.perf_counter()
        for number in range(count):
            call(number)
        return count / (time.perf_counter() - began)

    return task


def prepare_process() -> None:
    """Settings that libraries read when they are loaded; call it before numpy is imported.

    OpenBLAS is told of AVX-512 where there is one, and idle OpenMP threads sleep instead of taking the next engine's
    time.
    """
    if kernels() in ("avx512", "amx"):
        os.environ.setdefault("OPENBLAS_CORETYPE", "SkylakeX")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def installed(package: str) -> bool:
    """Whether a package is there and can be imported."""
    try:
        import_module(package)
    except ImportError:
        return False
    return True


def package(name: str) -> Any:
    """An optional package, imported now."""
    return import_module(name)


@contextmanager
def blas_threads(count: int) -> Iterator[None]:
    """Every BLAS and OpenMP that is loaded uses `count` threads in here, if threadpoolctl is installed."""
    if not installed("threadpoolctl"):
        yield
        return
    with package("threadpoolctl").threadpool_limits(limits=count):
        yield
