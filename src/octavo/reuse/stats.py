"""What a store tells of itself."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Stats:
    """Counts since the store was opened, and what it holds now.

    `requests` were looked up, `hits` went on from something; `asked` and `reused` are their prompts' tokens. `waited`:
    requests that waited for another one's computation. `inserted`, `evicted` (a server may keep what is forgotten
    here) and `refused` (did not fit, or everything was pinned) are records; `damaged` files were
    dropped; `errors` are failures to read or write. `passed_over`: requests for which reading from disk or the server
    would have taken longer than computing. `similar_hits`: requests that similar prompts helped with, `similar_tokens`
    of which were not computed; of `similar_audits` of them the mean KL was `similar_kl` nats. `answers_given`: calls
    that were answered whole, which count in nothing else; `answers_nbytes` is what answers hold. `memory_nbytes`
    counts all bookkeeping. `remote_nbytes` and `remote_records` are what this store knows to be on the server, whose
    own policy may have evicted some of it since.
    """

    requests: int = 0
    hits: int = 0
    asked: int = 0
    reused: int = 0
    waited: int = 0
    inserted: int = 0
    evicted: int = 0
    refused: int = 0
    damaged: int = 0
    errors: int = 0
    passed_over: int = 0
    similar_hits: int = 0
    similar_tokens: int = 0
    similar_audits: int = 0
    similar_kl: float = 0.0
    answers_given: int = 0
    answers_nbytes: int = 0
    memory_nbytes: int = 0
    memory_records: int = 0
    disk_nbytes: int = 0
    disk_records: int = 0
    remote_nbytes: int = 0
    remote_records: int = 0


@dataclass(frozen=True)
class Listed:
    """One stored record, for people. `tokens`: how long its prompt is; `first`: where its own slots begin; times are
    seconds since the epoch."""

    key: str
    space: str
    tenant: str
    tags: tuple[str, ...]
    tokens: int
    first: int
    nbytes: int
    memory: bool
    disk: bool
    created: float
    expires: float
    pinned: float
    remote: bool = False


@dataclass(frozen=True)
class Explanation:
    """How far the next request for a prompt would hit, and why not further.

    `boundary`: tokens that would be reused of `length`; `matched`: tokens that stored prompts begin with as well.
    `reason`: one sentence.
    """

    space: str
    length: int
    matched: int
    boundary: int
    reason: str
