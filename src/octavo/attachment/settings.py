"""Settings as users give them, checked by value and by type before anything is made of them."""

from typing import Any

from octavo.config import CacheSettings
from octavo.errors import CacheBudgetError, ConfigError
from octavo.kv import CacheShape, Memory

MOST_BYTES = 2**46  # what a process can address
MOST_CHUNK = 2**31 - 1  # positions are int32
MOST_SLOTS = 2**20  # of a page; sensible ones have 16 to 64
MOST_UNDO = 2**16  # tokens; drafts have tens


def cache_settings(
    shape: CacheShape, chunk: object, page_size: object, budget: object, kv_dtype: str | None, cuda_graphs: bool,
    compiled: bool, undo: object = None,
) -> CacheSettings:  # fmt: skip
    """The settings of all caches of a model that looks like `shape`. Raises ConfigError, naming what is allowed."""
    settings = CacheSettings(
        whole("chunk", chunk, MOST_CHUNK, "tokens"),
        whole("page_size", page_size, MOST_SLOTS, "slots"),
        byte_budget(budget),
        kv_dtype,
        bool(cuda_graphs),
        bool(compiled),
        None if undo is None else whole("undo", undo, MOST_UNDO, "tokens", 0),
    )
    if settings.budget is not None and shape.device.type != "meta":
        try:
            Memory(shape.layout(settings), shape.kv_heads, shape.device, settings.budget)
        except CacheBudgetError as e:
            raise ConfigError(str(e)) from e
        except (MemoryError, OSError, RuntimeError) as e:  # what systems say to ranges that they cannot address
            raise ConfigError(f"{shape.device} cannot address a budget of {settings.budget:,} bytes: {e}") from e
    return settings


def byte_budget(value: object) -> int | None:
    """A budget in bytes, or None for no bound. Raises ConfigError."""
    return None if value is None else whole("budget", value, MOST_BYTES, "bytes")


def whole(name: str, value: Any, most: int, unit: str, least: int = 1) -> int:
    """A whole number from `least` to `most`, also where it comes as a float such as 1e9. Raises ConfigError."""
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    if not plain or not least <= value <= most or value != int(value):
        raise ConfigError(f"{name} must be a whole number of {unit} from {least} to {most:,}, not {value!r}")
    return int(value)


def check_store(reuse: object) -> None:
    """Raise ConfigError unless `reuse` is a store, or None."""
    if reuse is not None and (isinstance(reuse, type) or not hasattr(reuse, "peek")):
        raise ConfigError(
            f"reuse must be an octavo.ReuseStore, as in reuse=octavo.ReuseStore(memory='1GiB'), not {reuse!r}"
        )
