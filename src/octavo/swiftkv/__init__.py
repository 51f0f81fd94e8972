"""SwiftKV: prompt tokens skip the later layers, whose keys and values come from an earlier one.

Qiao et al., "SwiftKV: Fast Prefill-Optimized Inference with Knowledge-Preserving Model Transformation", 2024
(arXiv 2410.03960).
"""

from octavo.swiftkv.adapter import SwiftKVAdapter, check_pair, load_swiftkv_adapter, save_swiftkv_adapter
from octavo.swiftkv.checkpoint import is_published, read_published, write_published
from octavo.swiftkv.initial import initial, spec_for
from octavo.swiftkv.transform import SwiftKV, SwiftSpec

__all__ = [
    "SwiftKV",
    "SwiftKVAdapter",
    "SwiftSpec",
    "check_pair",
    "initial",
    "is_published",
    "load_swiftkv_adapter",
    "read_published",
    "save_swiftkv_adapter",
    "spec_for",
    "write_published",
]
