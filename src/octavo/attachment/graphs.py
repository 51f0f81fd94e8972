"""Decode steps of an attached model in CUDA graphs: a step of one token per sequence costs the host one launch.

A graph holds the decoder's own forward for a bucket of batch sizes: planning, all layers and noting what expires, as
`octavo.kv.fused_step` does them. What changes from step to step stands in tensors that the graph reads: the tokens,
their positions, and which sequences they belong to; places of the bucket that no sequence has are empty. The first step
in a bucket runs as usual; the second is captured, and from then on steps are replayed.

A graph reads the memory that the parameters had when it was captured, and runs the modules as they were then. Where a
parameter has moved, it is captured anew; a model whose modules change (a LoRA adapter switched on or off, a hook) must
be attached anew.
"""

import functools
import threading
import warnings
from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from octavo.attachment.compiled import compiled
from octavo.attachment.forward import asked_for
from octavo.attachment.layout import decoder_of
from octavo.attachment.sums import computed
from octavo.attention import cuda
from octavo.kv.fused_step import Replayed
from octavo.kv.late import capturing

if TYPE_CHECKING:
    from octavo.attachment.attachment import Attachment
    from octavo.attachment.cache import KVCache

_PLAIN = {  # arguments of a forward that a replayed one knows; padding travels beside, and other masks are refused
    "input_ids", "position_ids", "past_key_values", "use_cache", "cache_position", "return_dict",
    "output_attentions", "output_hidden_states", "output_router_logits",
}  # fmt: skip
_ASKING = {  # operations whose result's size or value the host must know
    "_local_scalar_dense", "nonzero", "masked_select", "bincount", "_unique", "_unique2", "unique_dim",
    "unique_consecutive", "equal", "is_nonzero",
}  # fmt: skip
_COPIES = {"_to_copy", "copy_"}
Places = list[tuple[dict[str, Tensor | None], str, int]]  # where a tensor is looked up, its name there, its address
Result = TypeVar("Result")


class _Captured(NamedTuple):
    """One graph, and the tensors that it reads and writes."""

    graph: Any  # torch.cuda.CUDAGraph
    tokens: Tensor  # [B, 1] int64, B the bucket
    positions: Tensor  # [B, 1] int64
    step: Replayed
    kind: type  # of what the decoder returns
    hidden: Tensor  # its last hidden state [B, 1, hidden]; the rest of it would keep a cache alive
    generation: int  # of the tables whose addresses it holds
    parameters: Places


class Graphs:
    """The graphs of one attachment."""

    def __init__(self, attachment: "Attachment") -> None:
        self._attachment = attachment
        self._captured: dict[tuple[Any, ...], _Captured] = {}
        self._run: set[tuple[Any, ...]] = set()  # kinds of steps of which one has run as usual
        self._refused: set[tuple[Any, ...]] = set()  # kinds that cannot be captured
        self._pool: Any = None  # memory that all graphs share, since they run one after another
        self._checked = False  # whether the model is known not to ask the device

    def suits(self, cache: "KVCache", kwargs: dict[str, Any], columns: int, trains: bool) -> bool:
        """Whether this forward can be replayed; for the first of its kind, False."""
        if columns != 1 or trains or not cache.rows or not replayable(self._attachment, cache, kwargs):
            return False
        kind = self._kind(cache)
        if kind in self._run:
            return kind not in self._refused
        self._run.add(kind)
        return False

    def _kind(self, cache: "KVCache") -> tuple[Any, ...]:
        B, training = bucket(len(cache.rows)), self._attachment.model.training
        return B, cache.swiftkv_on, id(cache.tables), cache.eviction, cache.undo, cache.shape, training

    def run(self, cache: "KVCache", kwargs: dict[str, Any], valid: Tensor | None) -> Any | None:
        """One token for each of a cache's sequences; what the decoder returns, or None where the model cannot be
        captured and nothing has happened. The cache is as it was where it fails. Raises CacheBudgetError."""
        # Other threads' caches share graphs and tables, and no table may move between the look at it and the replay.
        with cache.tables.pool.lock:
            return self._run_locked(cache, kwargs, valid)

    def _run_locked(self, cache: "KVCache", kwargs: dict[str, Any], valid: Tensor | None) -> Any | None:
        given: Tensor | None = kwargs.get("position_ids")
        try:
            captured = self._fitting(cache)
            if captured is None:
                return None
            cache.sequences.begin_replay(captured.step, valid)
            B = len(cache.rows)
            captured.tokens[:B].copy_(kwargs["input_ids"])
            at = cache.position[:, None] if given is None else given
            captured.positions[:B].copy_(at if at.ndim == 2 else at[None])
            captured.graph.replay()
            moved = cache.moved if given is None else cache.moved_by(given)
            cache.sequences.commit()
            cache.moved = moved
        except BaseException:
            cache.abandon()
            raise
        return captured.kind(last_hidden_state=captured.hidden[:B].clone(), past_key_values=cache)

    def _fitting(self, cache: "KVCache") -> _Captured | None:
        """The graph for this cache's next step, captured where there is none that holds; None where it cannot be."""
        kind = self._kind(cache)
        captured = self._captured.get(kind)
        cache.sequences.make_room()
        if captured is None or captured.generation != cache.tables.generation or moved(captured.parameters):
            self._captured.pop(kind, None)
            try:
                captured = self._captured[kind] = self._capture(cache)
            except RuntimeError as e:
                if not self._captured:
                    self._pool = None  # the memory of graphs that are all gone cannot be shared any more
                if isinstance(e, torch.OutOfMemoryError):
                    self._run.discard(kind)  # there may be some later
                else:
                    self._refused.add(kind)
                    refused(e)
                return None
        return captured

    @torch.inference_mode(False)
    @torch.no_grad()
    def _capture(self, cache: "KVCache") -> _Captured:
        attachment, device, B = self._attachment, cache.shape.device, bucket(len(cache.rows))
        tokens = torch.zeros(B, 1, dtype=torch.int64, device=device)
        positions = torch.zeros_like(tokens)
        rows = torch.full((B,), -1, dtype=torch.int32, device=device)
        search = torch.zeros((), dtype=torch.int32, device=device)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        given = cache, tokens, positions, rows, search
        rehearse, run = (functools.partial(self._step, *given, rehearsal=first) for first in (True, False))
        if not self._checked:
            check_waits(rehearse, device)
            self._checked = True
        compiles = attachment.settings.compiled
        decoder, attention = decoder_of(attachment.model), attachment.layout.attention
        with compiled(decoder, attention, sums=True) if compiles else nullcontext():
            graph, (step, kind, hidden) = recorded(rehearse, run, device, self._pool)
        return _Captured(
            graph, tokens, positions, step, kind, hidden, cache.tables.generation, places(attachment.model)
        )

    def _step(
        self, cache: "KVCache", tokens: Tensor, positions: Tensor, rows: Tensor, search: Tensor, rehearsal: bool = False
    ) -> tuple[Replayed, type, Tensor]:
        """What a graph does: (the step as the host sees it, the kind of what the decoder returns, its hidden states).

        A `rehearsal` runs it at once, for nobody, so that nothing is compiled or loaded while a graph is captured.
        """
        attachment = self._attachment
        try:
            step = cache.begin_capture(rows, search)
            forward = attachment.forward_on(cache, keep=1)
            out = attachment.run(
                forward, input_ids=tokens, position_ids=positions, past_key_values=cache, use_cache=True
            )
            hidden = computed(out.last_hidden_state)
            if rehearsal:
                step.rehearse(forward.decided())
            else:
                forward.commit()
        finally:
            cache.sequences.step = None
        return step, type(out), hidden


def bucket(sequences: int) -> int:
    """The batch size that a graph is captured for: the next power of two, from 8 on the next multiple of 8."""
    return 1 << (sequences - 1).bit_length() if sequences <= 8 else -(-sequences // 8) * 8


def replayable(attachment: "Attachment", cache: "KVCache", kwargs: dict[str, Any]) -> bool:
    """Whether a graph can know all that a forward was given, and its device has graphs and our kernels."""
    tokens, positions, device = kwargs.get("input_ids"), kwargs.get("position_ids"), cache.shape.device
    if tokens is None or not cuda.available(device) or (positions is not None and positions.ndim > 2):
        return False
    if capturing(device) or torch.is_autocast_enabled("cuda"):
        return False
    if any(value is not None and name not in _PLAIN for name, value in kwargs.items()):
        return False
    config: Any = attachment.model.config
    more = any(asked_for(name, kwargs, config) for name in ("output_hidden_states", "output_router_logits"))
    return not more and asked_for("return_dict", kwargs, config, True)


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raises RuntimeError where the host asks a device for values, for this thread alone."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device = device.type

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = getattr(getattr(func, "overloadpacket", func), "__name__", "")
        there = any(isinstance(t, Tensor) and t.device.type == self._device for t in args)
        leaves = name in _COPIES and isinstance(out, Tensor) and out.device.type == "cpu" != self._device
        if leaves:  # unless nobody waits for it
            leaves = not (kwargs or {}).get("non_blocking", len(args) > 2 and args[2])
        counts = name == "index" and any(isinstance(t, Tensor) and t.dtype == torch.bool for t in args[1])
        if there and (name in _ASKING or leaves or counts):
            raise RuntimeError(f"the model asks the device for values ({name}), which a graph cannot hold")
        return out


def check_waits(run: Callable[[], object], device: torch.device) -> None:
    """Run what is to be captured, and raise RuntimeError where the host would have to wait in it.

    A capture that fails half-way leaves PyTorch's memory allocator, before 2.12, unable to capture anything else.
    """
    with _Watch(device):
        run()


def recorded(
    rehearse: Callable[[], object], run: Callable[[], Result], device: torch.device, pool: Any
) -> tuple[Any, Result]:
    """(a graph of what `run` does, what it returned: tensors that the graph writes anew).

    `rehearse` does the same before, so that nothing is compiled or loaded while the graph is captured. PyTorch lets one
    capture run in a process, so those of other threads wait. One that fails leaves stream and allocator as they were.
    """
    with _recording, torch.cuda.device(device):
        rehearse()
        torch.cuda.synchronize(device)
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream(device)
        try:
            with torch.cuda.graph(graph, pool=pool, stream=_stream(device), capture_error_mode="thread_local"):
                out = run()
        except BaseException:
            torch.cuda.set_stream(before)
            with suppress(RuntimeError, AttributeError):  # PyTorch before 2.12 does not do it where CUDA ends a capture
                torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
            raise
    return graph, out


_recording = threading.RLock()


@functools.cache  # one for each device, since cuBLAS keeps a workspace for each stream
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def refused(error: RuntimeError) -> None:
    """Say why something runs without a graph, most likely since the model asks the device how it goes on."""
    why = str(error).partition("\n")[0]  # CUDA's go on with advice for debugging
    warnings.warn(f"steps of this kind run without a CUDA graph: {why}", stacklevel=2)


def places(model: Any) -> Places:
    """The parameters and buffers of a model."""
    holders = [held for module in model.modules() for held in (module._parameters, module._buffers)]
    return [(held, name, t.data_ptr()) for held in holders for name, t in held.items() if t is not None]


def moved(parameters: Places) -> bool:
    """Whether any of them lies elsewhere now, or another tensor has taken its place."""
    return any((now := held.get(name)) is None or now.data_ptr() != address for held, name, address in parameters)
