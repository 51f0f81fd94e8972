"""Octavo: cheap LLM inference for Hugging Face models. See README.md.

Names are imported on first use, so that `import octavo` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from octavo.attachment import KVCache, Snapshot
    from octavo.attachment.adapters import load_adapter
    from octavo.attachment.attach import attach, detach, set_swiftkv
    from octavo.dms.adapter import Adapter, save_adapter
    from octavo.engine import LLM, SamplingParams
    from octavo.models import load, save_published
    from octavo.retrofit.evaluate import evaluate
    from octavo.reuse import Answered, AnswerSettings, ReuseStore, SimilarSettings
    from octavo.swiftkv.adapter import SwiftKVAdapter, save_swiftkv_adapter

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "Adapter",
    "AnswerSettings",
    "Answered",
    "KVCache",
    "ReuseStore",
    "SamplingParams",
    "SimilarSettings",
    "Snapshot",
    "SwiftKVAdapter",
    "attach",
    "detach",
    "evaluate",
    "load",
    "load_adapter",
    "save_adapter",
    "save_published",
    "save_swiftkv_adapter",
    "set_swiftkv",
]

_HOMES = {
    "Adapter": "octavo.dms.adapter",
    "KVCache": "octavo.attachment",
    "LLM": "octavo.engine",
    "ReuseStore": "octavo.reuse",
    "SamplingParams": "octavo.engine",
    "SimilarSettings": "octavo.reuse",
    "AnswerSettings": "octavo.reuse",
    "Answered": "octavo.reuse",
    "Snapshot": "octavo.attachment",
    "SwiftKVAdapter": "octavo.swiftkv.adapter",
    "attach": "octavo.attachment.attach",
    "detach": "octavo.attachment.attach",
    "evaluate": "octavo.retrofit.evaluate",
    "load": "octavo.models",
    "load_adapter": "octavo.attachment.adapters",
    "save_adapter": "octavo.dms.adapter",
    "save_published": "octavo.models",
    "save_swiftkv_adapter": "octavo.swiftkv.adapter",
    "set_swiftkv": "octavo.attachment.attach",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'octavo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
