"""Dynamic Memory Sparsification: the gate, its soft form for training, its losses and its files.

Lancucki et al., "Inference-Time Hyper-Scaling with KV Cache Compression", NeurIPS 2025.
"""

from octavo.dms.adapter import Adapter, load_adapter, save_adapter
from octavo.dms.gate import FoldedGates, Gates, GateSpec
from octavo.dms.policy import HardGates, Policy, SoftGates

__all__ = [
    "Adapter",
    "FoldedGates",
    "GateSpec",
    "Gates",
    "HardGates",
    "Policy",
    "SoftGates",
    "load_adapter",
    "save_adapter",
]
