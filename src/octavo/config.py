"""Frozen settings shared by the rooms, each checked once, when it is made."""

from dataclasses import dataclass

from octavo.errors import ConfigError

KV_DTYPES = ("int8", "fp8")  # quantised forms that pages may have
UNDO = 32  # tokens that caches can take back once drafts are asked for
NEVER = 2**31 - 1  # the expiry of a slot that is kept for ever (int32 max)


_UNITS = {"B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def nbytes(size: object, name: str) -> int:
    """Bytes of a size such as 10**9, "512MiB" or "2 GiB"; errors call it `name`. Raises ConfigError."""
    if isinstance(size, int) and not isinstance(size, bool):
        return size
    text = str(size).replace(" ", "").upper()
    digits = text.rstrip("BKMGTI")
    try:
        return int(float(digits) * _UNITS[text[len(digits) :] or "B"])
    except (KeyError, ValueError, OverflowError) as e:
        raise ConfigError(f"{name} must be a number of bytes or a text such as '2GiB', not {size!r}") from e


def _positive(name: str, value: int) -> None:
    if value < 1:
        raise ConfigError(f"{name} must be at least 1, not {value}")


@dataclass(frozen=True)
class Eviction:
    """When a marked token is forgotten.

    A token marked at position i is visible to queries up to position i + `window`. With `shift` 1 the mark of
    token i is read at token i + 1 (the published DMS checkpoints), with 0 at token i itself.
    """

    window: int
    shift: int = 0

    def __post_init__(self) -> None:
        _positive("window", self.window)
        if self.shift not in (0, 1):
            raise ConfigError(f"shift must be 0 or 1, not {self.shift}")


@dataclass(frozen=True)
class CacheSettings:
    """How an attached model keeps its keys and values.

    `chunk`: tokens per prefill step. `page_size`: slots per page. `budget`: bytes that the pages of all caches
    may take, None for no limit. `kv_dtype`: how slots are stored, "int8" or "fp8" with a scale each, or None for
    the model's dtype. `cuda_graphs`: run decode steps and prompts on CUDA from graphs. `compiled`: with small
    pieces of the layers as `torch.compile` makes them, in prompts too. `undo`: tokens that a cache can take back, None
    for `UNDO` as soon as drafts are asked for.
    """

    chunk: int
    page_size: int = 16
    budget: int | None = None
    kv_dtype: str | None = None
    cuda_graphs: bool = False
    compiled: bool = False
    undo: int | None = None

    def __post_init__(self) -> None:
        _positive("chunk", self.chunk)
        _positive("page_size", self.page_size)
        if self.budget is not None:
            _positive("budget", self.budget)
        if self.kv_dtype not in (None, *KV_DTYPES):
            raise ConfigError(f"kv_dtype must be {' or '.join(KV_DTYPES)}, or None for the model's dtype")
        if self.undo is not None and self.undo < 0:
            raise ConfigError(f"undo must be at least 0, not {self.undo}")
        if self.compiled and not self.cuda_graphs:
            raise ConfigError("compile needs cuda_graphs=True: pieces are compiled for the graphs alone")
