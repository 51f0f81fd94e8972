"""The torch paths against the reference, and the dense mask against both."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.attention import dense, dense_attention, padded, ragged, reference
from octavo.attention.ragged import first_chunk_attention
from octavo.config import NEVER


def random_case(seed: int, B: int, H: int, group: int, N: int, D: int, S: int, longest: int, padding: bool) -> dict:
    g = torch.Generator().manual_seed(seed)
    length = torch.randint(0, longest + 1, (B, H), generator=g)
    per_row = -(-max(int(length.max()), 1) // S)
    pages = B * H * per_row
    table = torch.randperm(pages, generator=g).view(B, H, per_row)
    start = longest + torch.randint(0, 5, (B,), generator=g)
    columns = torch.arange(N)
    pad = torch.randint(0, N, (B,), generator=g) if padding else torch.zeros(B, dtype=torch.long)
    real = columns >= pad[:, None]
    position = torch.where(real, start[:, None] + columns - pad[:, None], -1)
    expiry = torch.where(
        torch.rand(B, H, N, generator=g) < 0.5, position[:, None] + torch.randint(1, 9, (1,), generator=g), NEVER
    )
    slot_expiry = torch.where(
        torch.rand(pages, S, generator=g) < 0.5,
        torch.randint(max(longest - 4, 0), longest + N + 4, (pages, S), generator=g),
        NEVER,
    )
    return {
        "query": torch.randn(B, H * group, N, D, generator=g),
        "key": torch.randn(B, H, N, D, generator=g),
        "value": torch.randn(B, H, N, D, generator=g),
        "position": position.int(),
        "expiry": expiry.int(),
        "k_pages": torch.randn(pages, S, D, generator=g),
        "v_pages": torch.randn(pages, S, D, generator=g),
        "slot_position": torch.randint(0, max(longest, 1), (pages, S), generator=g).int(),
        "slot_expiry": slot_expiry.int(),
        "page_table": table.int(),
        "length": length.int(),
        "scale": 0.3,
    }


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    B=st.integers(1, 3),
    H=st.integers(1, 3),
    group=st.integers(1, 3),
    N=st.integers(1, 40),
    n=st.integers(1, 40),
    D=st.sampled_from([1, 3, 8, 16]),
    S=st.integers(1, 5),
    longest=st.sampled_from([0, 1, 7, 50]),
    padding=st.booleans(),
)
def test_ragged_equals_reference(
    seed: int, B: int, H: int, group: int, N: int, n: int, D: int, S: int, longest: int, padding: bool
) -> None:
    case = random_case(seed, B, H, group, N, D, S, longest, padding)
    whole = reference.paged_attention(**case)
    case["query"] = case["query"][:, :, -n:]
    expected = reference.paged_attention(**case)
    torch.testing.assert_close(expected, whole[:, -n:], rtol=1e-4, atol=2e-5)  # the same queries among all
    got = ragged.paged_attention(**{**case, "length": case["length"].tolist()})
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-5)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    B=st.integers(1, 3),
    H=st.integers(1, 3),
    group=st.integers(1, 3),
    N=st.integers(1, 40),
    n=st.integers(1, 40),
    S=st.integers(1, 5),
    longest=st.sampled_from([0, 1, 7, 50]),
    padding=st.booleans(),
    mask=st.sampled_from([1, 500, padded.MASK]),
)
def test_padded_equals_reference(
    seed: int, B: int, H: int, group: int, N: int, n: int, S: int, longest: int, padding: bool, mask: int
) -> None:
    case = random_case(seed, B, H, group, N, 8, S, longest, padding)
    case["query"] = case["query"][:, :, -n:]
    expected = reference.paged_attention(**case)
    used = torch.zeros(case["k_pages"].shape[:2], dtype=torch.bool)  # what no row uses may hold anything
    for b in range(B):
        for h in range(H):
            slots = case["page_table"][b, h, :, None] * S + torch.arange(S)
            used.view(-1)[slots.flatten()[: int(case["length"][b, h])].long()] = True
    for name in ("k_pages", "v_pages"):
        case[name] = case[name].masked_fill(~used[..., None], float("nan"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(padded, "MASK", mask)
        got = padded.paged_attention(**case, longest=int(case["length"].max()))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("block", [7, 512])
@pytest.mark.parametrize("padding", [False, True])
def test_dense_mask_equals_reference_without_pages(padding: bool, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mask over one forward is the visibility rule: marked tokens of a given window, hard decisions."""
    monkeypatch.setattr(dense, "BLOCK", block)
    B, H, group, N, D, window = 2, 2, 3, 50, 8, 6
    case = random_case(3, B, H, group, N, D, 4, 0, padding)
    marked = torch.rand(B, H, N, generator=torch.Generator().manual_seed(5)) < 0.6
    position = case["position"]
    case["expiry"] = torch.where(marked, (position + window)[:, None], NEVER).int()
    expected = reference.paged_attention(**case)
    log_keep = torch.zeros(B, H, N).masked_fill(marked, float("-inf"))
    real = position >= 0
    got = dense_attention(case["query"], case["key"], case["value"], log_keep, window, 0.3, real if padding else None)
    torch.testing.assert_close(got[real], expected[real], rtol=1e-4, atol=2e-5)


def test_soft_decisions_tend_to_hard_ones() -> None:
    case = random_case(4, 1, 2, 2, 30, 8, 4, 0, False)
    logits = torch.randn(1, 2, 30, generator=torch.Generator().manual_seed(2))
    hard = torch.zeros(1, 2, 30).masked_fill(logits > 0, float("-inf"))
    qkv = (case["query"], case["key"], case["value"])
    expected = dense_attention(*qkv, hard, 5, 0.3)
    near = [
        (dense_attention(*qkv, torch.nn.functional.logsigmoid(-logits / t), 5, 0.3) - expected).abs().max().item()
        for t in (1.0, 0.1, 1e-4)
    ]
    assert near[0] > near[1] > near[2]
    assert near[2] < 1e-4


def test_first_chunk_is_causal_attention() -> None:
    case = random_case(6, 2, 2, 2, 17, 8, 4, 0, False)
    case["expiry"].fill_(NEVER)
    expected = reference.paged_attention(**case)
    for n in (17, 16, 5, 1):
        got = first_chunk_attention(case["query"][:, :, -n:], case["key"], case["value"], 0.3)
        torch.testing.assert_close(got, expected[:, -n:], rtol=1e-4, atol=2e-5)


def test_reference_sees_exactly_what_the_rule_says() -> None:
    """One-hot values read the softmax weights back: visible iff position <= q <= expiry."""
    slots = 6
    position = torch.tensor([0, 1, 2, 3, 9, 4]).int()
    expiry = torch.tensor([NEVER, 4, 5, 6, NEVER, 7]).int()
    out = reference.paged_attention(
        query=torch.zeros(1, 1, 1, slots + 1),
        key=torch.zeros(1, 1, 1, slots + 1),
        value=torch.eye(slots + 1)[None, None, slots:],
        position=torch.tensor([[5]]).int(),
        expiry=torch.tensor([[[5]]]).int(),
        k_pages=torch.zeros(1, slots, slots + 1),
        v_pages=torch.eye(slots + 1)[None, :slots],
        slot_position=position[None],
        slot_expiry=expiry[None],
        page_table=torch.zeros(1, 1, 1).int(),
        length=torch.tensor([[slots]]).int(),
        scale=1.0,
    )
    seen = (out[0, 0, 0] > 0).tolist()
    assert seen == [True, False, True, True, False, True, True]


@pytest.mark.parametrize(("rows", "queries"), [(0, 3), (2, 0)])
def test_padded_takes_nothing_and_gives_nothing(rows: int, queries: int) -> None:
    case = random_case(1, 2, 2, 2, 5, 8, 4, 7, False)
    names = ("query", "key", "value", "position", "expiry", "page_table", "length")
    case |= {name: case[name][:rows] for name in names}
    case["query"] = case["query"][:, :, 5 - queries :]
    got = padded.paged_attention(**case, longest=7 if rows else 0)
    assert got.shape == (rows, queries, 4, 8)
