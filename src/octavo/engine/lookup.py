"""Prompt lookup: what may follow, guessed from what followed the same tokens earlier in a request's own text."""

from collections.abc import Sequence

from transformers import PreTrainedModel

from octavo.attachment import require_attachment
from octavo.errors import ConfigError

NGRAMS = (3, 2)  # how many of the last tokens must have stood there before, the most first


def looked_up(tokens: Sequence[int], most: int) -> list[int]:
    """At most so many tokens that followed when the last few of `tokens` came before; empty where they did not."""
    for n in NGRAMS:
        tail = list(tokens[-n:])
        for at in range(len(tokens) - n - 1, -1, -1):
            if tokens[at + n - 1] == tail[-1] and tokens[at : at + n] == tail:
                return list(tokens[at + n : at + n + most])
    return []


def check_lookup(model: PreTrainedModel, drafted: int) -> None:
    """Raise ConfigError for an impossible length of drafts."""
    if isinstance(drafted, bool) or not isinstance(drafted, int) or drafted < 0:
        raise ConfigError(f"prompt_lookup must be a whole number of tokens, 0 for none, not {drafted!r}")
    attachment = require_attachment(model)
    undo = attachment.settings.undo
    if drafted and attachment.layout.states:
        raise ConfigError(f"prompt_lookup must be 0 for {type(model).__name__}: states of its layers cannot go back")
    if undo is not None and undo < drafted:
        raise ConfigError(f"prompt_lookup={drafted} needs octavo.attach(model, ..., undo={drafted}), not undo={undo}")
