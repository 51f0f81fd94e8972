"""One request's life: waiting, prefilling, running, perhaps preempted and waiting again, done.

waiting --admitted--> prefilling --first token--> running --stop, length, cancelled, failed--> done
   ^                      |                          |
   +------ preempted -----+--------------------------+
"""

import copy
from collections.abc import Callable
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from typing import Any

from octavo.attachment import KVCache
from octavo.attachment.answers import Known
from octavo.attachment.reuse import Reading
from octavo.engine.sampling import SamplingParams
from octavo.kv import Snapshot


@dataclass
class Output:
    """What a request has produced.

    `tokens`: ids, without what a stop string cut off only in `text`. `finish_reason`: "stop", "length", "cancelled",
    "error" or None while it runs; `error` is the exception then. `logprobs`: of each token, where asked for;
    `alternatives`: the likeliest tokens at each place, as {token: logprob}.
    """

    prompt: str | None
    prompt_tokens: list[int]
    index: int = 0  # which of the n samples of its prompt
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    alternatives: list[dict[int, float]] = field(default_factory=list)
    finish_reason: str | None = None
    error: Exception | None = None


@dataclass(eq=False)
class Request:
    """A request, as scheduler and runner see it.

    `number` counts arrivals; lower `priority` runs first. `read`: tokens of prompt and output that are in `cache`, in
    the running batch or in `snapshot`. `slot`: its place in the sampler.
    """

    number: int
    prompt: list[int]
    params: SamplingParams
    seed: int
    output: Output
    priority: int = 0
    cache: KVCache | None = None  # its own, until it joins the running batch
    snapshot: Snapshot | None = None  # where it was when it was preempted, in host memory
    read: int = 0
    slot: int | None = None
    siblings: int = 0  # how many more samples of its prompt are to be forked from its cache
    family: list["Request"] = field(default_factory=list)  # these samples, once they are there
    on_token: Callable[["Request"], None] | None = None
    constraint: Any = None  # see `octavo.engine.grammar`
    reading: Reading | None = None  # its way through the reuse store, once it reads its prompt
    known: Known | None = None  # the answers of the store, while its own may be one of them
    context: Context = field(default_factory=copy_context)  # of who asked: under what it is looked up and stored

    @property
    def tokens(self) -> list[int]:
        """What the model reads: the prompt and what has been sampled so far."""
        return self.prompt + self.output.tokens

    @property
    def unread(self) -> bool:
        """Whether nothing of it has been read or kept, and no siblings wait to share what will be."""
        return not (self.read or self.cache or self.snapshot or self.siblings)

    @property
    def done(self) -> bool:
        """Whether it has ended, one way or another."""
        return self.output.finish_reason is not None

    def forget(self) -> None:
        """Give back what it holds by itself; what it had read must be read again."""
        if self.cache is not None:
            self.cache.reset()  # now, not when an error's traceback lets go of it
        if self.reading is not None:
            self.reading.close()
        self.cache, self.snapshot, self.reading, self.read = None, None, None, 0

    def fork(self) -> list["Request"]:
        """The other samples of its prompt, which has been read, on the same pages."""
        made = []
        for i in range(self.siblings):
            output = Output(self.output.prompt, self.output.prompt_tokens, index=i + 1)
            twin = Request(
                self.number, self.prompt, self.params, self.seed + i + 1, output, self.priority,
                on_token=self.on_token, read=self.read,
            )  # fmt: skip
            assert self.cache is not None
            twin.constraint = None if self.constraint is None else self.constraint.copy()
            twin.cache = copy.deepcopy(self.cache)
            self.family.append(twin)
            made.append(twin)
        self.siblings = 0
        return made

    @property
    def finished(self) -> bool:
        """Whether all samples of its prompt have ended."""
        return self.done and all(member.done for member in self.family)

    @property
    def order(self) -> tuple[int, int]:
        """Requests with a lower one run first."""
        return self.priority, self.number
