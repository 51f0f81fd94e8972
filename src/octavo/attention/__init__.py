"""One operation: attention over ragged pages under the visibility rule. Tensors and ints only.

`reference` defines it; `native` (C, on the CPU) and `ragged` (torch) are its fast forms, tested against it;
`dense` is the same rule as a mask over one whole forward, for training and as the oracle of eviction.
"""

from octavo.attention.dense import dense_attention
from octavo.attention.select import paged_attention

__all__ = ["dense_attention", "paged_attention"]
