"""What a run trains and how: gates, SwiftKV weights or both; and the schedules that follow from it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

from octavo.dms import Adapter
from octavo.errors import ConfigError
from octavo.swiftkv import SwiftKVAdapter

EXERCISES = 0.4  # share of the data; measured with books and code at 0.3 each, see docs/experiments.md
LARGEST_LR = 1.0  # Adam moves a weight by about lr a step: past this it overflows rather than learns


@dataclass(frozen=True)
class GateSettings:
    """How gates are trained.

    `target`: tokens per kept token asked for at the end, reached linearly after `ramp` of the steps; the
    learning rate then falls linearly to a tenth. The eviction still missing is taken per micro-batch
    (`dms.objective`). `shift` 1 reads a token's mark one token later, as published checkpoints do.
    """

    target: float = 8.0
    window: int = 256
    lr: float = 2e-4
    ramp: float = 0.6
    temperature: float = 0.1
    eviction_weight: float = 1.0
    shift: int = 0

    def __post_init__(self) -> None:
        _check_finite(self)
        if self.shift not in (0, 1):
            raise ConfigError(f"shift must be 0 or 1, not {self.shift}")
        if self.window < 1:
            raise ConfigError(f"window must be at least 1, not {self.window}")
        if self.target < 1 or not 0 < self.lr <= LARGEST_LR or not 0 < self.ramp <= 1 or not self.temperature > 0:
            raise ConfigError("target must be at least 1, lr and ramp in (0, 1] and temperature positive")
        if not self.eviction_weight >= 0:
            raise ConfigError(f"eviction_weight must not be negative, but is {self.eviction_weight}")

    @property
    def name(self) -> str:
        """Of gates trained together with SwiftKV weights, where none is given."""
        return f"dms-{self.target:g}x"

    def lr_at(self, step: int, steps: int) -> float:
        """Constant while the target rises, then linear to a tenth."""
        after = step / steps - self.ramp
        return self.lr * (1.0 if step < self.ramp * steps else 1.0 - 0.9 * after / (1 - self.ramp))


@dataclass(frozen=True)
class SwiftSettings:
    """How SwiftKV weights are trained: `kv_layers` and `group` as in `SwiftSpec`.

    The learning rate rises over the share `warmup` of the steps, then falls linearly to nearly zero. `lr` 0 keeps
    the weights as they are, for gates that learn on them. `temperature` is that of the KL; `mse_weight` multiplies
    the error of the hidden states before the last layer. `start`: the published recipe's averages, or keys and
    values fitted in closed form (`regression.py`). `before`: numbers that tokens hand on, as in `SwiftSpec`.
    """

    kv_layers: int
    group: int = 1
    lr: float = 5e-4
    warmup: float = 0.05
    temperature: float = 2.0
    mse_weight: float = 1.0
    start: str = "published"
    before: int = 0

    def __post_init__(self) -> None:
        _check_finite(self)
        if self.kv_layers < 1 or self.group < 1:
            raise ConfigError(f"kv_layers and group must be at least 1, not {self.kv_layers} and {self.group}")
        if not 0 <= self.lr <= LARGEST_LR or not 0 <= self.warmup < 1:
            raise ConfigError(f"lr must lie in [0, 1] and warmup in [0, 1), not {self.lr:g} and {self.warmup:g}")
        if not self.temperature > 0 or not self.mse_weight >= 0:
            raise ConfigError("temperature must be positive and mse_weight must not be negative")
        if type(self.before) is not int or self.before < 0:
            raise ConfigError(f"before must be a whole number, at least 0, not {self.before!r}")
        if self.start not in ("published", "regression"):
            raise ConfigError(f"start must be published or regression, not {self.start!r}")

    def lr_at(self, step: int, steps: int) -> float:
        """Linear up over the warm-up, then linear down."""
        warm = self.warmup * steps
        return self.lr * min((step + 1) / max(1.0, warm), (steps - step) / max(1.0, steps - warm))


@dataclass(frozen=True)
class RetrofitSettings:
    """One run: `gates`, `swiftkv` or both are trained.

    `batch` sequences of `length` tokens a step over all processes, `micro_batch` at once, which only splits the
    work but for the noise and the missing eviction of gates; `recall` and `exercises`: shares of the data made by
    `recall_sequence` and `exercise_sequence`, the rest is text as it stands.
    """

    gates: GateSettings | None = None
    swiftkv: SwiftSettings | None = None
    steps: int = 200
    batch: int = 8
    micro_batch: int = 4
    length: int = 8192
    recall: float = 0.25
    seed: int = 0
    checkpoint_every: int = 25
    exercises: float = 0.0

    def __post_init__(self) -> None:
        _check_finite(self)
        for name in ("steps", "batch", "micro_batch", "length", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("recall", "exercises"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must lie in [0, 1], not {getattr(self, name)}")
        if self.recall + self.exercises > 1:
            raise ConfigError(
                f"recall {self.recall:g} and exercises {self.exercises:g} are shares of the data and exceed 1 together"
            )
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed must lie in 0..2**63 - 1, not {self.seed}")
        if self.gates is None and self.swiftkv is None:
            raise ConfigError("nothing to train: give settings for gates, for SwiftKV or for both")
        if self.gates is not None and self.gates.window >= self.length:
            raise ConfigError(
                f"window {self.gates.window} must be shorter than length {self.length}, or nothing is evicted"
            )
        if self.gates is None and self.swiftkv is not None and self.swiftkv.lr == 0:
            raise ConfigError("lr must be positive where only SwiftKV weights are trained")

    @property
    def temperature(self) -> float:
        """Of the KL: 1 for gates alone."""
        return 1.0 if self.swiftkv is None else self.swiftkv.temperature


def _check_finite(settings: GateSettings | SwiftSettings | RetrofitSettings) -> None:
    for field in fields(settings):
        value = getattr(settings, field.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{field.name} must be a finite number, not {value}")


def exercises_for(recall: float, exercises: float | None) -> float:
    """The share of exercises where none was asked for: `EXERCISES`, or what `recall` leaves of it."""
    return max(0.0, min(EXERCISES, 1 - recall)) if exercises is None else exercises


def shape_for(
    layers: int,
    skip: float | None,
    kv_layers: int | None,
    group: int | None,
    init: Sequence[Adapter | SwiftKVAdapter] = (),
) -> tuple[int, int]:
    """(K, group) from what was asked for; what was left out is as in the SwiftKV adapter of `init`, else a third and 1.

    Raises ConfigError.
    """
    if skip is not None and kv_layers is not None:
        raise ConfigError("give the share of layers to skip or the number that are not, not both")
    given = [a.transform.spec for a in init if isinstance(a, SwiftKVAdapter)]
    if group is None:
        group = given[0].group if given else 1
    if kv_layers is None:
        kv_layers = (
            given[0].kv_layers
            if given and skip is None
            else kv_layers_for(layers, 0.33 if skip is None else skip, group)
        )
    return kv_layers, group


def before_for(before: int | None, init: Sequence[Adapter | SwiftKVAdapter] = ()) -> int:
    """Numbers that tokens hand on: `before`, or where that is None as in the SwiftKV adapter of `init`, else 0."""
    given = [a.transform.spec.before for a in init if isinstance(a, SwiftKVAdapter)]
    return before if before is not None else given[0] if given else 0


def gates_for(
    target: float | None, window: int | None, init: Sequence[Adapter | SwiftKVAdapter] = ()
) -> tuple[float, int]:
    """(target, window) from what was asked for; what was left out is as in the gates of `init`, else 8 and 256."""
    given = [(a.target, a.gates.spec.eviction.window) for a in init if isinstance(a, Adapter)]
    old_target, old_window = given[0] if given else (GateSettings.target, GateSettings.window)
    return old_target if target is None else target, old_window if window is None else window


def gates_name_for(name: str | None, target: float | None, init: Sequence[Adapter | SwiftKVAdapter] = ()) -> str | None:
    """The name of gates inside a SwiftKV adapter: `name`, else that of `init`'s where their target stays; None: by
    their target."""
    given = [a.name for a in init if isinstance(a, Adapter)]
    return name or (given[0] if given and target is None else None)


def kv_layers_for(layers: int, skip: float, group: int = 1) -> int:
    """K such that at least the share `skip` of the layers is skipped, in whole groups. Raises ConfigError."""
    if not 0 < skip < 1:
        raise ConfigError(f"the skipped share must lie between 0 and 1, not {skip}")
    if group < 1:
        raise ConfigError(f"group must be at least 1, not {group}")
    upper = math.ceil(layers * skip - 1e-9)  # 0.9 of 30 is 27, whatever floats say
    upper = math.ceil(upper / group) * group
    if not 1 <= layers - upper < layers:
        raise ConfigError(f"skipping {skip:g} of {layers} layers in groups of {group} leaves none to begin with")
    return layers - upper
