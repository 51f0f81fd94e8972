"""Calls of `generate` whose whole answer a reuse store may know: one prompt, greedy, nothing asked for but tokens."""

import json
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from octavo.attachment.cache import KVCache
from octavo.attachment.similar import mean_embedding

if TYPE_CHECKING:
    from octavo.attachment.attachment import Attachment
    from octavo.attachment.calls import Call

_ASIDE = ("inputs", "input_ids", "attention_mask", "generation_config")
_MORE = (  # what `generate` must not be asked for: more than tokens, an end that depends on time, other sequences
    "do_sample", "max_time", "output_attentions", "output_hidden_states", "output_logits", "output_scores",
    "return_dict_in_generate", "stop_strings",
)  # fmt: skip


def asked_for(attachment: "Attachment", call: "Call") -> str | None:
    """All that decides the answer of a call beside the decoder and the prompt, as text; None: that cannot be told."""
    model: Any = attachment.model
    if (
        len(call.rows) != 1
        or call.copies != 1
        or attachment.needs_whole
        or torch.is_autocast_enabled(model.device.type)
    ):
        return None
    config = call.given.get("generation_config")
    settings = [model.generation_config.to_dict(), config.to_dict() if config is not None else None]
    named = {name: value for name, value in call.given.items() if name not in _ASIDE}
    for name in _MORE:
        if any((each or {}).get(name) for each in (*settings, named)):
            return None
    try:
        return json.dumps([settings, named, head_digest(attachment), type(model).__name__], sort_keys=True)
    except (TypeError, ValueError):  # a streamer, a processor of logits, a stopping criterion: no plain values
        return None


class Known:
    """What is asked of a model with some prompt, and the answers of its store. `asked`: all that decides the answer
    beside the decoder and the prompt, as text. What fails here, a user's `report` or `embed` too, costs a warning."""

    def __init__(self, attachment: "Attachment", answers: Any, asked: str, prompt: Sequence[int]) -> None:
        self.attachment, self.answers, self.asked, self.prompt = attachment, answers, asked, prompt
        self.identity = KVCache(attachment.model).identity()

    def find(self) -> tuple[int, ...] | None:
        """The answer's tokens; None: it is not known."""
        found: tuple[int, ...] | None = None
        try:
            found = self.answers.find(self.identity, self.asked, self.prompt, self._embed)
        except Exception as e:
            warn("could not give a whole answer again", e)
        return found

    def keep(self, answer: Sequence[int]) -> None:
        """Keep the answer's tokens, unless weights have changed meanwhile."""
        try:
            if KVCache(self.attachment.model).identity() == self.identity:
                self.answers.keep(self.identity, self.asked, self.prompt, answer, self._embed)
        except Exception as e:
            warn("could not keep a whole answer", e)

    def _embed(self, ids: Any) -> list[float]:
        return mean_embedding(self.attachment, ids)


def warn(what: str, error: Exception) -> None:
    """Tell of a failure of the store; the request goes on without it."""
    warnings.warn(f"the reuse cache {what}: {type(error).__name__}: {error}", RuntimeWarning, stacklevel=3)


def head_digest(attachment: "Attachment") -> str | None:
    """Digest of the output layer's weights, which no identity has; None where there is none."""
    model: Any = attachment.model
    head = model.get_output_embeddings()
    return None if head is None else attachment.digests.of("head", head)


def known(attachment: "Attachment", call: "Call") -> Known | None:
    """A call whose answer may be given again; None: the store keeps none, or not of such a call."""
    answers = getattr(attachment.reuse, "answers", None)
    asked = None if answers is None else asked_for(attachment, call)
    return None if answers is None or asked is None else Known(attachment, answers, asked, call.rows[0])
