"""What both C kernels demand of their tensors, since C trusts addresses, shapes and strides."""

import torch
from torch import Tensor


def check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position: Tensor,
    expiry: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slot_position: Tensor,
    slot_expiry: Tensor,
    page_table: Tensor,
    length: Tensor,
) -> None:
    """Raise ValueError unless the arguments of `reference.paged_attention` fit each other and lie as C reads them.

    Written out, not looped: it runs once per layer and decoded token.
    """
    B, Hq, N, D = query.shape
    H = key.shape[1]
    P, S, _ = k_pages.shape
    if not (
        key.shape == value.shape == (B, H, N, D)
        and v_pages.shape == (P, S, D) == k_pages.shape
        and slot_position.shape == slot_expiry.shape == (P, S)
        and position.shape == (B, N)
        and expiry.shape == (B, H, N)
        and length.shape == (B, H) == page_table.shape[:2]
        and Hq % H == 0
    ):
        raise ValueError("paged_attention: shapes do not fit each other")
    if not (
        query.dtype == key.dtype == value.dtype
        and k_pages.dtype == v_pages.dtype
        and torch.int32
        == position.dtype
        == expiry.dtype
        == slot_position.dtype
        == slot_expiry.dtype
        == page_table.dtype
        == length.dtype
    ):
        raise ValueError("paged_attention: query, key and value share one dtype, the pages one; the rest is int32")
    if not (
        query.is_cpu
        and key.is_cpu
        and value.is_cpu
        and k_pages.is_cpu
        and v_pages.is_cpu
        and position.is_cpu
        and expiry.is_cpu
        and slot_position.is_cpu
        and slot_expiry.is_cpu
        and page_table.is_cpu
        and length.is_cpu
        and query.stride(3) == key.stride(3) == value.stride(3) == 1
        and position.is_contiguous()
        and expiry.is_contiguous()
        and k_pages.is_contiguous()
        and v_pages.is_contiguous()
        and slot_position.is_contiguous()
        and slot_expiry.is_contiguous()
        and page_table.is_contiguous()
        and length.is_contiguous()
    ):
        raise ValueError("paged_attention: tensors must be on the CPU, pages and tables contiguous")
