"""The AMX prefill kernel against the reference on random shapes and several thread counts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attention_case import Case
from octavo.attention import prefill, reference

NEVER = 2**31 - 1

needs_amx = pytest.mark.skipif(
    not prefill.available(torch.bfloat16), reason="needs the extension, and a processor and system with AMX"
)


def make_case(
    lengths: list[list[int]],  # [B][H]
    *,
    N: int = 40,
    G: int = 1,
    D: int = 64,
    S: int = 16,
    pad: tuple[int, int] = (0, 0),
    window: int | None = None,
    marked: float = 0.8,
    disorder: float = 0.0,
    seed: int = 0,
) -> Case:
    """Ragged rows on shuffled pages, NaN where unused: `marked` tokens expire after `window` more.

    `pad` tokens are padding on the left and right. A share `disorder` of the cached slots gets any position
    and expiry, in the future or expired long ago too.
    """
    rng = torch.Generator().manual_seed(seed)
    B, H = len(lengths), len(lengths[0])
    used = torch.tensor(lengths, dtype=torch.int32)
    M = max(1, -(-int(used.max()) // S))
    P = B * H * M + 1
    table = torch.randperm(P, generator=rng)[: B * H * M].int().view(B, H, M)
    first = 2 * int(used.max()) + 3
    flat = torch.arange(M * S)
    inside = flat < used[..., None]  # [B, H, M * S]
    where = (table[:, :, flat // S] * S + flat % S)[inside].long()  # the slots in use

    positions = torch.randint(0, first, (B, H, M * S), generator=rng)
    expiries = torch.full_like(positions, NEVER)
    chunk = first + torch.arange(N).expand(B, H, N)
    chunk_expiry = torch.full_like(chunk, NEVER)
    if window is not None:
        expiries[torch.rand(expiries.shape, generator=rng) < marked] = 0
        expiries = torch.where(expiries == 0, positions + window, expiries)
        chunk_expiry = torch.where(torch.rand(B, H, N, generator=rng) < marked, chunk + window, chunk_expiry)
    strange = torch.rand(positions.shape, generator=rng) < disorder
    anywhere = torch.randint(-1, first + N + 9, (2, *positions.shape), generator=rng)
    positions, expiries = torch.where(strange, anywhere[0], positions), torch.where(strange, anywhere[1], expiries)

    slots = torch.full((2, P * S), -7, dtype=torch.int32)
    slots[:, where] = torch.stack([positions[inside], expiries[inside]]).int()
    pages = torch.full((2, P * S, D), torch.nan)
    pages[:, where] = torch.randn(2, len(where), D, generator=rng)
    k_pages, v_pages = pages.bfloat16().view(2, P, S, D)
    slot_position, slot_expiry = slots.view(2, P, S)
    position = chunk[:, 0].int().contiguous()
    position[:, : pad[0]] = -1
    position[:, N - pad[1] :] = -1
    q, k, v = (torch.randn(B, N, heads, D, generator=rng).bfloat16().transpose(1, 2) for heads in (G * H, H, H))
    at = (k_pages, v_pages, slot_position, slot_expiry, table, used)
    return Case(q, k, v, position, chunk_expiry.int().contiguous(), *at, D**-0.5)


def assert_matches(case: Case, out: Tensor) -> None:
    expected = reference.paged_attention(*case.widened())
    assert out.shape == expected.shape
    assert out.dtype == torch.bfloat16
    assert out.isfinite().all()
    error = (out.float() - expected).norm(dim=-1)
    assert (error <= 1e-2 * expected.norm(dim=-1)).all()


@st.composite
def cases(draw: st.DrawFn) -> Case:
    B, H = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    row = st.lists(st.one_of(st.just(0), st.integers(1, 400)), min_size=H, max_size=H)
    N = draw(st.one_of(st.just(1), st.integers(2, 200)))
    return make_case(
        draw(st.lists(row, min_size=B, max_size=B)),
        N=N,
        G=draw(st.integers(1, 8)),
        D=draw(st.sampled_from([32, 64, 96, 128])),
        S=draw(st.one_of(st.just(16), st.integers(1, 70))),
        pad=draw(st.sampled_from([(0, 0), (0, 0), (N // 3, 0), (0, N // 2), (N // 4, N // 4), (N, 0)])),
        window=draw(st.one_of(st.none(), st.integers(0, 300))),
        disorder=draw(st.sampled_from([0.0, 0.0, 0.5])),
        seed=draw(st.integers(0, 2**32)),
    )


@needs_amx
@settings(max_examples=60, deadline=None)
@given(cases())
def test_matches_the_reference(case: Case) -> None:
    out = prefill.paged_attention(*case, threads=1)
    assert_matches(case, out)
    for threads in (2, 3):
        assert torch.equal(out, prefill.paged_attention(*case, threads=threads))


@needs_amx
@pytest.mark.parametrize("D", [32, 64, 160, 256])
def test_long_rows(D: int) -> None:
    case = make_case([[2100, 0, 700]], N=512, G=3, D=D, window=256)
    assert_matches(case, prefill.paged_attention(*case))


@needs_amx
@pytest.mark.parametrize("scale", [3.0, -0.5, 0.0, 1e-9])
def test_any_scale(scale: float) -> None:
    case = make_case([[300, 40]], N=70, G=2, window=50)._replace(scale=scale)
    assert_matches(case, prefill.paged_attention(*case))


@needs_amx
def test_scores_far_apart() -> None:
    case = make_case([[700, 200]], N=70, G=2)
    rising = torch.linspace(0, 60, case.k_pages[..., 0].numel()).view(*case.k_pages.shape[:2], 1)
    case = case._replace(k_pages=(case.k_pages * rising).bfloat16())  # the largest score rises all the time
    assert_matches(case, prefill.paged_attention(*case))


@needs_amx
def test_strided_inputs() -> None:
    case = make_case([[40, 9], [0, 70]], N=33, G=2, D=96)
    B, Hq, N, D = case.query.shape
    fused = torch.randn(N, B, 8 * D).bfloat16()  # queries, keys and values of one projection
    heads = fused.view(N, B, 8, D).permute(1, 2, 0, 3)
    q, k, v = heads[:, :Hq], heads[:, 4:6], heads[:, 6:8]
    expanded = case.position[:1].expand(B, N)
    case = case._replace(query=q, key=k, value=v, position=expanded)
    assert_matches(case, prefill.paged_attention(*case))


@needs_amx
def test_empty_past_and_empty_batch() -> None:
    case = make_case([[0, 0]], N=50, G=2)
    case = case._replace(page_table=torch.zeros(1, 2, 0, dtype=torch.int32))
    assert_matches(case, prefill.paged_attention(*case))
    none = make_case([[0, 0]], N=0)
    assert prefill.paged_attention(*none).shape == (1, 0, 2, 64)


@needs_amx
def test_past_of_which_all_has_expired() -> None:
    case = make_case([[90, 130]], G=2)
    case.slot_expiry[case.page_table.long()] = case.position[0, 0] - 1
    case.k_pages.fill_(torch.nan)  # what no query sees is never read
    case.v_pages.fill_(torch.nan)
    out = prefill.paged_attention(*case)
    torch.testing.assert_close(out[0, 0, ::2], case.value[0, :, 0])
    assert out.isfinite().all()
    case.expiry.copy_(case.position[:, None] - 1)  # nor do the new tokens see anything
    assert not prefill.paged_attention(*case).any()


@needs_amx
def test_misuse_is_refused() -> None:
    case = make_case([[20, 20]], G=2)
    for change in (
        {"query": case.query.float()},
        {"key": case.key.double()},
        {"v_pages": case.v_pages.half()},
        {"length": case.length.long()},
        {"position": case.position[:, :0]},
        {"k_pages": case.k_pages.transpose(0, 1).contiguous().transpose(0, 1)},
        {"value": case.value.transpose(2, 3).contiguous().transpose(2, 3)},
        {"query": case.query[..., :40]},
        {"key": case.key.to("meta")},
        {"scale": float("nan")},
    ):
        with pytest.raises(ValueError, match="paged_attention"):
            prefill.paged_attention(*case._replace(**change))


def test_what_is_supported() -> None:
    case = make_case([[20]])
    assert prefill.supported(case.query, case.k_pages) == prefill.available(torch.bfloat16)
    for dtype in (torch.float32, torch.float16):
        assert not prefill.available(dtype)
        assert not prefill.supported(case.query.to(dtype), case.k_pages)
        assert not prefill.supported(case.query, case.k_pages.to(dtype))
    assert not prefill.supported(case.query[..., :48], case.k_pages[..., :48])
    assert not prefill.supported(case.query.to("meta"), case.k_pages)
