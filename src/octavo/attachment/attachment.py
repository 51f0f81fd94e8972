"""A Hugging Face model joined with gates, SwiftKV, pages and attention, at seams that transformers offers.

Three seams: the attention function (`AttentionInterface`), the cache (`Cache`), and the forward calls of the
decoder, its layers and its attention modules. Nothing of the model is copied and nothing is global: what runs
inside a forward (`octavo.attachment.forward`) gets all it needs with the call.
"""

import functools
import inspect
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from octavo.attachment.borrowed import lends_channel
from octavo.attachment.cache import KVCache
from octavo.attachment.compiled import compiled
from octavo.attachment.decoder import run_decoder
from octavo.attachment.drafts import run_candidates, run_drafts
from octavo.attachment.forward import NAME, RUNNING, Forward, ask_for_logits, remember_hidden, run_attention, run_layer
from octavo.attachment.graphs import Graphs
from octavo.attachment.identity import Digests
from octavo.attachment.layout import Layout, decoder_of, joined
from octavo.attachment.modes import Modes
from octavo.attachment.prompt_graphs import PromptGraphs
from octavo.attachment.reuse import Reuse, run_generate
from octavo.attachment.supported import reach_of
from octavo.attention import FEW, Packed
from octavo.config import CacheSettings
from octavo.dms import Adapter, HardGates, Policy
from octavo.errors import CacheStateError, ConfigError, NotAttachedError
from octavo.kv import CacheShape, Memory
from octavo.swiftkv import SwiftKV, SwiftKVAdapter
from octavo.swiftkv.initial import MODEL_TYPES

CANDIDATES = "_get_candidate_generator"  # what transformers' `generate` asks a model for where it is to draft


def attachment_of(model: PreTrainedModel) -> "Attachment | None":
    """What `attach` joined to this model, or to the language model inside it, or None."""
    return model.__dict__.get("_octavo") or joined(model).__dict__.get("_octavo")


def require_attachment(model: PreTrainedModel) -> "Attachment":
    """What `attach` joined to this model; NotAttachedError where it joined nothing."""
    attachment = attachment_of(model)
    if attachment is None:
        raise NotAttachedError(f"{type(model).__name__} is not attached; call octavo.attach(model) first")
    return attachment


@torch.no_grad()
def fill(model: PreTrainedModel, ids: Tensor, cache: "KVCache") -> None:
    """Read tokens [B, N] int64 into a cache without asking for logits: with SwiftKV they skip the later layers."""
    decoder_of(joined(model))(input_ids=ids, past_key_values=cache, use_cache=True, octavo_keep=0)


class Attachment:
    """One model's join: its adapters and settings, and what is needed to undo it.

    `policy` and `transform` are what forwards without a cache run under (None: dense; None: base model); see
    `using`.
    """

    policy: Policy | None
    transform: SwiftKV | None

    def __init__(
        self,
        model: PreTrainedModel,
        layout: Layout,
        adapter: Adapter | None,
        swiftkv: SwiftKVAdapter | None,
        settings: CacheSettings,
        reuse: Reuse | None = None,
    ) -> None:
        self.model, self.layout, self.reuse = model, layout, reuse
        self.modes = Modes(model, layout, adapter, swiftkv)
        self.settings = settings
        self.borrowed = lends_channel(model.config)
        plain = not (layout.windowed or layout.heads or layout.states)  # what a captured step knows
        self.reach = reach_of(model.config)
        self.needs_whole = self.reach.steady is not None  # all of an input must run as one chunk
        # Dynamic RoPE puts other buffers in the place of those that a graph has captured.
        self.captures = settings.cuda_graphs and plain and not (self.needs_whole and self.reach.most is None)
        self.original: Callable[..., Any] = decoder_of(model).forward
        self.digests = Digests()
        self._start()
        self._attention_before: str | None = None
        self._replaced: list[tuple[nn.Module, str, Any]] = []  # modules, which of their methods is ours, what they had
        self._hooks: list[RemovableHandle] = []
        self.switch(swiftkv is not None)

    def _start(self) -> None:
        """What no copy shares: a copy's weights may change, so it must refuse the caches of the original."""
        self.key = uuid.uuid4().hex  # what caches remember of it; never used again
        self._memory: Memory | None = None
        self.graphs = Graphs(self) if self.captures else None
        self.prompts = PromptGraphs(self) if self.captures else None
        self._lock = threading.Lock()  # two threads may make a model's first caches

    def __getstate__(self) -> dict[str, Any]:
        """For deep copies and pickles."""
        return {
            name: value
            for name, value in self.__dict__.items()
            if name not in ("key", "_memory", "_lock", "graphs", "prompts")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    def join(self) -> None:
        """Put everything in place; where that fails the model is as it was."""
        model = self.model
        base = decoder_of(model)
        try:
            self._attention_before = model.config._attn_implementation
            self.original = base.forward
            self.layout.number()
            for module in self.layout.attention:
                self._hooks.append(module.register_forward_pre_hook(remember_hidden, with_kwargs=True))
            model.set_attn_implementation(NAME)
            names = list(inspect.signature(base.forward).parameters)
            # Partials of plain functions, not closures: a deep copy of the model runs itself, not this one.
            decoder = functools.partial(run_decoder, self, names)
            self._replace(base, functools.update_wrapper(decoder, base.forward))
            if model.config.model_type in MODEL_TYPES:
                self._join_layers(base)
            if hasattr(model, "generate"):
                self._join_generate(model)
            model.__dict__["_octavo"] = self
        except BaseException:
            self.undo()
            raise

    def _join_layers(self, base: Any) -> None:
        """What SwiftKV needs in models that may have it."""
        model = self.model
        if base is not model and "logits_to_keep" in inspect.signature(model.forward).parameters:
            self._hooks.append(model.register_forward_pre_hook(ask_for_logits, with_kwargs=True))
        for i, layer in enumerate(base.layers):
            attention = layer.self_attn
            self._replace(layer, functools.partial(run_layer, i, layer.forward))
            self._replace(attention, functools.partial(run_attention, attention, attention.forward))

    def _join_generate(self, model: Any) -> None:
        """Let `generate` prepare for drafts, and look prompts up where there is a store."""
        own = model.generate
        like = functools.partial(functools.update_wrapper, wrapped=own, assigned=("__doc__", "__name__"), updated=())
        generate: Any = like(functools.partial(run_drafts, self, own))  # with no more of it than can be pickled
        if self.reuse is not None:
            generate = like(functools.partial(run_generate, self, generate))
        self._replace(model, generate, "generate")
        self._replace(model, functools.partial(run_candidates, model._get_candidate_generator), CANDIDATES)

    def undo(self) -> None:
        """Put everything back; `join` may follow, and caches made before it work again then."""
        for module, name, before in self._replaced:
            if before is None:
                module.__dict__.pop(name, None)
            else:
                module.__dict__[name] = before
        for hook in self._hooks:
            hook.remove()
        self._replaced, self._hooks = [], []
        self.layout.forget()
        if self._attention_before is not None:
            self.model.set_attn_implementation(self._attention_before)
        self.model.__dict__.pop("_octavo", None)

    def _replace(self, module: nn.Module, ours: Callable[..., Any], name: str = "forward") -> None:
        self._replaced.append((module, name, module.__dict__.get(name)))
        module.__dict__[name] = ours

    def memory(self, shape: CacheShape) -> Memory:
        """The memory of all caches, on the device and in the dtype that the model has now.

        Raises CacheStateError where there is a budget and caches of another dtype or device still hold a part of it,
        and where the model has no numbers to compute with.
        """
        if shape.device.type == "meta":
            raise CacheStateError(
                f"{type(self.model).__name__} lies on the meta device: its weights are not loaded, or were offloaded "
                "after octavo.attach; load them, as octavo.attach wants them, on one device"
            )
        layout = shape.layout(self.settings)
        with self._lock:
            memory = self._memory
            if memory is not None and (memory.layout, memory.device) == (layout, shape.device):
                return memory
            if memory is not None and self.settings.budget is not None and memory.sequences:
                had, has = (
                    f"{_name(m.dtype)} on {d}" for m, d in ((memory.layout, memory.device), (layout, shape.device))
                )
                raise CacheStateError(
                    f"{memory.sequences} sequences in {had} still hold {memory.nbytes:,} bytes of the budget of "
                    f"{self.settings.budget:,}; reset or delete their caches before the model reads in {has}, or "
                    "attach it without a budget"
                )
            if memory is not None:
                memory.trim(0)
            self._memory = Memory(layout, shape.kv_heads, shape.device, self.settings.budget)
            if memory is not None and self.graphs is not None:
                # Those captured hold the memory before and read adapters where they were.
                self.graphs, self.prompts = Graphs(self), PromptGraphs(self)
            return self._memory

    @property
    def kv_nbytes(self) -> int:
        """Bytes of device memory that all caches of the model hold: pages, free or in use, and tables."""
        return 0 if self._memory is None else self._memory.nbytes

    def forward_on(self, cache: KVCache, keep: int, **more: Any) -> Forward:
        """A forward on a cache under the gates and the transform of the cache's mode; `keep` and `more`: see there."""
        on, modes = cache.swiftkv_on, self.modes
        transform = modes.transform() if on else None
        return Forward(
            self.layout, cache, modes.folded(on), keep=keep, transform=transform, borrowed=self.borrowed, **more
        )

    def run(self, forward: Forward, **kwargs: Any) -> Any:
        """The decoder's own forward, whose attention finds `forward`, and whose masks that there is one."""
        told = {"octavo_forward": forward} if self.layout.keywords else {}
        unread = forward.packed is None and (kwargs.get("attention_mask") is None or self.layout.states)
        if told and (unread or torch.compiler.is_compiling()):  # which cannot trace a context variable
            return self.original(**kwargs, **told)
        token = RUNNING.set(forward)
        try:
            return self.original(**kwargs, **told)
        finally:
            RUNNING.reset(token)

    def pieces(self, columns: int, trains: bool, sums: bool = False) -> AbstractContextManager[None]:
        """What a forward of so many tokens of each sequence on a cache runs in: with compiled pieces, or as it is."""
        if not self.settings.compiled or columns <= FEW or trains or not self._compiles():
            return nullcontext()
        return compiled(decoder_of(self.model), self.layout.attention, lengths_vary=True, sums=sums)

    def _compiles(self) -> bool:
        """Whether code compiled for other calls fits this one: on a GPU, without gradients or autocast."""
        return (
            self.modes.device.type == "cuda"
            and not (torch.is_grad_enabled() or torch.is_autocast_enabled("cuda"))
            and not torch.compiler.is_compiling()
        )

    # Modes and what they mean

    @property
    def adapter(self) -> Adapter | None:
        """The gates that were attached."""
        return self.modes.adapter

    @property
    def swiftkv(self) -> SwiftKVAdapter | None:
        """The transform that was attached."""
        return self.modes.swiftkv

    @property
    def adapters(self) -> list[Adapter | SwiftKVAdapter]:
        """What was attached."""
        return [a for a in (self.swiftkv, self.adapter) if a is not None]

    def switch(self, on: bool) -> None:
        """See `set_swiftkv`."""
        self.swiftkv_on = self.checked_mode(on) if on else False
        self.policy, self.transform = self.modes.oracle(self.swiftkv_on)
        self._ours = True

    def checked_mode(self, wanted: bool | None) -> bool:
        """The mode that was asked for, or the present one. Raises ConfigError for SwiftKV where there is none."""
        if wanted and self.swiftkv is None:
            raise ConfigError("this model has no SwiftKV adapter; attach one, as in octavo.attach(model, 'swiftkv')")
        return self.swiftkv_on if wanted is None else wanted

    @contextmanager
    def using(self, policy: Policy | None, transform: SwiftKV | None = None) -> Iterator[None]:
        """Run forwards without a cache under another policy (soft gates, a baseline; None: dense) and transform."""
        before = self.policy, self.transform, self._ours
        self.policy, self.transform, self._ours = policy, transform, False
        try:
            yield
        finally:
            self.policy, self.transform, self._ours = before

    def oracle(self, mode: bool) -> tuple[Policy | None, SwiftKV | None]:
        """What a forward without a cache runs under in a mode."""
        return self.modes.oracle(self.checked_mode(mode))

    def running(self) -> tuple[Policy | None, SwiftKV | None]:
        """`policy` and `transform` of a forward without a cache; our own follow the model where it has moved since."""
        if isinstance(self.policy, HardGates):
            self.policy.gates.to(self.modes.device)
        if self.transform is not None and self._ours:
            self.transform = self.modes.transform()
        return self.policy, self.transform

    def run_layers(
        self,
        residual: Tensor,
        first: int,
        last: int,
        positions: Tensor,
        *,
        policy: Policy | None = None,
        transform: SwiftKV | None = None,
        document: Tensor | None = None,
    ) -> list[Tensor]:
        """Decoder layers first..last-1 alone, without a cache: the residual streams [B, T, hidden] after each.

        `residual` [B, T, hidden] enters layer `first` (at most K with SwiftKV); `positions` [B, T] int64;
        `document` [B, T] int32 tells packed documents apart, -1 is padding. For training: gradients flow.
        """
        base = decoder_of(self.model)
        rotary = base.rotary_emb(residual, position_ids=positions)
        packed = None if document is None else Packed(document)
        forward = Forward(self.layout, policy=policy, transform=transform, packed=packed, borrowed=self.borrowed)
        streams = []
        for layer in base.layers[first:last]:
            residual = layer(
                residual,
                attention_mask=None,
                position_ids=positions,
                position_embeddings=rotary,
                past_key_values=None,
                use_cache=False,
                octavo_forward=forward,
            )
            streams.append(residual)
        return streams


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
