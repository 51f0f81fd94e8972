"""The store of computed prompts: found by their tokens, kept within budgets in memory and on disk, and on a server.

`store` is what users make, `reading` one request's way through it. `record` is a stored stretch, `tree` finds records
by tokens, `cover` says which boundary can be gone on from, `planning` whether loading that is worth it, `wanted` which
boundaries are kept, `index` and `shelf` hold budgets. `tiers` is what the tiers behind memory share: `shelving` with
`disk` is the folder, `remote` with `resp` the server, `files` what a record's bytes are. `admin` is what users ask
beside. `similar` is for prompts whose text was computed elsewhere, `align` finds it,
`draft` puts it together. `answers` gives whole answers again.
"""

from octavo.reuse.answers import Answered, AnswerSettings
from octavo.reuse.reading import Reading
from octavo.reuse.similar import SimilarSettings
from octavo.reuse.stats import Explanation, Listed, Stats
from octavo.reuse.store import ReuseStore

__all__ = ["AnswerSettings", "Answered", "Explanation", "Listed", "Reading", "ReuseStore", "SimilarSettings", "Stats"]
