"""Calls of `generate` whose whole answer a reuse store may know: one prompt, greedy, nothing asked for but tokens."""

import json
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

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
    head = model.get_output_embeddings()
    digest = None if head is None else attachment.digests.of("head", head)
    try:
        return json.dumps([settings, named, digest, type(model).__name__], sort_keys=True)
    except (TypeError, ValueError):  # a streamer, a processor of logits, a stopping criterion: no plain values
        return None


class Known:
    """A call and the answers of its store."""

    def __init__(self, attachment: "Attachment", call: "Call", answers: Any, asked: str) -> None:
        self.attachment, self.call, self.answers, self.asked = attachment, call, answers, asked
        self.identity = KVCache(attachment.model).identity()

    def find(self) -> Tensor | None:
        """What `generate` would return; None: the answer is not known."""
        answer = self.answers.find(self.identity, self.asked, self.call.rows[0], self._embed)
        if answer is None:
            return None
        ids = self.call.ids
        return torch.cat([ids, torch.tensor([answer], dtype=ids.dtype, device=ids.device)], 1)

    def keep(self, out: Any, approximate: bool) -> None:
        """Keep what `generate` has returned, unless it was approximate or weights have changed meanwhile."""
        if approximate or not isinstance(out, Tensor) or KVCache(self.attachment.model).identity() != self.identity:
            return
        answer = out[0, self.call.columns :].tolist()
        self.answers.keep(self.identity, self.asked, self.call.rows[0], answer, self._embed)

    def _embed(self, ids: Any) -> list[float]:
        return mean_embedding(self.attachment, ids)


def known(attachment: "Attachment", call: "Call") -> Known | None:
    """A call whose answer may be given again; None: the store keeps none, or not of such a call."""
    answers = getattr(attachment.reuse, "answers", None)
    asked = None if answers is None else asked_for(attachment, call)
    return None if answers is None or asked is None else Known(attachment, call, answers, asked)
