"""The engine: `step` is schedule, run, postprocess.

On a GPU the host reads a step's tokens while the next one runs, so a request that has just ended takes part in one step
more, whose token is dropped.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any

import torch
from transformers import PreTrainedModel

from octavo.attachment import require_attachment
from octavo.engine.answers import known
from octavo.engine.grammar import Constraint
from octavo.engine.lookup import check_lookup, looked_up
from octavo.engine.request import Output, Request
from octavo.engine.runner import Runner
from octavo.engine.sampling import Sampled, Sampler, SamplingParams
from octavo.engine.scheduler import Plan, Scheduler
from octavo.engine.text import Detokenizer, check_prompt, cut_at, ends_of
from octavo.errors import CacheBudgetError, ConfigError, PromptError

STEP_TOKENS = {"cuda": 8192, "cpu": 512}  # by device: what a step spends at most
PADDING = {"cuda": 1.5}  # see `scheduler.together`; on a GPU a forward costs its launches, however short it is


class Engine:
    """Requests over one attached model. Not for several threads at once.

    `tokenizer` turns tokens into text and stop strings into ends; None: tokens only. `max_batch`: requests that run at
    once. `step_tokens`: tokens of prompts and running requests in one step, None: 8,192 on CUDA, 512 elsewhere.
    `prompt_lookup`: while one request runs alone, up to so many tokens are drafted from its own text and checked in one
    step; what it answers is the same. Requests with stop strings or a grammar go without.

    Raises ConfigError for impossible settings.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: Any = None, *, max_batch: int = 64, step_tokens: int | None = None,
        prompt_lookup: int = 0,
    ) -> None:  # fmt: skip
        device = require_attachment(model).modes.device
        step_tokens = STEP_TOKENS.get(device.type, STEP_TOKENS["cpu"]) if step_tokens is None else step_tokens
        for name, value in (("max_batch", max_batch), ("step_tokens", step_tokens)):
            if value < 1:
                raise ConfigError(f"{name} must be at least 1, not {value}")
        check_lookup(model, prompt_lookup)
        config: Any = model.config
        embeddings: Any = model.get_input_embeddings()
        self.model, self.tokenizer, self.embedded = model, tokenizer, len(embeddings.weight)
        self.ends = ends_of(model, tokenizer)
        # Asked once: a configuration takes longer to answer than a request's part of a step.
        self.positions: float = require_attachment(model).reach.in_pieces or math.inf
        self.sampler = Sampler(max_batch, config.get_text_config().vocab_size, device, eos=tuple(self.ends))
        self.scheduler = Scheduler(max_batch, step_tokens, PADDING.get(device.type, 0.0))
        self.runner = Runner(model, self.sampler, prompt_lookup)
        self._free = list(range(max_batch))[::-1]  # places in the sampler
        self._arrived = 0
        self._late: deque[tuple[list[Request], Sampled, Any]] = deque()
        self._texts: dict[Request, Detokenizer] = {}

    # Requests

    def add(
        self,
        prompt: Sequence[int],
        params: SamplingParams | None = None,
        *,
        text: str | None = None,
        priority: int = 0,
        constraint: Constraint | None = None,
        on_token: Callable[[Request], None] | None = None,
    ) -> Request:
        """A new request for the tokens of a prompt.

        Lower `priority` runs first. `on_token` is called after each token; where it raises, its request ends with that
        error. `constraint`: see `octavo.engine.grammar`; the host reads each of its tokens before the next step.

        Raises PromptError where the prompt is empty, too long or has tokens that the vocabulary lacks, and ConfigError
        where more samples are asked for than may run at once, or `params` name tokens that the vocabulary lacks.
        """
        params = params or SamplingParams()
        if not prompt:
            raise PromptError("the prompt is empty; give at least one token")
        if len(prompt) >= self.positions:
            has = f"{self.positions:,} positions{require_attachment(self.model).reach.why}"
            raise PromptError(f"the prompt has {len(prompt):,} tokens, the model has {has}; shorten it")
        if params.n > self.scheduler.max_batch:
            raise ConfigError(f"n is {params.n}, and at most {self.scheduler.max_batch} requests run at once")
        check_prompt(prompt, self.embedded)
        self.sampler.check(params)
        seed = torch.seed() % 2**63 if params.seed is None else params.seed
        self._arrived += 1
        output = Output(text, list(prompt))
        request = Request(self._arrived, list(prompt), params, seed, output, priority, on_token=on_token)
        request.constraint = constraint
        request.siblings = params.n - 1
        self.scheduler.add(request)
        return request

    def cancel(self, request: Request) -> None:
        """End a request now; what it holds is given back, and its output so far stays."""
        self._settle()
        if not request.done:
            self._end(request, "cancelled")

    def preempt(self, request: Request) -> None:
        """Take a running request's memory for others; it goes on later with the same output."""
        self._settle()
        if request in self.scheduler.running:
            self.runner.preempt(request)
            self._release(request)
        elif request in self.scheduler.prefilling:
            request.forget()
        else:
            return
        self.scheduler.back(request)

    @property
    def unfinished(self) -> int:
        """Requests that are not done."""
        return self.scheduler.unfinished

    @property
    def kv_nbytes(self) -> int:
        """Bytes of device memory held for keys and values, of other users of the model too."""
        return require_attachment(self.model).kv_nbytes

    # One step

    @torch.no_grad()
    def step(self) -> None:
        """Schedule, run, postprocess: some prompts read on, and each running request gets a token."""
        plan = self.scheduler.plan()
        self._run(plan)
        self._postprocess(waits=not plan.decode)

    def _run(self, plan: Plan) -> None:
        if plan.decode:
            self._decode()
        for group in plan.prefill:
            reads = [(r, count) for r, count in group if not r.done and r in self.scheduler.prefilling]
            if len(reads) > 1 and self._prefill_together([request for request, _ in reads]):
                continue
            for request, count in reads:
                if request in self.scheduler.prefilling:  # it may have had to make room for the one before
                    self._prefill(request, count)

    def _decode(self) -> None:
        if any(request.constraint is not None for request in self.runner.running):
            self._settle()  # a grammar must have seen a token before it says what may follow
        drafted = self._drafted()
        while self.runner.running:
            try:
                sampled = self.runner.decode_ahead(drafted) if drafted else [self.runner.decode()]
            except CacheBudgetError as error:
                if not drafted:
                    self._make_room(None, error)
                drafted = []  # one token may have room where several have none
            else:
                for each in sampled:
                    self._post(list(self.runner.running), each)
                return

    def _drafted(self) -> list[int]:
        """What the only running request may say next, as far as its end cannot come before."""
        if not self.runner.drafted or len(self.runner.running) != 1:
            return []
        self._settle()  # its last token is where the look begins
        if not self.runner.running:
            return []
        (request,) = self.runner.running
        params, output = request.params, request.output
        if request.constraint is not None or params.stops:
            return []
        left = min(params.max_tokens, self.positions - len(request.prompt)) - len(output.tokens)
        most = int(min(self.runner.longest_draft(), left - 1))
        drafted = looked_up(request.tokens, most) if most > 0 else []
        ends = {*params.stop_token_ids, *(() if params.ignore_eos else self.ends)}
        return list(takewhile(lambda token: token not in ends, drafted))

    def _prefill(self, request: Request, count: int) -> None:
        if not request.read and not request.output.tokens and self._answered(request):
            return
        while True:
            try:
                if request.snapshot is not None:
                    self.runner.resume(request)
                logits = self.runner.prefill(request, count)
                break
            except CacheBudgetError as error:
                if not self._make_room(request, error):
                    return
            except Exception as error:  # one request's failure is not the others'
                self._end(request, "error", error)
                return
        if logits is not None:
            self._begin([request, *(twins := request.fork())], logits.expand(1 + len(twins), -1))

    def _prefill_together(self, requests: list[Request]) -> bool:
        """Read whole prompts in one forward; False, with nothing changed, where it fails and each must try alone."""
        if require_attachment(self.model).reuse is not None:  # each is looked up by itself
            return False
        try:
            logits = self.runner.prefill_together(requests)
        except Exception:  # no room for all, or one of them is at fault: alone they will tell
            return False
        self._begin(requests, logits)
        return True

    def _begin(self, requests: list[Request], logits: torch.Tensor) -> None:
        """Requests whose prompts have been read get their first tokens and join those that run; `logits` [n, V]."""
        for request in requests:
            request.slot = self._free.pop()
            self.sampler.add(request.slot, request.params, request.prompt, request.seed, request.output.tokens)
        sampled = self.runner.first(requests, logits)
        self.runner.join(requests, sampled.tokens)
        for request in requests:
            self.scheduler.ran(request)
        self._post(requests, sampled)

    def _answered(self, request: Request) -> bool:
        """Whether the reuse store knows the whole answer, which is given then."""
        request.known = request.context.run(known, self.model, request, self.ends)
        answer = None if request.known is None else request.context.run(request.known.find)
        if answer is not None:
            request.known = None  # it is kept already, or is another prompt's
        for token in answer or ():
            if not request.done:
                self._accept(request, token)
        return request.done

    def _make_room(self, wanting: Request | None, error: CacheBudgetError) -> bool:
        """Take memory from who came last; False where that is `wanting` itself, or it can never fit and has failed."""
        self._settle()
        victim = self.scheduler.victim(wanting)
        if wanting is None and victim is None:
            return True  # those that ran have ended meanwhile
        alone = victim is None or (wanting is None and self.scheduler.holding() == [victim])
        if alone:
            failed = wanting or victim
            assert failed is not None
            self._end(failed, "error", error)
            return False
        assert victim is not None
        if victim is wanting and victim.snapshot is None:
            victim.forget()
            self.scheduler.back(victim)
        elif victim is wanting:
            self.scheduler.back(victim)
        else:
            self.preempt(victim)
        return victim is not wanting

    # What came out

    def _post(self, requests: list[Request], sampled: Sampled) -> None:
        """Begin to bring a step's tokens to the host."""
        event = None
        if sampled.tokens.is_cuda:
            tokens, logprobs, *top = (None if t is None else _arriving(t) for t in sampled)
            assert tokens is not None
            assert logprobs is not None
            sampled = Sampled(tokens, logprobs, *top)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        self._late.append((requests, sampled, event))

    def _postprocess(self, waits: bool) -> None:
        """Take in the tokens of earlier steps, and of this one where the host need not wait for them or `waits`."""
        while self._late and (waits or len(self._late) > 1 or self._late[0][2] is None):
            self._take(*self._late.popleft())

    def _settle(self) -> None:
        """Take in all that has been sampled."""
        self._postprocess(waits=True)

    def _take(self, requests: list[Request], sampled: Sampled, event: Any) -> None:
        if event is not None:
            event.synchronize()
        tokens, logprobs = sampled.tokens.tolist(), sampled.logprobs.tolist()
        for row, request in enumerate(requests):
            if request.done:
                if request in self.scheduler.running:  # it failed while it ran
                    self._end(request, request.output.finish_reason or "error", request.output.error)
                continue
            if request.params.logprobs is not None:
                request.output.logprobs.append(logprobs[row])
                request.output.alternatives.append(sampled.alternatives(row, request.params.logprobs))
            self._accept(request, tokens[row])

    def _accept(self, request: Request, token: int) -> None:
        """A request has got its next token."""
        request.output.tokens.append(token)
        if request.constraint is not None:
            request.constraint.accept(token)
        reason = self._reason(request, token)
        if reason is not None:
            self._end(request, reason)
        if request.on_token is not None:
            try:
                request.on_token(request)
            except Exception as error:  # the others' tokens of this step are still to be taken in
                if not request.done:
                    self._end(request, "error", error)

    def _reason(self, request: Request, token: int) -> str | None:
        """Why a request ends with this token, None: it goes on. Adds the token's text."""
        output, params = request.output, request.params
        enough = len(output.tokens) >= params.min_tokens
        ends = enough and ((token in self.ends and not params.ignore_eos) or token in params.stop_token_ids)
        full = len(output.tokens) >= min(params.max_tokens, self.positions - len(request.prompt))
        detokenizer = self._texts.get(request)
        if detokenizer is None:
            detokenizer = self._texts[request] = Detokenizer(self.tokenizer)
        new = "" if ends else detokenizer.add(token, last=full)
        output.text += new
        at = cut_at(output.text, len(new), params.stops) if enough and params.stops else None
        if at is not None:
            output.text = output.text[:at]
        return "stop" if ends or at is not None else "length" if full else None

    def _end(self, request: Request, reason: str, error: Exception | None = None) -> None:
        request.output.finish_reason, request.output.error = reason, error
        if error is None:
            self.runner.remember(request)
            if request.known is not None and reason != "cancelled":
                request.context.run(request.known.keep, request.output.tokens)
        self.runner.leave([request])
        request.forget()
        self._release(request)
        self._texts.pop(request, None)
        self.scheduler.ended(request)

    def _release(self, request: Request) -> None:
        """Give back a request's place in the sampler."""
        if request.slot is not None:
            self.sampler.remove(request.slot)
            self._free.append(request.slot)
            request.slot = None


def _arriving(t: torch.Tensor) -> torch.Tensor:
    """A copy on the host, whole when the device has got there."""
    there = torch.empty(t.shape, dtype=t.dtype, pin_memory=True)
    return there.copy_(t, non_blocking=True)
