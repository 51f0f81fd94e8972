"""The arguments of `paged_attention` as one value, for the tests of its kernels."""

from typing import NamedTuple

from torch import Tensor


class Case(NamedTuple):
    """The arguments of `paged_attention`, in order."""

    query: Tensor
    key: Tensor
    value: Tensor
    position: Tensor
    expiry: Tensor
    k_pages: Tensor
    v_pages: Tensor
    slot_position: Tensor
    slot_expiry: Tensor
    page_table: Tensor
    length: Tensor
    scale: float

    def widened(self) -> "Case":
        """The same numbers in float32, so that the reference rounds nothing."""
        return Case(*(t.float() if isinstance(t, Tensor) and t.is_floating_point() else t for t in self))
