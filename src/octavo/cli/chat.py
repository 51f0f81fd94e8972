"""A conversation whose cache lives on: each turn feeds only its new tokens.

The tokens of earlier turns are never rendered or tokenised again, so what the cache holds is always a prefix of
what the model is asked to continue.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from octavo.attachment import KVCache, Snapshot, attachment_of, fill
from octavo.attachment.reuse import Reading, begin, store_in
from octavo.errors import CacheStateError, ConfigError, NotAttachedError, PromptError, SnapshotFileError

MARK = "\x00"  # stands for a turn's content while the chat template is taken apart


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; temperature 0 is greedy. `top_p` keeps the likeliest tokens of that mass."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or not self.temperature >= 0 or not 0 < self.top_p <= 1:
            raise ConfigError("max_new_tokens must be at least 1, temperature at least 0 and top_p in (0, 1]")
        if not 0 <= self.seed < 2**64:
            raise ConfigError(f"seed must lie in 0..2**64 - 1, not {self.seed}")


class Conversation:
    """Turns of user and assistant over one cache: Octavo's for an attached model, else a `DynamicCache`.

    `ids` are all tokens so far; the cache holds all of them but the newest. Where the model has a reuse store, what it
    knows of the first turn is not read again, and what is read and answered is stored. A turn that fails while its
    prompt is read is taken back; where eviction has made that impossible, every later turn raises CacheStateError.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any, sampling: Sampling | None = None) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.sampling = sampling or Sampling()
        self.cache: Any = KVCache(model) if attachment_of(model) else DynamicCache(config=model.config)
        self.ids: list[int] = []
        self.reused = 0  # tokens of the first turn that came from the store
        self._broken = False
        self._reading: Reading | None = None
        self._generator = torch.Generator(device=model.device).manual_seed(self.sampling.seed)

    def ask(self, text: str, on_prefill: Callable[[int, int], None] = lambda done, total: None) -> Iterator[str]:
        """Answer a user turn, piece by piece as it is decoded; `on_prefill(done, total)` counts prompt tokens.

        Raises PromptError for an empty turn, for one that the model's positions cannot hold, and for a second one where
        the chat template leaves earlier turns out; the conversation is then as it was. Raises CacheBudgetError, and
        CacheStateError after a turn that could not be taken back.
        """
        self._check(text, not text.strip())
        turn = self._turn(text)
        self._check_room(len(turn))
        return self._decode(self._read(turn, on_prefill))

    def complete(self, text: str, on_prefill: Callable[[int, int], None] = lambda done, total: None) -> Iterator[str]:
        """Continue plain text, without a chat template. Raises as `ask` does."""
        self._check(text, not text)
        ids = self.tokenizer(text, verbose=False)["input_ids"]
        self._check_room(len(ids))
        return self._decode(self._read(ids, on_prefill))

    def save(self, path: str | Path) -> None:
        """Write all tokens and the cache into a file, from which `resume` goes on, in another process too.

        Raises NotAttachedError, OutputFileError, and CacheStateError where there are no turns yet, or after one that
        could not be taken back.
        """
        if not isinstance(self.cache, KVCache):
            raise NotAttachedError("only conversations with an attached model can be saved; call octavo.attach(model)")
        if self._broken:
            raise CacheStateError(
                "the conversation was not saved: a turn failed halfway and what was evicted for it cannot come back"
            )
        self.cache.snapshot(tokens=torch.tensor(self.ids)).save(path)

    @classmethod
    def resume(
        cls, model: PreTrainedModel, tokenizer: Any, snapshot: Snapshot, sampling: Sampling | None = None
    ) -> "Conversation":
        """The conversation that was saved as this snapshot, as if it had never stopped; sampling begins at its seed.

        Raises NotAttachedError, CacheBudgetError, SnapshotFileError for a snapshot that is of no conversation, and
        CacheStateError for one made with another model, adapter or page type.
        """
        if snapshot.tokens is None:
            raise SnapshotFileError("this snapshot holds no token ids, so no conversation can go on from it")
        conversation = cls(model, tokenizer, sampling)
        conversation.cache = KVCache.restore(model, snapshot)
        conversation.ids = snapshot.tokens.tolist()
        return conversation

    def _check(self, text: str, empty: bool) -> None:
        if self._broken:
            raise CacheStateError(
                "an earlier turn failed halfway and what was evicted for it cannot come back; start a new conversation"
            )
        if empty:
            raise PromptError("the prompt is empty; write at least one character")
        try:
            text.encode()
        except UnicodeEncodeError as e:  # a lone surrogate: how Python carries bytes that are no UTF-8
            raise PromptError(f"the prompt is not Unicode text at character {e.start + 1}; give it in UTF-8") from e

    def _check_room(self, new: int) -> None:
        limit = getattr(self.model.config, "max_position_embeddings", None)
        if limit is not None and len(self.ids) + new > limit:
            raise PromptError(
                f"the conversation would have {len(self.ids) + new:,} tokens, the model has {limit:,} positions"
            )

    def _turn(self, text: str) -> list[int]:
        """Token ids of a user turn and the opening of the answer, given how the last answer ended."""
        tokenizer = self.tokenizer
        if tokenizer.chat_template is None:
            raise PromptError("this model's tokenizer has no chat template; use `octavo generate --raw`")
        user = {"role": "user", "content": MARK}
        chat = [user] if not self.ids else [user, {"role": "assistant", "content": MARK}, user]
        rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        parts = rendered.split(MARK)
        if len(parts) != len(chat) + 1:
            raise PromptError(
                f"this model's chat template renders {len(parts) - 1} contents of {len(chat)} turns (it leaves turns "
                "out or repeats them), so this conversation cannot go on from what the model has read; start a new one"
            )
        before, after = parts[-2:]
        ids: list[int] = tokenizer(before + text + after, add_special_tokens=False, verbose=False)["input_ids"]
        if self.ids and ids[0] == self.ids[-1]:  # the answer already ended with its end token
            ids = ids[1:]
        return ids

    def _read(self, new: list[int], on_prefill: Callable[[int, int], None]) -> Tensor:
        """`_prefill`, taken back where it fails: else the next turn would go on from half of this one."""
        known, held = len(self.ids), self.cache.get_seq_length()
        try:
            return self._prefill(new, on_prefill)
        except BaseException:
            self.ids = self.ids[:known]
            if held == 0 and isinstance(self.cache, KVCache):
                self.cache.reset()
                if self._reading is not None:
                    self._reading.close()
                self._reading = None
                raise
            try:
                # A DynamicCache that failed within a forward has layers of different lengths.
                for part in [self.cache] if isinstance(self.cache, KVCache) else self.cache.layers:
                    if part.get_seq_length() > held:
                        part.crop(held - part.get_seq_length())
            except (CacheStateError, RuntimeError):
                self._broken = True
            raise

    @torch.no_grad()
    def _prefill(self, new: list[int], on_prefill: Callable[[int, int], None]) -> Tensor:
        """Feed what the cache lacks, chunk by chunk; returns the logits [vocab] after the last token."""
        ids = self.ids + new
        self._look_up(ids)
        cached = self.cache.get_seq_length()
        attachment = attachment_of(self.model)
        size = attachment.settings.chunk if attachment else len(ids)
        for first in range(cached, len(ids), size):
            part = torch.tensor([ids[first : first + size]], device=self.model.device)
            if first + size < len(ids):
                fill(self.model, part, self.cache)
            else:
                out = self.model(input_ids=part, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
            self.ids = ids[: max(len(self.ids), first + size)]
            on_prefill(min(first + size, len(ids)) - cached, len(ids) - cached)
        self._remember()
        logits: Tensor = out.logits[0, -1]
        return logits

    def _look_up(self, ids: list[int]) -> None:
        """Begin with what the reuse store knows, where the model has one and nothing was read yet."""
        attachment = attachment_of(self.model)
        if attachment is None or attachment.reuse is None or self._reading is not None:
            return
        if self.cache.is_initialized:  # a resumed conversation: its turns are stored, but it begins with its own cache
            self._reading = begin(attachment.reuse, KVCache(self.model), ids, restore=False, wait=False)
        else:
            self._reading = begin(attachment.reuse, self.cache, ids)
            self.reused = self._reading.boundary if self._reading is not None else 0

    def _remember(self) -> None:
        """Store what has been read so far, where the model has a reuse store."""
        if self._reading is not None:
            store_in(self._reading, self.cache, 0, self.ids)
            self._reading.close()

    def _decode(self, logits: Tensor) -> Iterator[str]:
        """The answer, which is stored however it ends."""
        try:
            yield from self._answer(logits)
        finally:
            self._remember()

    @torch.no_grad()
    def _answer(self, logits: Tensor) -> Iterator[str]:
        stops = self.model.generation_config.eos_token_id
        stops = set(stops if isinstance(stops, list) else [stops])
        limit = getattr(self.model.config, "max_position_embeddings", None)
        answer: list[int] = []
        shown = ""
        for _ in range(self.sampling.max_new_tokens):
            token = int(choose(logits.float(), self.sampling, self._generator))
            self.ids.append(token)
            if token in stops or (limit is not None and len(self.ids) >= limit):
                return
            answer.append(token)
            text = self.tokenizer.decode(answer, skip_special_tokens=True)
            if not text.endswith("\ufffd"):  # a character still missing bytes
                yield text[len(shown) :]
                shown = text
            feed = torch.tensor([[token]], device=self.model.device)
            logits = self.model(input_ids=feed, past_key_values=self.cache, use_cache=True).logits[0, -1]


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """The next token id (scalar) from logits [vocab]."""
    if sampling.temperature == 0:
        return logits.argmax()
    probabilities = (logits / sampling.temperature).softmax(-1)
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        ordered[ordered.cumsum(0) - ordered > sampling.top_p] = 0.0
        return order[torch.multinomial(ordered, 1, generator=generator)[0]]
    return torch.multinomial(probabilities, 1, generator=generator)[0]
