"""One operation: attention over ragged pages under the visibility rule. Tensors and numbers only.

`pages` says how keys and values lie in memory, `reference` defines the operation, `select` picks a fast form of it for
the device at hand: kernels in C (`cpu`) or plain torch (`torch`), all tested against the reference. Two forms serve
several layers at once on a GPU: `gathered` one query per sequence, `banded` a whole first chunk. `dense` is the same
rule as a mask over one whole forward, for training and as the oracle of eviction.
"""

from octavo.attention.dense import Packed, dense_attention
from octavo.attention.pages import Chunk, PageLayout, Pages, put, slots, write
from octavo.attention.select import FEW, attend
from octavo.attention.torch import banded, causal, gathered

__all__ = [
    "FEW",
    "Chunk",
    "Packed",
    "PageLayout",
    "Pages",
    "attend",
    "banded",
    "causal",
    "dense_attention",
    "gathered",
    "put",
    "slots",
    "write",
]
