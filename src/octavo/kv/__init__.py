"""Typed pages of one (sequence, layer, KV head), and the transformers `Cache` that fills and frees them."""

from octavo.kv.cache import CacheShape, PagedCache
from octavo.kv.pool import PagePool

__all__ = ["CacheShape", "PagePool", "PagedCache"]
