"""The C kernels against the reference, on every instruction set of this machine and several thread counts."""

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attention_case import Case
from octavo.attention import native, reference

if not native.available():
    pytest.skip("the extension is not built", allow_module_level=True)
from octavo.attention import _native

NEVER = 2**31 - 1
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
UNIT = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # rounding of the output


def _supported() -> list[str]:
    best, names = native.isa(), []
    for name in ("scalar", "avx2", "avx512"):
        try:
            _native.set_isa(name)
            names.append(name)
        except ValueError:
            pass
    _native.set_isa(best)
    return names


ISAS = _supported()


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    best, work = native.isa(), _native.set_chunk_work(1)
    _native.set_chunk_work(work)
    yield
    _native.set_isa(best)
    _native.set_chunk_work(work)


def make_case(
    lengths: list[list[int]],  # [B][H]
    *,
    N: int = 1,
    G: int = 1,
    D: int = 64,
    S: int = 16,
    dtype: torch.dtype = torch.float32,
    stored: torch.dtype = torch.float32,
    padding: float = 0.0,
    expiring: float = 0.0,
    seed: int = 0,
) -> Case:
    """Ragged rows on shuffled pages: slots in no order, some expired or in the future, NaN where unused."""
    rng = torch.Generator().manual_seed(seed)
    B, H = len(lengths), len(lengths[0])
    used = torch.tensor(lengths, dtype=torch.int32)
    M = max(1, -(-int(used.max()) // S))
    P = B * H * M + 1
    table = torch.randperm(P, generator=rng)[: B * H * M].int().view(B, H, M)
    pages = torch.full((2, P, S, D), torch.nan)
    slots = torch.full((2, P, S), -7, dtype=torch.int32)
    longest = max(4, int(used.max()))
    for b in range(B):
        for h in range(H):
            n = lengths[b][h]
            for i, where in enumerate(torch.randperm(n, generator=rng).tolist()):
                at = int(table[b, h, where // S]), where % S
                slots[:, *at] = torch.tensor([i, NEVER])
                if torch.rand((), generator=rng) < expiring:
                    slots[1, *at] = int(torch.randint(i, longest + N + 2, (), generator=rng))
            flat = torch.arange(n)
            rows = table[b, h, flat // S].long()
            pages[:, rows, flat % S] = torch.randn(2, n, D, generator=rng)
    first = longest - 3 if expiring else longest  # with `expiring`, a few slots lie in the future
    position = (first + torch.arange(N, dtype=torch.int32)).repeat(B, 1)
    expiry = torch.full((B, H, N), NEVER, dtype=torch.int32)
    if expiring:
        expiry = (position[:, None] + torch.randint(0, N + 2, (B, H, N), generator=rng)).int()
    position[torch.rand(B, N, generator=rng) < padding] = -1
    q, k, v = (torch.randn(B, N, heads, D, generator=rng).to(dtype).transpose(1, 2) for heads in (G * H, H, H))
    k_pages, v_pages = pages.to(stored)
    return Case(q, k, v, position, expiry, k_pages, v_pages, slots[0], slots[1], table, used, D**-0.5)


def assert_matches(case: Case, out: Tensor) -> None:
    expected = reference.paged_attention(*case.widened())
    assert out.shape == expected.shape
    assert out.dtype == case.query.dtype
    error = (out.float() - expected).abs()
    rounding = UNIT[out.dtype] * expected.abs() + 2.0**-24 * (out.dtype == torch.float16)
    allowed = 2e-6 * expected.norm() + 1e-7 * expected.numel() ** 0.5  # values are about 1 and may cancel
    assert (error - rounding).clamp(min=0).norm() <= allowed
    assert torch.equal(out[case.position < 0], torch.zeros_like(out[case.position < 0]))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    B, H = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    row = st.lists(st.one_of(st.just(0), st.integers(1, 150)), min_size=H, max_size=H)
    return make_case(
        draw(st.lists(row, min_size=B, max_size=B)),
        N=draw(st.one_of(st.just(1), st.integers(1, 20))),
        G=draw(st.sampled_from([1, 2, 3, 4, 5, 7, 16])),
        D=draw(st.one_of(st.sampled_from([16, 64, 80, 96, 128]), st.integers(1, 70))),
        S=draw(st.one_of(st.just(16), st.integers(1, 70))),
        dtype=draw(st.sampled_from(DTYPES)),
        stored=draw(st.sampled_from(DTYPES)),
        padding=draw(st.sampled_from([0.0, 0.3])),
        expiring=draw(st.sampled_from([0.0, 0.5, 1.0])),
        seed=draw(st.integers(0, 2**32)),
    )


@settings(max_examples=120, deadline=None)
@given(cases(), st.sampled_from([1, 3000, 200000]))
def test_matches_the_reference(case: Case, chunk_work: int) -> None:
    _native.set_chunk_work(chunk_work)
    for isa in ISAS:
        _native.set_isa(isa)
        for threads in (1, 2, 3):
            out = native.paged_attention(*case, threads=threads)
            assert_matches(case, out)
            assert torch.equal(out, native.paged_attention(*case, threads=threads))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("D", [32, 64, 80, 96, 128, 256])
def test_long_rows(isa: str, stored: torch.dtype, D: int) -> None:
    _native.set_isa(isa)
    case = make_case([[1100, 3, 500]], G=3, D=D, stored=stored)
    for threads in (1, 2):
        assert_matches(case, native.paged_attention(*case, threads=threads))


def test_scores_far_apart() -> None:
    case = make_case([[300, 200]], G=2)
    case = case._replace(query=case.query * 40)  # weights from 1 down to 0, the largest in any tile
    assert_matches(case, native.paged_attention(*case))


def test_strided_inputs() -> None:
    case = make_case([[40, 9], [0, 70]], N=3, G=2, D=48)
    B, Hq, N, D = case.query.shape
    fused = torch.randn(N, B, 8 * D)  # queries, keys and values of one projection
    heads = fused.view(N, B, 8, D).permute(1, 2, 0, 3)
    q, k, v = heads[:, :Hq], heads[:, 4:6], heads[:, 6:8]
    expanded = case.position[:1].expand(B, N)
    case = case._replace(query=q, key=k, value=v, position=expanded)
    assert_matches(case, native.paged_attention(*case))


def test_empty_past_and_empty_batch() -> None:
    case = make_case([[0, 0]], N=5, G=2)
    case = case._replace(page_table=torch.zeros(1, 2, 0, dtype=torch.int32))
    assert_matches(case, native.paged_attention(*case))
    none = make_case([[0, 0]], N=0)
    assert native.paged_attention(*none).shape == (1, 0, 2, 64)


def test_row_of_which_all_has_expired() -> None:
    case = make_case([[90, 90]], G=2)
    case.slot_expiry[case.page_table[0, 0].long()] = 50
    case.k_pages[case.page_table[0, 0].long()] = torch.nan  # what no query sees is never read
    case.v_pages[case.page_table[0, 0].long()] = torch.nan
    out = native.paged_attention(*case)
    torch.testing.assert_close(out[0, 0, :2], case.value[0, :1, 0].expand(2, -1))
    assert out.isfinite().all()


def test_concurrent_calls() -> None:
    _native.set_chunk_work(1000)
    work = [make_case([[400 + i, 30]], G=3, seed=i) for i in range(4)]
    alone = [native.paged_attention(*case, threads=2) for case in work]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(25):
            outs = pool.map(lambda case: native.paged_attention(*case, threads=2), work)
            assert all(torch.equal(a, b) for a, b in zip(alone, outs, strict=True))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forked_child() -> None:
    case = make_case([[3000, 3000]], G=3)
    expected = native.paged_attention(*case, threads=2)
    child = os.fork()
    if child == 0:
        same = torch.equal(expected, native.paged_attention(*case, threads=2))
        os._exit(0 if same else 1)
    deadline = time.monotonic() + 15
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            pytest.fail("the forked child hangs")
        time.sleep(0.01)
    assert ended == (child, 0)


def test_misuse_is_refused() -> None:
    case = make_case([[20, 20]], G=2)
    for change in (
        {"key": case.key.double()},
        {"length": case.length.long()},
        {"position": case.position[:, :0]},
        {"k_pages": case.k_pages.transpose(0, 1).contiguous().transpose(0, 1)},
        {"query": case.query.transpose(2, 3).contiguous().transpose(2, 3).expand(-1, -1, 2, -1)},
        {"query": case.query.to("meta")},
    ):
        with pytest.raises(ValueError, match="paged_attention"):
            native.paged_attention(*case._replace(**change))
    with pytest.raises(ValueError, match="vax"):
        _native.set_isa("vax")
