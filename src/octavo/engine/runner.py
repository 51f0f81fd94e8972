"""Runs the model on what the scheduler has chosen: prompt chunks one request at a time, decode steps as one batch.

The running requests are one `KVCache`. A request joins it when its prompt is read and leaves it when it is done or
preempted; nothing of the others is moved. The tokens that go into the next step stay on the device.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from octavo.attachment import KVCache, require_attachment
from octavo.attachment.reuse import Reading, begin, store_in
from octavo.engine.grammar import allowed
from octavo.engine.request import Request
from octavo.engine.sampling import Allowed, Sampled, Sampler


class Runner:
    """The model, the running batch and its sampler. `drafted`: tokens that a step may read ahead."""

    def __init__(self, model: PreTrainedModel, sampler: Sampler, drafted: int = 0) -> None:
        self.model, self.sampler, self.drafted = model, sampler, drafted
        self.running: list[Request] = []  # in the order of the batch
        self._batch: KVCache | None = None
        self._tokens: Tensor | None = None  # [B, 1] int64, what each of them reads next
        self._slots: Tensor | None = None  # [B] int64, made anew when the batch changes

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.sampler.device

    @property
    def read_nbytes(self) -> int:
        """Bytes of all slots that the running requests see, which a step must read. Waits for the device."""
        if self._batch is None or not self.running:
            return 0
        layout = self._batch.memory.layout
        slot = 2 * layout.head_dim * layout.dtype.itemsize + 4 + 8 * layout.quantised  # expiry, two scales
        return int(self._batch.kept.sum()) * slot

    # Prompts

    def prefill(self, request: Request, count: int) -> Tensor | None:
        """Read `count` more tokens of a request into its own cache; the last logits [1, V] when it has read all.

        Raises CacheBudgetError, and nothing of them is read then.
        """
        if request.cache is None:
            request.cache = KVCache(self.model)
            self._look_up(request, request.cache)
        tokens = request.tokens
        part = torch.tensor([tokens[request.read : request.read + count]], device=self.device)
        logits: Tensor = self.model(input_ids=part, past_key_values=request.cache, logits_to_keep=1).logits
        request.read += part.shape[1]
        if request.read < len(tokens):
            return None
        if request.reading is not None:
            self._store(request.reading, request.cache)
            request.reading.close()
        return logits[:, -1].float()

    def prefill_together(self, requests: Sequence[Request]) -> Tensor:
        """Read some whole prompts side by side, into one cache, which the first of them holds; last logits [n, V].

        Raises CacheBudgetError, and nothing of them is read then.
        """
        texts = [request.tokens for request in requests]
        columns = max(map(len, texts))
        lead = [columns - len(text) for text in texts]
        ids = torch.tensor([[0] * n + text for n, text in zip(lead, texts, strict=True)], device=self.device)
        first = torch.tensor(lead, device=self.device)
        mask = (torch.arange(columns, device=self.device) >= first[:, None]).long() if any(lead) else None
        cache = KVCache(self.model)
        logits = self.model(input_ids=ids, attention_mask=mask, past_key_values=cache, logits_to_keep=1).logits
        cache.sequences.padded_in_front(lead)
        requests[0].cache = cache
        for request, text in zip(requests, texts, strict=True):
            request.read = len(text)
        return logits[:, -1].float()  # type: ignore[no-any-return]

    def _look_up(self, request: Request, cache: KVCache) -> None:
        """Begin with what the reuse store knows of a request's tokens, where the model has one."""
        store = require_attachment(self.model).reuse
        if store is not None:
            request.reading = request.context.run(begin, store, cache, request.tokens, wait=False)
        if request.reading is not None:
            request.read = request.reading.boundary
            if getattr(request.reading, "similar", False):
                request.known = None  # its answer is approximate

    def remember(self, request: Request) -> None:
        """Store what a running request has read, its answer too, for the next turn of a chat."""
        if request.reading is not None and self._batch is not None and request in self.running:
            self._store(request.reading, self._batch, self.running.index(request), request.tokens)

    def _store(self, reading: Reading, cache: KVCache, which: int = 0, tokens: Sequence[int] | None = None) -> None:
        """Store what a sequence has read, unless the model was given other weights since it was looked up."""
        if cache.identity() == reading.identity:
            store_in(reading, cache, which, tokens)

    def first(self, requests: Sequence[Request], logits: Tensor) -> Sampled:
        """The tokens that follow what some requests have read; `logits` [n, V]."""
        slots = torch.tensor([request.slot for request in requests], device=self.device)
        position = torch.tensor([request.read for request in requests], device=self.device)
        return self.sampler.sample(logits, slots, position, self._allowed(requests))

    def join(self, requests: Sequence[Request], tokens: Tensor) -> None:
        """Take requests into the running batch, each with a cache of its own or all with that of the first; `tokens`
        [n] int64 is what they read next."""
        if self._batch is None or not self.running:
            self._batch, self._tokens = KVCache(self.model), None
            if self.drafted:
                self._batch.activate_past_recording(self.drafted)
        for request in requests:
            if request.cache is not None:
                self._batch.join(request.cache)
            request.cache = None
        tokens = tokens[:, None]
        self._tokens = tokens if self._tokens is None else torch.cat([self._tokens, tokens])
        self.running += requests
        self._slots = None

    # Steps

    def decode(self) -> Sampled:
        """One token for each running request. Raises CacheBudgetError, and nothing has happened then."""
        assert self._batch is not None
        position = self._batch.position[:, None]
        logits = self.model(
            input_ids=self._tokens, position_ids=position, past_key_values=self._batch, logits_to_keep=1
        ).logits[:, -1]
        for request in self.running:
            request.read += 1
        if self._slots is None:
            self._slots = torch.tensor([request.slot for request in self.running], device=self.device)
        sampled = self.sampler.sample(logits, self._slots, position[:, 0] + 1, self._allowed(self.running))
        self._tokens = sampled.tokens[:, None]
        return sampled

    def longest_draft(self) -> int:
        """Tokens that a step can read ahead and remain one of few tokens."""
        assert self._batch is not None
        return min(self.drafted, self._batch.sequences.few - 1)

    def decode_ahead(self, drafted: Sequence[int]) -> list[Sampled]:
        """The next tokens of the only running request: one, and one more for each drafted token that is what it would
        have been anyway. Raises CacheBudgetError, and nothing has happened then."""
        assert self._batch is not None
        assert self._tokens is not None
        (request,) = self.running
        ahead = torch.tensor([drafted], device=self.device)
        position = self._batch.position[:, None] + torch.arange(1 + len(drafted), device=self.device)
        logits = self.model(
            input_ids=torch.cat([self._tokens, ahead], 1), position_ids=position, past_key_values=self._batch,
            logits_to_keep=1 + len(drafted),
        ).logits  # fmt: skip
        slots = torch.tensor([request.slot], device=self.device)
        out: list[Sampled] = []
        for i, draft in enumerate([*drafted, None]):
            out.append(self.sampler.sample(logits[:, i], slots, position[:, i] + 1))
            if int(out[-1].tokens) != draft:
                break
        self._batch.crop(len(out) - 1 - len(drafted))
        request.read += len(out)
        self._tokens = out[-1].tokens[:, None]
        return out

    def _allowed(self, requests: Sequence[Request]) -> Allowed | None:
        """What the grammars of some requests, one a row, allow. A grammar that fails is its own request's failure."""

        def failed(row: int, error: Exception) -> None:
            requests[row].output.error, requests[row].output.finish_reason = error, "error"

        live = {i: r.constraint for i, r in enumerate(requests) if r.constraint is not None and not r.done}
        return allowed(live, self.device, failed)

    # Leaving

    def leave(self, requests: Sequence[Request]) -> None:
        """End the part of some running requests in the batch, and give their pages back."""
        gone = [self.running.index(request) for request in requests if request in self.running]
        if not gone:
            return
        assert self._batch is not None
        assert self._tokens is not None
        self._batch.leave(gone)
        self.running = [request for request in self.running if request not in requests]
        stay = [i for i in range(len(self._tokens)) if i not in gone]
        self._tokens = self._tokens[torch.tensor(stay, dtype=torch.int64, device=self.device)] if stay else None
        self._slots = None
        if not self.running:
            self._batch.reset()

    def preempt(self, request: Request) -> None:
        """Take a running request out of the batch; what it has read goes to host memory as a snapshot."""
        assert self._batch is not None
        snapshot: Any = self._batch.snapshot(sequence=self.running.index(request))
        request.snapshot = snapshot.to("cpu")
        self.leave([request])

    def resume(self, request: Request) -> None:
        """Give a preempted request its cache back. Raises CacheBudgetError, and it stays preempted."""
        assert request.snapshot is not None
        request.cache = KVCache.restore(self.model, request.snapshot)
        request.snapshot = None
