"""Whole answers that the model's reuse store may know (`octavo.reuse.answers`), of requests that are certain."""

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from transformers import PreTrainedModel

from octavo.attachment import require_attachment
from octavo.attachment.answers import Known, head_digest

if TYPE_CHECKING:
    from octavo.engine.request import Request


def known(model: PreTrainedModel, request: "Request", ends: set[int]) -> Known | None:
    """A request whose answer may be given again; None: the store keeps none, or not of such a request.

    Only the greedy ones, of one sample, without a grammar, log-probabilities and stop strings, which are the
    tokenizer's too.
    """
    attachment, params = require_attachment(model), request.params
    answers = getattr(attachment.reuse, "answers", None)
    several = params.n > 1 or request.constraint is not None or params.logprobs is not None or params.stops
    if answers is None or several or not params.greedy:
        return None
    settings = asdict(params) | {"seed": None}  # which decides nothing
    asked = json.dumps(["engine", settings, sorted(ends), head_digest(attachment), type(model).__name__])
    return Known(attachment, answers, asked, request.prompt)
