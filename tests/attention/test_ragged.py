"""The torch paths and the choice among kernels against the reference."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attention.case import CODES, Case, make_case
from octavo.attention import Chunk, PageLayout, attend, causal, reference, select, write
from octavo.attention.cpu import kernels
from octavo.attention.torch import padded, ragged
from octavo.config import NEVER

CLOSE = {"rtol": 1e-4, "atol": 2e-5}


@st.composite
def cases(draw: st.DrawFn, unused: float = float("nan")) -> Case:
    """Rows of any length, none included, and the last n of N queries: SwiftKV asks for a few."""
    B, H = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    row = st.lists(st.one_of(st.just(0), st.integers(1, 50)), min_size=H, max_size=H)
    N = draw(st.integers(1, 40))
    case = make_case(
        draw(st.lists(row, min_size=B, max_size=B)),
        N=N,
        G=draw(st.integers(1, 3)),
        D=draw(st.sampled_from([1, 3, 8, 16])),
        S=draw(st.integers(1, 5)),
        stored=draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16, *CODES])),
        pad=draw(st.sampled_from([(0, 0), (0, 0), (N // 3, 0), (0, N // 2), (N, 0)])),
        padding=draw(st.sampled_from([0.0, 0.0, 0.3])),
        window=draw(st.one_of(st.none(), st.integers(0, 60))),
        disorder=draw(st.sampled_from([0.0, 0.5, 1.0])),
        unused=unused,
        seed=draw(st.integers(0, 2**32)),
    )
    return case.last(draw(st.one_of(st.just(N), st.integers(1, N))))


def seen(case: Case, b: int, h: int) -> Tensor:
    """The rule, written out: whether each query [n] sees any slot or token of the row."""
    S, used = case.pages.key.shape[1], int(case.length[b, h])
    flat = torch.arange(used)
    page, inside = case.table[b, h, flat // S].long(), flat % S
    position, expiry = case.pages.position[page, inside], case.pages.expiry[page, inside]
    if case.chunk is not None:
        position = torch.cat([position, case.chunk.position[b]])
        expiry = torch.cat([expiry, case.chunk.expiry[b, h]])
    q = case.at[b, :, None]
    return ((position >= 0) & (position <= q) & (q <= expiry)).any(1)


@settings(deadline=None, max_examples=80)
@given(cases())
def test_ragged_equals_reference(case: Case) -> None:
    torch.testing.assert_close(ragged.attend(*case), reference.attend(*case), **CLOSE)


@settings(deadline=None, max_examples=80)
@given(cases(unused=3.0), st.sampled_from([1, 500, padded.MASK]))
def test_padded_equals_reference(case: Case, mask: int) -> None:
    with patched(padded, MASK=mask):
        out = padded.attend(*case)
    torch.testing.assert_close(out, reference.attend(*case), **CLOSE)


@settings(deadline=None, max_examples=40)
@given(cases(), st.integers(0, 39))
def test_queries_do_not_depend_on_their_neighbours(case: Case, n: int) -> None:
    few = case.last(min(n, case.at.shape[1]))
    out = reference.attend(*case)[:, case.at.shape[1] - few.at.shape[1] :]
    torch.testing.assert_close(reference.attend(*few), out, **CLOSE)


@settings(deadline=None, max_examples=40)
@given(cases())
def test_the_choice_equals_reference(case: Case) -> None:
    torch.testing.assert_close(attend(*case), reference.attend(*case), **CLOSE)


def test_without_a_chunk() -> None:
    case = make_case([[30, 9], [0, 17]], N=3, G=2, D=8, S=4, chunk=False, window=5, unused=1.0)
    sees = torch.stack([torch.stack([seen(case, b, h) for h in range(2)]) for b in range(2)])  # [B, H, n]
    assert sees.any()
    assert not sees.all()  # the empty row's queries see nothing, and get zeros
    expected = reference.attend(*case)
    assert not expected[1, :, :2].any()
    torch.testing.assert_close(ragged.attend(*case), expected, **CLOSE)
    sees = sees.transpose(1, 2).repeat_interleave(2, 2)  # [B, n, Hq]
    torch.testing.assert_close(padded.attend(*case)[sees], expected[sees], **CLOSE)


@pytest.mark.parametrize("stored", [torch.float32, *CODES])
@pytest.mark.parametrize("path", [ragged.attend, padded.attend, attend])
def test_gradients_are_those_of_the_reference(path, stored: torch.dtype) -> None:
    case = make_case([[30, 9], [0, 17]], N=11, G=2, D=8, S=4, stored=stored, pad=(2, 1), window=5, unused=1.0)
    weight = torch.randn(2, 11, 4, 8)

    def gradients(attention) -> list[Tensor]:
        chunk = case.chunk
        leaves = [t.clone().requires_grad_() for t in (case.query, chunk.key, chunk.value)]
        new = Chunk(leaves[1], leaves[2], *chunk[2:])
        (attention(*case._replace(query=leaves[0], chunk=new)) * weight).sum().backward()
        return [leaf.grad for leaf in leaves]

    for got, expected in zip(gradients(path), gradients(reference.attend), strict=True):
        assert expected.any()
        torch.testing.assert_close(got, expected, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("path", [ragged, padded])
def test_half_precision(path, dtype: torch.dtype) -> None:
    case = make_case([[30, 9]], N=11, G=2, D=8, dtype=dtype, stored=dtype, unused=1.0)
    out = path.attend(*case)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), reference.attend(*case.widened()), rtol=2e-2, atol=2e-2)


def test_the_choice_is_by_gradients_dtype_and_number_of_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []

    def saying(name: str):
        return lambda query, *rest: called.append(name) or query.transpose(1, 2)

    monkeypatch.setattr(kernels, "has_decode", lambda *_: True)
    monkeypatch.setattr(kernels, "has_prefill", lambda *_: True)
    monkeypatch.setattr(kernels, "decode", saying("decode"))
    monkeypatch.setattr(kernels, "prefill", saying("prefill"))
    monkeypatch.setattr(ragged, "attend", saying("ragged"))
    case = make_case([[20]], N=select.FEW + 1)
    attend(*case)
    attend(*case.last(select.FEW))
    attend(*case._replace(query=case.query.clone().requires_grad_()))
    attend(*case._replace(query=case.query.bfloat16()))
    with torch.no_grad():
        attend(*case._replace(query=case.query.clone().requires_grad_()))
    assert called == ["prefill", "decode", "ragged", "ragged", "prefill"]


def test_causal_attention_is_that_of_a_first_chunk() -> None:
    case = make_case([[0, 0], [0, 0]], N=17, G=2, D=8)
    expected = reference.attend(*case)
    for n in (17, 16, 5, 1):
        got = causal.attend(case.query[:, :, -n:], case.chunk.key, case.chunk.value, case.scale)
        torch.testing.assert_close(got, expected[:, -n:], **CLOSE)


def test_reference_sees_exactly_what_the_rule_says() -> None:
    """One-hot values read the softmax weights back: visible iff position <= q <= expiry."""
    slots = 6
    D = slots + 1
    layout = PageLayout(slots, D, torch.float32)
    pages = layout.views(torch.zeros(layout.nbytes, dtype=torch.uint8))
    write(pages, torch.zeros(slots, dtype=torch.long), torch.arange(slots), torch.zeros(slots, D), torch.eye(D)[:slots])
    pages.position[0] = torch.tensor([0, 1, 2, 3, 9, 4])
    pages.expiry[0] = torch.tensor([NEVER, 4, 5, 6, NEVER, 7])
    out = reference.attend(
        torch.zeros(1, 1, 1, D),
        torch.tensor([[5]]).int(),
        pages,
        torch.zeros(1, 1, 1).int(),
        torch.tensor([[slots]]).int(),
        1.0,
        Chunk(
            torch.zeros(1, 1, 1, D),
            torch.eye(D)[None, None, slots:],
            torch.tensor([[5]]).int(),
            torch.tensor([[[5]]]).int(),
        ),
    )
    weights = out[0, 0, 0]
    torch.testing.assert_close(weights[weights > 0], torch.full((5,), 0.2))
    assert (weights > 0).tolist() == [True, False, True, True, False, True, True]


def test_reference_groups_query_heads() -> None:
    case = make_case([[20, 7, 0]], N=4, G=3, D=8)
    whole = reference.attend(*case)
    for head in range(9):
        h = head // 3
        chunk = Chunk(case.chunk.key[:, h, None], case.chunk.value[:, h, None], case.at, case.chunk.expiry[:, h, None])
        one = reference.attend(
            case.query[:, head, None],
            case.at,
            case.pages,
            case.table[:, h, None],
            case.length[:, h, None],
            case.scale,
            chunk,
        )
        torch.testing.assert_close(one[:, :, 0], whole[:, :, head], **CLOSE)


@pytest.mark.parametrize("path", [ragged.attend, padded.attend, attend])
@pytest.mark.parametrize(("rows", "queries"), [(0, 3), (2, 0)])
def test_nothing_in_nothing_out(path, rows: int, queries: int) -> None:
    case = make_case([[7, 7], [7, 7]], N=5, G=2, D=8, unused=0.0).last(queries)
    chunk = Chunk(*(t[:rows] for t in case.chunk))
    case = case._replace(query=case.query[:rows], at=case.at[:rows], chunk=chunk)
    assert path(*case._replace(table=case.table[:rows], length=case.length[:rows])).shape == (rows, queries, 4, 8)


@contextmanager
def patched(module, **changes) -> Iterator[None]:
    """Other values for names of a module; hypothesis takes no fixtures that last for one test only."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in changes.items():
            patch.setattr(module, name, value)
        yield
