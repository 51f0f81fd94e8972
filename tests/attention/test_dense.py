"""The visibility rule as a mask over one forward, against the reference."""

from functools import partial

import pytest
import torch

from attention.case import Case, make_case
from octavo.attention import Lifetime, Packed, Scoring, dense, dense_attention, reference
from octavo.config import NEVER

CLOSE = {"rtol": 1e-4, "atol": 2e-5}


def first_chunk(B: int = 2, G: int = 3, N: int = 50, pad: tuple[int, int] = (0, 0), seed: int = 3) -> Case:
    """A chunk of which nothing is in pages, at the positions that a forward counts."""
    case = make_case([[0, 0]] * B, N=N, G=G, D=8, pad=pad, seed=seed)
    at = torch.where(case.at >= 0, case.at - case.at[:, pad[0], None], -1)
    return case._replace(at=at, chunk=case.chunk._replace(position=at))


def marks(case: Case, share: float = 0.6) -> torch.Tensor:
    return torch.rand(case.chunk.expiry.shape, generator=torch.Generator().manual_seed(5)) < share


def forgotten(case: Case, marked: torch.Tensor, window: int) -> Case:
    expiry = torch.where(marked, (case.at + window)[:, None], NEVER).int()
    return case._replace(chunk=case.chunk._replace(expiry=expiry))


def dense_of(case: Case, log_keep: torch.Tensor | None, window: int, *more: object) -> torch.Tensor:
    return dense_attention(case.query, case.chunk.key, case.chunk.value, log_keep, window, case.scale, *more)


@pytest.mark.parametrize("block", [7, 512])
@pytest.mark.parametrize("pad", [(0, 0), (13, 0), (0, 9)])
@pytest.mark.parametrize("window", [0, 6])
def test_hard_decisions_are_the_rule(
    window: int, pad: tuple[int, int], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense, "BLOCK", block)
    case = first_chunk(pad=pad)
    marked, real = marks(case), case.at >= 0
    log_keep = torch.zeros(marked.shape).masked_fill(marked, float("-inf"))
    got = dense_of(case, log_keep, window, real if any(pad) else None)
    expected = reference.attend(*forgotten(case, marked, window))
    torch.testing.assert_close(got[real], expected[real], **CLOSE)
    assert got.isfinite().all()  # padded queries too: a NaN would spread through later layers


@pytest.mark.parametrize("padded", [False, True])
def test_without_decisions_it_is_causal(padded: bool) -> None:
    case = first_chunk(pad=(4, 0) if padded else (0, 0))
    real = case.at >= 0
    got = dense_of(case, None, 6, real if padded else None)
    torch.testing.assert_close(got[real], reference.attend(*case)[real], **CLOSE)


def test_soft_decisions_tend_to_hard_ones() -> None:
    case = first_chunk(B=1, G=2, N=30)
    logits = torch.randn(1, 2, 30, generator=torch.Generator().manual_seed(2))
    expected = dense_of(case, torch.zeros(1, 2, 30).masked_fill(logits > 0, float("-inf")), 5)
    soft = [dense_of(case, torch.nn.functional.logsigmoid(-logits / t), 5) for t in (1.0, 0.1, 1e-4)]
    near = [(out - expected).abs().max().item() for out in soft]
    assert near[0] > near[1] > near[2]
    assert near[2] < 1e-4


def test_gradients_reach_the_gate_past_the_window_only() -> None:
    case = first_chunk(B=1, G=2, N=12)
    log_keep = torch.full((1, 2, 12), -0.5, requires_grad=True)
    dense_of(case, log_keep, 5).square().sum().backward()
    assert log_keep.grad[..., :6].all()  # token 5 is 6 tokens old at the last query
    assert not log_keep.grad[..., 6:].any()


def test_packed_documents_are_documents_alone() -> None:
    case = first_chunk(B=1, G=2, N=20)
    document = torch.tensor([[0] * 7 + [1] * 9 + [-1] * 4]).int()
    log_keep = torch.zeros(1, 2, 20).masked_fill(marks(case), float("-inf"))
    got = dense_of(case, log_keep, 3, None, Packed(document))
    for part in (slice(0, 7), slice(7, 16)):
        q, k, v = (t[:, :, part] for t in (case.query, case.chunk.key, case.chunk.value))
        alone = dense_attention(q, k, v, log_keep[:, :, part], 3, case.scale)
        torch.testing.assert_close(got[:, part], alone, **CLOSE)
    with pytest.raises(ValueError, match="packed"):
        dense_of(case, log_keep, 3, document >= 0, Packed(document))


def test_chunked_windows_are_cut_anew_in_each_document() -> None:
    case = first_chunk(B=1, G=2, N=20)
    document, chunks = torch.tensor([[0] * 7 + [1] * 13]).int(), Lifetime(5, True)
    got = dense_of(case, None, 0, None, Packed(document), chunks)
    for part in (slice(0, 7), slice(7, 20)):
        q, k, v = (t[:, :, part] for t in (case.query, case.chunk.key, case.chunk.value))
        alone = dense_attention(q, k, v, None, 0, case.scale, lifetime=chunks)
        torch.testing.assert_close(got[:, part], alone, **CLOSE)


@pytest.mark.parametrize("block", [7, 512])
@pytest.mark.parametrize("kind", ["plain", "window", "padding", "gates"])
def test_tokens_of_a_picture_see_each_other(kind: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "BLOCK", block)
    case, N = first_chunk(B=2, G=2, N=30), 30
    pictures = torch.full((2, N), -1)
    pictures[0, 4:9], pictures[0, 12:28], pictures[1, 20:30] = 0, 1, 0
    valid = torch.arange(N) >= torch.tensor([[0], [3]])
    lifetime = Lifetime(6, False) if kind == "window" else None
    log_keep = torch.zeros(2, 2, N).masked_fill(marks(case), float("-inf")) if kind == "gates" else None
    got = dense_of(case, log_keep, 4, valid if kind == "padding" else None, None, lifetime, None, 0.0, pictures)
    q, k = torch.arange(N)[:, None], torch.arange(N)
    seen = (k <= q) | ((pictures[:, :, None] == pictures[:, None]) & (pictures >= 0)[:, None])
    if kind == "window":
        seen &= k > q - 6
    if kind == "padding":
        seen &= valid[:, None]
    seen = seen[:, None].expand(2, 2, N, N)
    if kind == "gates":
        seen = seen & ((q - k <= 4) | (log_keep == 0)[:, :, None])
    seen = seen.repeat_interleave(case.query.shape[1] // 2, 1) | torch.eye(N, dtype=torch.bool)
    key, value = (t.repeat_interleave(case.query.shape[1] // 2, 1) for t in (case.chunk.key, case.chunk.value))
    scores = (case.query @ key.mT * case.scale).masked_fill(~seen, float("-inf"))
    expected = (scores.softmax(-1) @ value).transpose(1, 2)
    real = valid if kind == "padding" else torch.ones_like(valid)
    torch.testing.assert_close(got[real], expected[real], **CLOSE)


@pytest.mark.parametrize("kind", ["causal", "gates", "padding", "documents", "window", "sinks", "cap"])
def test_dropout_drops_weights_and_scales_the_others(kind: str) -> None:
    case, dropped = first_chunk(B=2, G=2, N=30), 0.4
    N, H, Hq = 30, case.chunk.key.shape[1], case.query.shape[1]
    log_keep = torch.zeros(2, H, N).masked_fill(marks(case), float("-inf")) if kind == "gates" else None
    valid = torch.arange(N) >= torch.tensor([[4], [0]]) if kind == "padding" else None
    packed = Packed((torch.arange(N) // 11).int().expand(2, N)) if kind == "documents" else None
    lifetime = Lifetime(6, False) if kind == "window" else None
    sinks = torch.randn(Hq, generator=torch.Generator().manual_seed(1)) if kind == "sinks" else None
    scoring = Scoring(2.0 if kind == "cap" else None, sinks) if kind in ("sinks", "cap") else None
    told = log_keep, 5, case.scale, valid, packed, lifetime, scoring
    ones = torch.eye(N).expand(2, H, N, N)  # as values: what comes out is the weights
    weights = dense_attention(case.query, case.chunk.key, ones, *told).transpose(1, 2)  # [B, Hq, N, N]
    torch.manual_seed(3)
    got = dense_attention(case.query, case.chunk.key, case.chunk.value, *told, dropout=dropped)
    torch.manual_seed(3)
    value = case.chunk.value.repeat_interleave(Hq // H, 1)
    expected = (torch.nn.functional.dropout(weights, dropped) @ value).transpose(1, 2)
    torch.testing.assert_close(got, expected, **CLOSE)


def test_flex_attention_compiles_anew_for_many_lengths_whoever_calls_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Past dynamo's limit it falls back to materialised scores; here it would raise."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    dense._compiled.cache_clear()
    settings, lengths = torch._dynamo.config, range(16, 28)

    def compare(length: int) -> None:
        case = first_chunk(B=1, G=2, N=length)
        log_keep = torch.zeros(1, 2, length).masked_fill(marks(case), float("-inf"))
        qkv = (case.query, case.chunk.key, case.chunk.value)
        torch.testing.assert_close(
            dense._flex(*qkv, log_keep, 5, case.scale, None), dense_of(case, log_keep, 5), **CLOSE
        )

    try:
        with settings.patch(recompile_limit=64):  # as `retrofit` does, which restores it
            compare(lengths[0])
        limit = settings.recompile_limit
        assert limit < len(lengths)
        with settings.patch(fail_on_recompile_limit_hit=True):
            for length in lengths[1:]:
                compare(length)
        assert settings.recompile_limit == limit  # the rest of the process keeps its own
    finally:
        dense._compiled.cache_clear()
