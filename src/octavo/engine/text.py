"""Text from tokens as they come, and where it ends."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from octavo.errors import PromptError

_BROKEN = "�"  # what tokenizers show for bytes that are no character yet


def check_prompt(ids: Sequence[int], embedded: int) -> None:
    """Raise PromptError where a prompt, not empty, has a token for which a model with so many embeddings has none.

    Looking up the embedding of one fails in the middle of a step; on a GPU it ends the process, other requests with it.
    """
    for token in (min(ids), max(ids)):
        if not 0 <= token < embedded:
            raise PromptError(f"the prompt has the token {token}; the model's are those from 0 to {embedded - 1}")


class Detokenizer:
    """Turns one request's tokens into text, piece by piece. `tokenizer` None: there is no text."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._start = 0  # the tokens from here on are decoded together, since spaces depend on the token before
        self._shown = 0  # of these, so many have been given out

    def add(self, token: int, last: bool = False) -> str:
        """The text that a token adds; it waits for more where a character is not whole, unless it is the `last`."""
        if self._tokenizer is None:
            return ""
        self._tokens.append(token)
        before = self._decode(self._tokens[self._start : self._shown])
        now = self._decode(self._tokens[self._start :])
        if now.endswith(_BROKEN) and not last:
            return ""
        self._start, self._shown = self._shown, len(self._tokens)
        return now[len(before) :]

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))


def cut_at(text: str, new: int, stops: Sequence[str]) -> int | None:
    """Where the first stop string in `text` begins, of which the last `new` characters have just come; None: none."""
    found = [text.find(stop, max(0, len(text) - new - len(stop) + 1)) for stop in stops]
    begun = [at for at in found if at >= 0]
    return min(begun) if begun else None


def ends_of(model: PreTrainedModel, tokenizer: Any) -> set[int]:
    """Tokens that end a text."""
    config: Any = model.generation_config
    ends = getattr(config, "eos_token_id", None)
    found = set(ends if isinstance(ends, list) else [] if ends is None else [ends])
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        found.add(tokenizer.eos_token_id)
    return found
