"""The face of the engine: texts in, texts out."""

import asyncio
import operator
import textwrap
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import PreTrainedModel

from octavo.config import nbytes
from octavo.engine.engine import Engine
from octavo.engine.grammar import Constraint, Grammars
from octavo.engine.request import Output, Request
from octavo.engine.sampling import SamplingParams
from octavo.errors import ConfigError, NotAttachedError, PromptError
from octavo.models import load

Prompt = str | Sequence[int]


class LLM:
    """A model that answers many prompts at once.

    `model`: "default" (the embedded one), a folder, a GGUF file, a hub id, or a model that `octavo.attach` has joined;
    then `tokenizer` comes with it and `adapter` and the settings that `attach` takes are its own. `kv_memory`: bytes
    for keys and values, a number or a text such as "2GiB", None: no bound. `max_batch`: requests that run at once;
    `step_tokens`, `prompt_lookup`: see `Engine`. `settings` go to `octavo.attach`, a `reuse` store too; on CUDA decode
    steps run from graphs by default.

    Not for several threads at once. Raises what `octavo.models.load` raises, and ConfigError.
    """

    def __init__(
        self,
        model: str | Path | PreTrainedModel = "default",
        *,
        tokenizer: Any = None,
        adapter: Any = "auto",
        kv_memory: int | str | None = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        max_batch: int = 64,
        step_tokens: int | None = None,
        prompt_lookup: int = 0,
        **settings: Any,
    ) -> None:
        if isinstance(model, PreTrainedModel):
            if "_octavo" not in model.__dict__:
                raise NotAttachedError(f"{type(model).__name__} is not attached; call octavo.attach(model) first")
            if kv_memory is not None or settings:
                raise ConfigError("kv_memory and settings are those that octavo.attach was given with this model")
            self.model, self.tokenizer = model, tokenizer
        else:
            on_gpu = torch.device(device).type == "cuda" if device else torch.cuda.is_available()
            settings.setdefault("cuda_graphs", on_gpu)
            self.model, self.tokenizer = load(
                None if model == "default" else model, adapter, dtype=dtype, device=device,
                budget=None if kv_memory is None else nbytes(kv_memory, "kv_memory"), **settings,
            )  # fmt: skip
        self.model.train(False)
        self._grammars: Grammars | None = None
        self.engine = Engine(
            self.model, self.tokenizer, max_batch=max_batch, step_tokens=step_tokens, prompt_lookup=prompt_lookup
        )

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        **grammar: Any,
    ) -> list[Output]:
        """Answer prompts, each a text or tokens; outputs in their order, the n samples of a prompt one after another.

        `params`: for all, or one for each. `grammar`: `json_schema` (a dict or its text), `regex` or `ebnf`, to which
        all answers conform; it needs xgrammar. An output whose request failed has its `error`. Raises PromptError for a
        prompt that is empty, too long, no text and no tokens, or has tokens that the vocabulary lacks, and ConfigError
        for a bad grammar or where there are not as many params as prompts.
        """
        constraint = self._constraint(grammar)
        many = _one_by_one(prompts)
        each = [params] * len(many) if params is None or isinstance(params, SamplingParams) else list(params)
        if len(each) != len(many):
            raise ConfigError(f"{len(many)} prompts came with {len(each)} params; give one for all or one for each")
        requests = []
        try:
            requests += [self._add(prompt, p, constraint) for prompt, p in zip(many, each, strict=True)]
            while any(not r.finished for r in requests):
                self.engine.step()
        except BaseException:
            self._drop(requests)
            raise
        return [member.output for request in requests for member in (request, *request.family)]

    def chat(
        self,
        messages: Sequence[Mapping[str, str]],
        params: SamplingParams | None = None,
        *,
        template: Mapping[str, Any] | None = None,
        **grammar: Any,
    ) -> Output:
        """The answer to a conversation, by the tokenizer's chat template; `template` goes to it, `grammar` as above.

        Raises ConfigError where the tokenizer has none, PromptError where the conversation is too long, or is none that
        the template takes.
        """
        return self.generate([self._chat_prompt(messages, template or {})], params, **grammar)[0]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[str]:
        """The answer's text, piece by piece as it comes; closing the iterator ends the request. Raises as `generate`,
        and the error with which the request failed."""
        request = self._add(prompt, params)
        shown = 0
        try:
            while not request.done:
                self.engine.step()
                if piece := _after(request, shown):
                    shown += len(piece)
                    yield piece
            if request.output.error is not None:
                raise request.output.error
        finally:
            self._drop([request])

    async def astream(self, prompt: Prompt, params: SamplingParams | None = None) -> AsyncIterator[str]:
        """`stream` for asyncio: steps run in a thread, one at a time; other requests of this LLM share them."""
        request = self._add(prompt, params)
        shown = 0
        try:
            while not request.done:
                async with self._turn():
                    if not request.done:
                        await asyncio.to_thread(self.engine.step)
                if piece := _after(request, shown):
                    shown += len(piece)
                    yield piece
            if request.output.error is not None:
                raise request.output.error
        finally:
            async with self._turn():
                self._drop([request])

    def _turn(self) -> asyncio.Lock:
        """The lock of the running event loop: one step at a time."""
        loop = asyncio.get_running_loop()
        held: tuple[Any, asyncio.Lock] | None = self.__dict__.get("_lock")
        if held is None or held[0] is not loop:
            self.__dict__["_lock"] = held = (loop, asyncio.Lock())
        return held[1]

    def _add(self, prompt: Prompt, params: SamplingParams | None, constraint: Constraint | None = None) -> Request:
        text = prompt if isinstance(prompt, str) else None
        own = None if constraint is None else constraint.copy()
        return self.engine.add(self._tokens(prompt), params, text=text, constraint=own)

    def _constraint(self, grammar: Mapping[str, Any]) -> Constraint | None:
        given = {name: value for name, value in grammar.items() if value is not None}
        if not given:
            return None
        if not set(given) <= {"json_schema", "regex", "ebnf"} or len(given) > 1:
            raise ConfigError(f"only one of json_schema, regex and ebnf can be given, not {', '.join(given)}")
        if self.tokenizer is None:
            raise ConfigError("a grammar needs a tokenizer; give one with the model")
        if self._grammars is None:
            self._grammars = Grammars(self.tokenizer, self.engine.sampler.vocab_size, sorted(self.engine.ends))
        ((name, value),) = given.items()
        made: Constraint = getattr(self._grammars, name)(value)
        return made

    def _tokens(self, prompt: Prompt) -> list[int]:
        if not isinstance(prompt, str):
            try:
                return [operator.index(token) for token in prompt]
            except TypeError as error:
                raise PromptError(f"a prompt is a text or a list of token ids, not {_shown(prompt)}") from error
        if self.tokenizer is None:
            raise ConfigError("this LLM has no tokenizer; give prompts as tokens, or a tokenizer with the model")
        tokens: list[int] = self.tokenizer(prompt, verbose=False)["input_ids"]
        return tokens

    def _chat_prompt(self, messages: Sequence[Mapping[str, str]], template: Mapping[str, Any]) -> list[int]:
        if getattr(self.tokenizer, "chat_template", None) is None:
            raise ConfigError("the tokenizer has no chat template; use generate with a prompt of your own")
        whole = isinstance(messages, Sequence) and all(
            isinstance(each, Mapping) and "role" in each for each in messages
        )
        if not whole:
            raise PromptError(
                "a conversation is a list of messages such as {'role': 'user', 'content': 'Hello'}, "
                f"not {_shown(messages)}"
            )
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=True, tokenize=False, **template
            )
        except TemplateError as error:
            raise PromptError(f"the chat template does not take {_shown(messages)}: {error}") from error
        tokens: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return tokens

    def _drop(self, requests: Sequence[Request]) -> None:
        for request in requests:
            for member in (request, *request.family):
                if not member.done:
                    self.engine.cancel(member)


def _one_by_one(prompts: Any) -> list[Any]:
    """What `generate` is given as a list of prompts.

    Tensors and tokenizers' outputs are refused: their rows may be padded, and padding would be read as text.
    """
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, torch.Tensor | Mapping) or not isinstance(prompts, Iterable):
        raise PromptError(
            f"prompts are a text, a list of token ids or a list of these, not {_shown(prompts)}; of a tensor without "
            "padding give tolist()"
        )
    many = list(prompts)
    return [many] if many and isinstance(many[0], int) else many


def _shown(given: object) -> str:
    """The beginning of what was given, for an error."""
    return f"{type(given).__name__} {textwrap.shorten(repr(given), 60, placeholder=' ...')}"


def _after(request: Request, shown: int) -> str:
    """The text after its first `shown` characters that is certain to stay."""
    return (request.output.text if request.done else _unambiguous(request))[shown:]


def _unambiguous(request: Request) -> str:
    """The text so far without an end that may turn out to begin a stop string."""
    text, longest = request.output.text, 0
    for stop in request.params.stops:
        for length in range(1, min(len(stop), len(text) + 1)):
            if text.endswith(stop[:length]):
                longest = max(longest, length)
    return text[: len(text) - longest]
