"""Page memory for keys and values, and the transformers `Cache` over it.

`space` reserves addresses, `pool` hands out pages, `tables` say which pages each sequence holds, `plan` chooses slots
for new tokens, `decode_step` and `chunk_step` run one forward, `rewind` takes tokens back, `snapshot` and `capture`
keep a sequence apart from its pages, `extent` a stretch of one, `sequences` is a batch that joins all of these,
`memory` is what all caches of a model share, `hf_cache` is the face that transformers sees.
"""

from octavo.kv.chunk_step import ChunkStep
from octavo.kv.decode_step import DecodeStep
from octavo.kv.extent import Extent
from octavo.kv.hf_cache import PagedCache
from octavo.kv.memory import Memory
from octavo.kv.sequences import Sequences
from octavo.kv.shape import CacheShape
from octavo.kv.snapshot import Snapshot

__all__ = ["CacheShape", "ChunkStep", "DecodeStep", "Extent", "Memory", "PagedCache", "Sequences", "Snapshot"]
