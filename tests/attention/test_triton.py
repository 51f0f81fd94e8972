"""The kernels in Triton against the reference: in its interpreter where there is no GPU, which is slow and exact."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="Triton is not installed")

from attention.case import CODES, DTYPES, Case, make_case
from octavo import attach
from octavo.attention import Chunk, Scoring, cuda, reference
from octavo.attention.cuda import chunk as chunks
from octavo.attention.cuda import decode
from octavo.attention.pages import slots, write
from octavo.config import NEVER
from tiny import SHAPE, feed, tiny_adapter, tiny_model, tokens
from tiny_windows import windowed_model

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def near(dtype: torch.dtype) -> float:
    """How far from the reference in float32 a kernel in this dtype may be."""
    return 1e-5 if dtype == torch.float32 else 3e-2


def scored(seed: int, heads: int) -> Scoring | None:
    """What scores are beside products, one case of four nothing."""
    generator = torch.Generator().manual_seed(seed)
    sinks = 3 * torch.randn(heads, generator=generator).to(DEVICE) if seed % 2 else None
    return Scoring([None, 0.7, 30.0][seed // 4 % 3], sinks) if seed % 4 else None


def check_decode(case: Case, programs: int | None = None, scoring: Scoring | None = None) -> None:
    case = case.to(DEVICE)
    expected = reference.attend(*case.widened(), scoring)
    got = decode.attend(*case[:-1], programs=programs, scoring=scoring)
    torch.testing.assert_close(got.float(), expected, rtol=0, atol=near(case.query.dtype))


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    lengths=st.lists(st.lists(st.integers(0, 150), min_size=2, max_size=2), min_size=1, max_size=3),
    G=st.integers(1, 4),
    n=st.sampled_from([1, 1, 3, 16]),
    D=st.sampled_from([64, 96]),
    S=st.sampled_from([3, 16]),
    dtype=st.sampled_from(DTYPES),
    stored=st.sampled_from([None, *CODES]),
    programs=st.sampled_from([1, 2, 5, 40]),
)
def test_few_queries_on_pages_are_the_rule(seed, lengths, G, n, D, S, dtype, stored, programs):
    check_decode(
        make_case(
            lengths, N=n, chunk=False, G=G, D=D, S=S, dtype=dtype, stored=stored or dtype,
            window=9, disorder=0.2, padding=0.2, seed=seed,
        ),
        programs,
        scored(seed, 2 * G),
    )  # fmt: skip


@pytest.mark.parametrize("D", [128, 256])
def test_wide_heads(D):
    check_decode(make_case([[70, 3]], chunk=False, G=5, D=D, seed=1))


def test_groups_of_more_queries_than_a_program_takes():
    check_decode(make_case([[70, 3]], N=16, chunk=False, G=9, seed=2))


def test_more_rows_than_are_counted_at_once(monkeypatch):
    monkeypatch.setattr(decode, "COUNTED", 8)
    check_decode(make_case([[1, 40, 0]] * 10, chunk=False, D=64, S=3, seed=3), 7)


FLOAT8 = pytest.mark.skipif(DEVICE == "cpu", reason="Triton's interpreter rounds to float8 wrongly")


@pytest.mark.parametrize("stored", [torch.float32, torch.int8, pytest.param(torch.float8_e4m3fn, marks=FLOAT8)])
def test_a_new_token_is_written_before_it_is_read(stored):
    case = make_case([[40, 1], [7, 33]], chunk=True, G=2, stored=stored, unused=0.0, seed=4).to(DEVICE)
    slot = (case.length - 1)[..., None].long()  # the newest slot of each row
    page = case.table.gather(-1, (slot // 16).int().long()).long()
    inside = slot % 16
    case.pages.position[page, inside] = case.at[:, None].expand_as(page)
    case.pages.expiry[page, inside] = NEVER
    new = decode.Written(case.chunk.key, case.chunk.value, slot, case.at)
    got = decode.attend(*case[:-1], new=new, programs=3)
    kept = slots(case.pages, page, inside)
    plain = case._replace(chunk=None)
    write(case.pages, page, inside, case.chunk.key, case.chunk.value)
    for a, b in zip(kept, slots(case.pages, page, inside), strict=True):
        if a.dtype == torch.float32:
            torch.testing.assert_close(a, b, rtol=1e-6, atol=0)  # a GPU rounds scales otherwise in plain torch
        else:  # so one code in thousands may be the next one
            assert (a.int() - b.int()).abs().max() <= 1
    torch.testing.assert_close(got, reference.attend(*plain), rtol=0, atol=2e-3)


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    rows=st.sampled_from([(1, 1), (1, 2), (2, 2)]),
    G=st.integers(1, 3),
    N=st.sampled_from([1, 17, 64, 130, 300]),
    asking=st.sampled_from([0.01, 0.9, 1.0]),
    D=st.sampled_from([64, 96]),
    window=st.sampled_from([1, 9, 64, 100]),
    lengths=st.one_of(st.none(), st.lists(st.integers(0, 90), min_size=4, max_size=4)),
    marked=st.sampled_from([None, 0.0, 0.8, 1.0]),
    dtype=st.sampled_from(DTYPES),
    stored=st.sampled_from([None, *CODES]),
)
def test_a_chunk_on_pages_is_the_rule(seed, rows, G, N, asking, D, window, lengths, marked, dtype, stored):
    (B, H), g, n = rows, torch.Generator().manual_seed(seed), max(1, int(asking * N))
    used = [[(lengths or [0] * 4)[2 * b + h] for h in range(H)] for b in range(B)]
    case = make_case(
        used, N=N, G=G, D=D, dtype=dtype, stored=stored or dtype, window=window, unused=0.0, seed=seed
    ).to(DEVICE)  # fmt: skip
    first = torch.randint(0, N, (B,), generator=g) * (torch.rand(B, generator=g) < 0.5)
    count = (torch.rand(B, generator=g) * (N - first)).int() + 1
    column, start = torch.arange(N), int(case.at.min())
    real = (column >= first[:, None]) & (column < (first + count)[:, None])
    position = torch.where(real, start + column - first[:, None], -1).int().to(DEVICE)
    marks = (torch.rand(B, H, N, generator=g) < (marked or 0.0)).to(DEVICE)
    expiry = torch.where(marks, position[:, None] + window, NEVER).int().contiguous()
    asked = case._replace(at=position, chunk=Chunk(*case.chunk[:2], position, expiry)).last(n)
    span = chunks.Span(*(t.int().to(DEVICE) for t in (first, count, torch.full((B,), start))))
    past = (case.pages, case.table, case.length) if lengths else ()
    got = chunks.attend(
        asked.query, *case.chunk[:2], span, case.scale, None if marked is None else marks, window,
        *(past or (None, None, None)), scoring := scored(seed, H * G),
    )  # fmt: skip
    torch.testing.assert_close(got.float(), reference.attend(*asked.widened(), scoring), rtol=0, atol=near(dtype))


@pytest.mark.parametrize(("chunk", "shift", "kv_dtype"), [(40, 0, None), (512, 1, None), (512, 0, "int8")])
def test_a_model_on_these_kernels_equals_the_mask(monkeypatch, chunk, shift, kv_dtype):
    monkeypatch.setattr(cuda, "available", lambda device: True)
    model, ids = tiny_model().to(DEVICE), tokens(2, 60).to(DEVICE)
    attach(model, tiny_adapter(model, window=12, shift=shift), chunk=chunk, kv_dtype=kv_dtype)
    got, _ = feed(model, ids, 54)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
    if kv_dtype is None:
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    else:
        assert (got - expected).abs().mean() < 0.05 * expected.abs().mean()


@pytest.mark.parametrize(
    ("family", "window", "longest"),
    [("gemma2", 20, None), ("gpt-oss", None, SHAPE["max_position_embeddings"])],  # windows and a cap; sinks alone
)
def test_windows_caps_and_sinks_on_these_kernels_equal_the_mask(monkeypatch, family, window, longest):
    monkeypatch.setattr(cuda, "available", lambda device: True)
    model = windowed_model(family, **({} if longest is None else {"sliding_window": longest})).to(DEVICE)
    attach(model, None if window is None else tiny_adapter(model, window=window), chunk=40)
    ids = tokens(1, 50).to(DEVICE)
    got, _ = feed(model, ids, 48)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
