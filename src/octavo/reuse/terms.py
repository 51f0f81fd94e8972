"""Under what requests are looked up and stored."""

import math
from typing import NamedTuple

from octavo.config import nbytes
from octavo.errors import ConfigError


class Terms(NamedTuple):
    """Whose requests, how they are tagged, and how many seconds what they store lives."""

    tenant: str = ""
    tags: tuple[str, ...] = ()
    ttl: float = math.inf


def seconds(ttl: float | None) -> float:
    """A time to live, infinite for None. Raises ConfigError."""
    if ttl is not None and not ttl > 0:
        raise ConfigError(f"ttl must be a number of seconds above 0, not {ttl!r}")
    return math.inf if ttl is None else float(ttl)


def at_least_one(given: object, name: str) -> int:
    """Bytes of a budget. Raises ConfigError."""
    found = nbytes(given, name)
    if found < 1:
        raise ConfigError(f"{name} must be at least 1 byte, not {given!r}")
    return found
