"""One operation: attention over ragged pages under the visibility rule. Tensors and ints only.

`reference` defines it; `native` and `prefill` (C, on the CPU), `padded` (torch, on a GPU) and `ragged` (torch) are
its fast forms, tested against it; `dense` is the same rule as a mask over one whole forward, for training and as
the oracle of eviction.
"""

from octavo.attention.dense import Packed, dense_attention
from octavo.attention.select import paged_attention

__all__ = ["Packed", "dense_attention", "paged_attention"]
