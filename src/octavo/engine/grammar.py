"""Output that follows a JSON schema, a regular expression or a grammar, through xgrammar (`pip install xgrammar`).

xgrammar computes on the host which tokens may come next, a bit each, so a constrained request costs more than others:
the host must have read its last token (`accept`) before the next step's bits are filled, and each step with constrained
requests copies their bits, V / 8 bytes a request, to the device, all in one copy. Other requests pay nothing.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from octavo.engine.sampling import Allowed
from octavo.errors import ConfigError


class Grammars:
    """Compiles constraints for one tokenizer; what was compiled before is found again.

    `tokenizer`: a Hugging Face tokenizer. `vocab_size`: V of the model's logits. `ends`: tokens that may end the output
    once the grammar is satisfied, None: the tokenizer's end of text.

    Raises ConfigError where xgrammar is missing or cannot read the tokenizer.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, ends: Sequence[int] | None = None) -> None:
        self._xgrammar = _xgrammar()
        if not ends and getattr(tokenizer, "eos_token_id", None) is None:
            raise ConfigError("the tokenizer has no end-of-text token; name the tokens that may end the output in ends")
        try:
            info = self._xgrammar.TokenizerInfo.from_huggingface(
                tokenizer, vocab_size=vocab_size, stop_token_ids=sorted(ends) if ends else None
            )
        except (ValueError, TypeError, RuntimeError, AttributeError) as error:
            raise ConfigError(f"xgrammar cannot read the tokenizer: {_said(error)}") from error
        self.vocab_size = vocab_size
        self._compiler = self._xgrammar.GrammarCompiler(info, max_threads=2)

    def json_schema(self, schema: str | Mapping[str, Any]) -> "Constraint":
        """Output is JSON that fits the schema, and has no other properties. Raises ConfigError for a schema that is
        none, or that xgrammar does not support."""
        text = schema if isinstance(schema, str) else _json(schema)
        return self._constraint("JSON schema", self._compiler.compile_json_schema, text)

    def regex(self, pattern: str) -> "Constraint":
        """Output matches the pattern from its first to its last character. Raises ConfigError for a pattern that is
        none, or that xgrammar does not support (look-around, for one)."""
        return self._constraint("regular expression", self._compiler.compile_regex, pattern)

    def ebnf(self, grammar: str) -> "Constraint":
        """Output is a `root` of a grammar in the EBNF of llama.cpp (GBNF). Raises ConfigError where it is none."""
        return self._constraint("grammar", self._compiler.compile_grammar, grammar)

    def _constraint(self, what: str, compiled: Callable[[str], Any], text: str) -> "Constraint":
        try:
            return Constraint(self._xgrammar.GrammarMatcher(compiled(text)), self.vocab_size)
        except (ValueError, TypeError, RuntimeError) as error:
            raise ConfigError(f"the {what} cannot be used: {_said(error)}") from error


class Constraint:
    """What one request may say next; made by `Grammars`. Lives on the host."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher, self.vocab_size = matcher, vocab_size

    @property
    def terminated(self) -> bool:
        """Whether the output has ended; nothing may follow."""
        return bool(self._matcher.is_terminated())

    @property
    def satisfied(self) -> bool:
        """Whether the output so far is whole, so that it may end here."""
        return bool(self._matcher.is_completed())

    def accept(self, token: int) -> bool:
        """Take in the token that was sampled. False where it is not allowed; the constraint is as it was then."""
        return 0 <= token < self.vocab_size and not self.terminated and bool(self._matcher.accept_token(token))

    def undo(self, tokens: int) -> None:
        """Take back the last so many accepted tokens."""
        self._matcher.rollback(tokens)

    def copy(self) -> "Constraint":
        """Another one in the same state, for another sample of the prompt."""
        return Constraint(self._matcher.fork(), self.vocab_size)

    def fill(self, bits: Tensor) -> None:
        """Write what may come next to `bits` [ceil(V / 32)] int32 on the CPU: token t is bit t % 32 of word t // 32.
        After the end everything may come."""
        bits.fill_(-1)
        if not self.terminated:
            self._matcher.fill_next_token_bitmask(bits[None])

    def masked(self, logits: Tensor) -> Tensor:
        """Logits [1, V] with -inf for what may not come next; for many requests at once, see `allowed`."""
        bits = torch.empty(1, words(self.vocab_size), dtype=torch.int32)
        self.fill(bits[0])
        token = torch.arange(logits.shape[-1], device=logits.device)
        word = bits.to(logits.device)[0].index_select(0, token // 32)
        return logits.masked_fill(((word >> (token % 32)) & 1) == 0, -torch.inf)


def allowed(
    constraints: Mapping[int, Constraint],
    device: torch.device | str,
    failed: Callable[[int, Exception], None] | None = None,
) -> Allowed | None:
    """What `Sampler.sample` is to allow, given the constraints of some rows of the batch; None where there are none.

    `failed` is told of a row whose constraint raises, and what is allowed there means nothing; None: the error goes on.
    One host-to-device copy, which the host does not wait for.
    """
    if not constraints:
        return None
    device = torch.device(device)
    width = max(words(each.vocab_size) for each in constraints.values())
    packed = torch.full((len(constraints), 1 + width), -1, dtype=torch.int32)
    for i, (row, constraint) in enumerate(constraints.items()):
        packed[i, 0] = row
        try:
            constraint.fill(packed[i, 1 : 1 + words(constraint.vocab_size)])
        except Exception as error:
            if failed is None:
                raise
            failed(row, error)
    if device.type == "cuda":
        packed = packed.pin_memory()
    there = packed.to(device, non_blocking=True)
    return Allowed(there[:, 0].long(), there[:, 1:])


def words(vocab_size: int) -> int:
    """How many int32 hold a bit for each token."""
    return -(-vocab_size // 32)


def _xgrammar() -> Any:
    try:
        return import_module("xgrammar")
    except ImportError as error:
        raise ConfigError(f"grammars and JSON schemas need xgrammar: pip install xgrammar ({error})") from error


def _json(schema: Mapping[str, Any]) -> str:
    try:
        return json.dumps(dict(schema))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the JSON schema cannot be used: {error}") from error


def _said(error: Exception) -> str:
    """An error's message without the place in xgrammar's sources that precedes it."""
    text = " ".join(str(error).split())
    return text.partition(".cc:")[2].partition(": ")[2] or text
