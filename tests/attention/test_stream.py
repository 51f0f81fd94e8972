"""The kernel in CUDA C++ against the reference, on a GPU."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from attention.case import CODES, make_case
from octavo.attention import reference
from octavo.attention.cuda import begins, decode, stream
from octavo.attention.pages import slots, write
from octavo.config import NEVER


def kind_of(case, *, new=None, indexed=False):
    group = case.query.shape[1] // case.table.shape[1]
    return stream.kind_of(case.query, case.pages, group, new, indexed)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    lengths=st.lists(st.lists(st.integers(0, 500), min_size=2, max_size=2), min_size=1, max_size=3),
    G=st.sampled_from([1, 3, 4, 8]),
    D=st.sampled_from([64, 128]),
    S=st.sampled_from([16, 48]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    stored=st.sampled_from([None, *CODES]),
    programs=st.sampled_from([1, 2, 5, 40, None]),
)
def test_one_query_on_pages_is_the_rule(seed, lengths, G, D, S, dtype, stored, programs):
    case = make_case(
        lengths, chunk=False, G=G, D=D, S=S, dtype=dtype, stored=stored or dtype,
        window=9, disorder=0.2, padding=0.2, seed=seed,
    ).to("cuda")  # fmt: skip
    assert kind_of(case) is not None
    got = decode.attend(*case[:-1], programs=programs)
    torch.testing.assert_close(got.float(), reference.attend(*case.widened()), rtol=0, atol=3e-2)


@pytest.mark.parametrize("stored", [torch.bfloat16, *CODES])
@pytest.mark.parametrize("D", [64, 128])
def test_a_long_row_is_shared_and_merged(D, stored):
    case = make_case([[9000, 31], [1, 2500]], chunk=False, G=4, D=D, dtype=torch.bfloat16, stored=stored, seed=5)
    case = case.to("cuda")
    got = decode.attend(*case[:-1])
    torch.testing.assert_close(got.float(), reference.attend(*case.widened()), rtol=0, atol=1e-2)


@pytest.mark.parametrize("stored", [torch.bfloat16, *CODES])
@pytest.mark.parametrize("slot_dtype", [torch.int32, torch.int64])
def test_a_new_token_is_written_before_it_is_read(stored, slot_dtype):
    case = make_case(
        [[40, 1], [7, 333]], chunk=True, G=2, D=128, dtype=torch.bfloat16, stored=stored, unused=0.0, seed=4
    ).to("cuda")
    slot = (case.length - 1)[..., None].long()
    page, inside = case.table.gather(-1, slot // 16).long(), slot % 16
    case.pages.position[page, inside] = case.at[:, None].expand_as(page)
    case.pages.expiry[page, inside] = NEVER
    new = decode.Written(case.chunk.key, case.chunk.value, slot.to(slot_dtype), case.at)
    assert kind_of(case, new=new) is not None
    assert kind_of(case, new=new._replace(key=case.chunk.key.float())) is None  # it reads them as it reads queries
    got = decode.attend(*case[:-1], new=new, programs=3)
    kept = slots(case.pages, page, inside)
    write(case.pages, page, inside, case.chunk.key, case.chunk.value)
    for a, b in zip(kept, slots(case.pages, page, inside), strict=True):
        if a.dtype == torch.float32:
            torch.testing.assert_close(a, b, rtol=1e-6, atol=0)  # a GPU rounds scales otherwise in plain torch
        elif a.dtype == torch.bfloat16:
            assert torch.equal(a, b)
        else:  # so one code in thousands may be the next one
            assert (a.int() - b.int()).abs().max() <= 1
    torch.testing.assert_close(got.float(), reference.attend(*case._replace(chunk=None).widened()), rtol=0, atol=1e-2)


def test_places_of_the_batch_that_are_empty_give_zeros():
    case = make_case([[40, 1], [7, 333], [90, 2]], chunk=False, G=3, dtype=torch.bfloat16, stored=torch.int8, seed=6)
    case = case.to("cuda")
    rows = torch.tensor([2, -1, 0], dtype=torch.int32, device="cuda")
    used = torch.where(rows[:, None] < 0, 0, case.length[rows.long().clamp(min=0)])
    got = decode.attend(*case[:-1], begin=begins(used.int()), rows=rows)
    order = rows.long().clamp(min=0)
    plain = case._replace(table=case.table[order], length=used.int(), chunk=None)
    torch.testing.assert_close(got.float(), reference.attend(*plain.widened()), rtol=0, atol=1e-2)
    assert not got[1].any()


def test_what_it_does_not_serve_stays_with_triton():
    for change in ({"D": 96}, {"G": 9}, {"S": 8}, {"dtype": torch.float32, "stored": torch.float32}):
        settings_ = {"dtype": torch.bfloat16, "stored": torch.bfloat16, **change}
        case = make_case([[40, 1]], chunk=False, seed=7, **settings_).to("cuda")
        assert kind_of(case) is None
        got = decode.attend(*case[:-1])
        torch.testing.assert_close(got.float(), reference.attend(*case.widened()), rtol=0, atol=3e-2)
