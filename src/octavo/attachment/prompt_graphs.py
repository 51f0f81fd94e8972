"""Prompts of an attached model from CUDA graphs: for a small model most of a prompt's time is launches.

A graph holds the decoder's own forward of a piece of a prompt, up to what goes into pages: storing depends on how many
tokens are kept, so it follows as usual (`octavo.kv.recorded_chunk`). There is a graph for each bucket of lengths, and
one for sequences that have read nothing yet and one for those that have. The tokens stand at the end of the columns,
with padding in front that nobody sees, so the last logits are always in the same place.

A kind of prompt is captured when it comes for the `OFTEN`th time, since a capture takes as long as a few prompts. As
with decode steps, a graph runs the modules as they were then, and is captured anew where a parameter has moved. Its
products have other shapes than those of the prompts before it, so in bfloat16 logits may differ in their last bits.
"""

import functools
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from octavo.attachment.graphs import Places, check_waits, moved, places, recorded, refused, replayable
from octavo.attachment.sums import computed
from octavo.dms import FoldedGates
from octavo.kv.recorded_chunk import Made, RecordedChunk
from octavo.kv.tables import Tables
from octavo.swiftkv import SwiftKV

if TYPE_CHECKING:
    from octavo.attachment.attachment import Attachment
    from octavo.attachment.cache import KVCache

OFTEN = 3
MOST = 2**28  # bytes of keys and values of a graph's tokens at most
MOST_WORK = 2**43  # tokens times weights at most: some 30 ms of an H200, in which launches hide behind the work
GRAPHS = 48  # that are kept
HALVED = 1024  # prompts after which what has come counts half
SMALLEST = 2**24  # bytes that the place for keys and values has at least

_MARK = 1  # bytes of a mark


class _Captured(NamedTuple):
    """One graph, and the tensors that it reads and writes."""

    graph: Any  # torch.cuda.CUDAGraph
    tokens: Tensor  # [B, N] int64, N the bucket
    positions: Tensor  # [B, N] int64
    span: Any  # octavo.attention.cuda.chunk.Span
    rows: Tensor | None  # [B] int64, None where the sequences have read nothing
    made: Made
    hidden: Tensor  # the decoder's last hidden state, [B, N, hidden], or of the tokens that are kept
    kind: type  # of what the decoder returns
    tables: Tables  # whose addresses it holds, as they were at `generation`
    generation: int
    parameters: Places
    adapters: tuple[FoldedGates | None, SwiftKV | None]  # which it reads too, so they must stay where they are


class PromptGraphs:
    """The graphs of one attachment's prompts."""

    def __init__(self, attachment: "Attachment") -> None:
        self._attachment = attachment
        self._captured: dict[tuple[Any, ...], _Captured] = {}  # the one that was used last comes last
        self._came: dict[tuple[Any, ...], int] = {}  # how often each kind has come
        self._prompts = 0  # that have come
        self._refused: set[tuple[Any, ...]] = set()  # kinds that cannot be captured
        self._pool: Any = None  # memory that all graphs share, since they run one after another
        self._checked = False  # whether the model is known not to ask the device
        self._place: Tensor | None = None  # [bytes] uint8, where all of them leave what goes into pages

    def suits(
        self, cache: "KVCache", kwargs: dict[str, Any], columns: int, valid: Tensor | None, keep: int, trains: bool
    ) -> bool:
        """Whether this forward can be replayed; for the first of its kind, False. Waits for the device where there is
        padding, as the forward itself does."""
        attachment, tokens = self._attachment, kwargs.get("input_ids")
        if tokens is None or columns <= cache.sequences.few or trains:
            return False
        if cache.sequences.shift or attachment.needs_whole or (cache.swiftkv_on and keep not in (0, 1, columns)):
            return False
        count = len(tokens) * bucket(columns)
        if count * _token_nbytes(cache) > MOST or count * self._weights > MOST_WORK:
            return False
        if not replayable(attachment, cache, kwargs):
            return False
        return self._worth(self._kind(cache, len(tokens), columns, keep)) and (valid is None or _in_front(valid))

    def _worth(self, kind: tuple[Any, ...]) -> bool:
        """Count a prompt of this kind, and say whether there is a graph for it or should be one.

        Where there are as many as are kept, one that comes twice as often as another takes its place. Counts are halved
        now and then, so that a kind which does not come any more gives way.
        """
        self._came[kind] = self._came.get(kind, 0) + 1
        self._prompts += 1
        if self._prompts % HALVED == 0:
            self._came = {each: n // 2 for each, n in self._came.items() if n > 1}
        if kind in self._captured:
            return True
        came, full = self._came.get(kind, 0), len(self._captured) >= GRAPHS
        if came < OFTEN or kind in self._refused:
            return False
        return not full or came > 2 * self._came.get(next(iter(self._captured)), 0)

    @functools.cached_property
    def _weights(self) -> int:
        return sum(p.numel() for p in self._attachment.model.parameters())

    def _kind(self, cache: "KVCache", sequences: int, columns: int, keep: int) -> tuple[Any, ...]:
        kept, training = min(keep, 2) if cache.swiftkv_on else 2, self._attachment.model.training
        return (
            sequences, bucket(columns), kept, bool(cache.seen), cache.swiftkv_on, cache.eviction, cache.shape, training,
        )  # fmt: skip

    def run(
        self, cache: "KVCache", kwargs: dict[str, Any], columns: int, valid: Tensor | None, keep: int
    ) -> Any | None:
        """A piece of a prompt; what the decoder returns, or None where the model cannot be captured and nothing has
        happened. The cache is as it was where it fails. Raises CacheBudgetError."""
        # Other threads' caches share graphs and tables, and no table may move between the look at it and the replay.
        with cache.tables.pool.lock:
            return self._run_locked(cache, kwargs, columns, valid, keep)

    def _run_locked(
        self, cache: "KVCache", kwargs: dict[str, Any], columns: int, valid: Tensor | None, keep: int
    ) -> Any | None:
        from octavo.kv.chunk_step import ChunkStep, spans

        given: Tensor | None = kwargs.get("position_ids")
        kind = self._kind(cache, len(kwargs["input_ids"]), columns, keep)
        try:
            if cache.seen:
                cache.sequences.make_room(columns)
            step = cache.begin(len(kwargs["input_ids"]), columns, valid)
            assert isinstance(step, ChunkStep)
            captured = self._fitting(cache, kind)
            if captured is None:
                cache.abandon()
                return None
            padding = captured.tokens.shape[1] - columns
            captured.tokens[:, padding:].copy_(kwargs["input_ids"])
            captured.positions[:, padding:].copy_(step.new.at.clamp(min=0) if given is None else given)
            span = step.span or spans(step.new, columns, valid)
            assert span is not None
            for there, now in zip(captured.span, (span.first + padding, span.columns, span.start), strict=True):
                there.copy_(now)
            if captured.rows is not None:
                captured.rows.copy_(cache.sequences.row_ids)
            captured.graph.replay()
            step.take(captured.made.last(columns))
            moved_by = cache.moved if given is None else cache.moved_by(given)
            cache.sequences.commit()
            cache.moved = moved_by
        except BaseException:
            cache.abandon()
            raise
        hidden = captured.hidden
        if hidden.shape[1] > columns:  # SwiftKV's later layers ran for fewer
            hidden = hidden[:, padding:]
        return captured.kind(last_hidden_state=hidden.clone(), past_key_values=cache)

    def _fitting(self, cache: "KVCache", kind: tuple[Any, ...]) -> _Captured | None:
        """The graph for a kind of prompt, captured where there is none that holds; None where it cannot be."""
        captured = self._captured.pop(kind, None)
        if captured is not None and captured.rows is not None:
            same = captured.tables is cache.tables and captured.generation == cache.tables.generation
            captured = captured if same else None
        if captured is None or moved(captured.parameters):
            try:
                captured = self._capture(cache, kind)
            except torch.OutOfMemoryError:
                self._came[kind] = 0  # there may be some later
                return None
            except RuntimeError as e:
                self._refused.add(kind)
                refused(e)
                return None
        self._captured[kind] = captured
        if len(self._captured) > GRAPHS:
            del self._captured[next(iter(self._captured))]
        return captured

    @torch.inference_mode(False)
    @torch.no_grad()
    def _capture(self, cache: "KVCache", kind: tuple[Any, ...]) -> _Captured:
        from octavo.attention.cuda.chunk import Span

        attachment, device = self._attachment, cache.shape.device
        B, N, kept, goes_on = kind[:4]
        tokens = torch.zeros(B, N, dtype=torch.int64, device=device)
        positions = torch.zeros_like(tokens)
        # As long as they can be, so that what is compiled or loaded for the whole of them is there before a capture.
        span = Span(*(torch.full((B,), n, dtype=torch.int32, device=device) for n in (0, N, 0)))
        rows = cache.sequences.row_ids.long() if goes_on else None
        made, window = self._made(cache, B, N), cache.eviction.window if cache.eviction else 0
        told: list[tuple[type, FoldedGates | None, SwiftKV | None]] = []

        def run() -> Tensor:
            step = RecordedChunk(cache.tables, window, span, rows, made)
            forward = attachment.forward_on(cache, keep=(0, 1, N)[kept])
            with cache.recording(step):
                out = attachment.run(
                    forward, input_ids=tokens, position_ids=positions, past_key_values=cache, use_cache=True
                )
            told.append((type(out), forward.gates, forward.transform))
            return computed(out.last_hidden_state)

        if not self._captured and device.type == "cuda":  # the memory of graphs that are all gone cannot be shared
            self._pool = torch.cuda.graph_pool_handle()
        if not self._checked:
            check_waits(run, device)
            self._checked = True
        with attachment.pieces(N, trains=False, sums=True):
            graph, hidden = recorded(run, run, device, self._pool)
        tables, (made_kind, gates, transform) = cache.tables, told[-1]
        return _Captured(
            graph, tokens, positions, span, rows, made, hidden, made_kind, tables, tables.generation,
            places(attachment.model), (gates, transform),
        )  # fmt: skip

    def _made(self, cache: "KVCache", sequences: int, columns: int) -> Made:
        """Where graphs leave keys, values and marks; where that must grow, all are captured anew."""
        shape = cache.shape
        size = shape.cached_layers, sequences, shape.kv_heads, columns
        nbytes, each = sequences * columns * _token_nbytes(cache), prod(size) * shape.head_dim * shape.dtype.itemsize
        if self._place is None or len(self._place) < nbytes:
            self._captured.clear()
            self._place = None  # given back before there is another
            self._place = torch.empty(
                max(SMALLEST, 1 << (nbytes - 1).bit_length()), dtype=torch.uint8, device=shape.device
            )
        parts = self._place[:each], self._place[each : 2 * each]
        key, value = (part.view(shape.dtype).view(*size, shape.head_dim) for part in parts)
        marked = self._place[2 * each : nbytes].view(torch.bool).view(size) if cache.eviction else None
        return Made(key, value, marked)


def bucket(columns: int) -> int:
    """The columns of the graph for so many tokens: a quarter of the power of two below them more at most."""
    step = max(8, 1 << max(0, columns.bit_length() - 3))
    return -(-columns // step) * step


def _token_nbytes(cache: "KVCache") -> int:
    """Bytes of keys, values and marks of a token in all layers."""
    shape = cache.shape
    return shape.cached_layers * shape.kv_heads * (2 * shape.head_dim * shape.dtype.itemsize + _MARK)


def _in_front(valid: Tensor) -> bool:
    """Whether all padding in `valid` [B, N] is in front of the tokens."""
    return bool((valid[:, 1:] >= valid[:, :-1]).all())
