"""Octavo: cheap LLM inference for Hugging Face models. See README.md.

Names are imported on first use, so that `import octavo` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from octavo.attachment import KVCache, attach, detach
    from octavo.dms.adapter import Adapter, load_adapter, save_adapter
    from octavo.models import load
    from octavo.retrofit.evaluate import evaluate

__version__ = "0.1.0"
__all__ = ["Adapter", "KVCache", "attach", "detach", "evaluate", "load", "load_adapter", "save_adapter"]

_HOMES = {
    "Adapter": "octavo.dms.adapter",
    "KVCache": "octavo.attachment",
    "attach": "octavo.attachment",
    "detach": "octavo.attachment",
    "evaluate": "octavo.retrofit.evaluate",
    "load": "octavo.models",
    "load_adapter": "octavo.dms.adapter",
    "save_adapter": "octavo.dms.adapter",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'octavo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
