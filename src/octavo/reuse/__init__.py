"""The store of computed prompts: found by their tokens, kept within budgets in memory and on disk.

`store` is what users make, `reading` one request's way through it. `record` is a stored stretch, `tree` finds records
by tokens, `cover` says which boundary can be gone on from, `wanted` which boundaries are kept, `index` and `shelf` hold
budgets, `shelving`, `disk` and `files` are the disk tier, `admin` what users ask
beside. `similar` is for prompts whose text was computed elsewhere, `align` finds it,
`draft` puts it together. `answers` gives whole answers again.
"""

from octavo.reuse.answers import Answered, AnswerSettings
from octavo.reuse.reading import Reading
from octavo.reuse.similar import SimilarSettings
from octavo.reuse.stats import Explanation, Listed, Stats
from octavo.reuse.store import ReuseStore

__all__ = ["AnswerSettings", "Answered", "Explanation", "Listed", "Reading", "ReuseStore", "SimilarSettings", "Stats"]
