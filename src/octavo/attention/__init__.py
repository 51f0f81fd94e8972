"""One operation: attention over ragged pages under the visibility rule. Tensors and numbers only.

`pages` says how keys and values lie in memory, `reference` defines the operation, `select` picks a fast form of it for
the device at hand: kernels in C (`cpu`), in Triton (`cuda`) or plain torch (`torch`), all tested against the reference.
`dense` is the same rule as a mask over one whole forward, for training and as the oracle of eviction.
"""

from octavo.attention import cuda
from octavo.attention.dense import Packed, dense_attention
from octavo.attention.lifetime import Lifetime
from octavo.attention.pages import Chunk, PageLayout, Pages, Scoring, put, slots, write
from octavo.attention.select import FEW, attend
from octavo.attention.torch import causal

__all__ = [
    "FEW",
    "Chunk",
    "Lifetime",
    "Packed",
    "PageLayout",
    "Pages",
    "Scoring",
    "attend",
    "causal",
    "cuda",
    "dense_attention",
    "put",
    "slots",
    "write",
]
