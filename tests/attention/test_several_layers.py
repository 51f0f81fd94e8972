"""The forms that serve several layers at once on a GPU, here on the CPU: against the reference, and inside a model."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention.case import CODES, DTYPES, make_case
from octavo import attach
from octavo.attachment import require_attachment
from octavo.attention import Chunk, PageLayout, banded, gathered, reference, select
from octavo.attention.torch import padded
from octavo.config import NEVER
from tiny import feed, tiny_adapter, tiny_model, tokens


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    B=st.integers(1, 3),
    H=st.integers(1, 3),
    G=st.integers(1, 3),
    N=st.one_of(st.integers(1, 300), st.sampled_from([64, 128, 640])),
    window=st.sampled_from([1, 3, 40, 64, 100, 400]),
    rate=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
)
def test_bands_are_the_rule(seed, B, H, G, N, window, rate):
    g, D = torch.Generator().manual_seed(seed), 8
    pages = PageLayout(16, D, torch.float32).views(torch.zeros(2**14, dtype=torch.uint8))
    nothing = torch.zeros(B, H, 1, dtype=torch.int32)
    position = torch.arange(N, dtype=torch.int32).expand(B, -1).contiguous()
    buffers = banded.bands(torch.zeros(B, H * G, N, D), H, window)
    for _ in range(2):  # what one layer leaves in the buffers does not reach the next
        query, key, value = (torch.randn(B, N, n, D, generator=g).transpose(1, 2) for n in (H * G, H, H))
        marked = torch.rand(B, H, N, generator=g) < rate
        expiry = torch.where(marked, position[:, None] + window, NEVER).int().contiguous()
        got = banded.attend(buffers, query, key, value, marked, 0.3)
        chunk = Chunk(key, value, position, expiry)
        expected = reference.attend(query, position, pages, nothing, nothing[..., 0], 0.3, chunk)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    lengths=st.lists(st.lists(st.integers(0, 70), min_size=2, max_size=2), min_size=1, max_size=3),
    G=st.integers(1, 3),
    S=st.sampled_from([3, 16]),
    stored=st.sampled_from([torch.float32, torch.bfloat16, *CODES]),
    dtype=st.sampled_from(DTYPES),
)
def test_gathered_slots_are_the_rule(seed, lengths, G, S, stored, dtype):
    case = make_case(
        lengths, G=G, S=S, dtype=dtype, stored=stored, window=9, disorder=0.2, unused=0.0, seed=seed, chunk=True
    )
    # `gather` leaves the new token's own slot out, so no other slot may be at its position.
    case.pages.position.masked_fill_(case.pages.position == case.at.max(), -1)
    chunk = case.chunk._replace(expiry=torch.full_like(case.chunk.expiry, NEVER))
    rows = case.table[:, None].expand(-1, 3, -1, -1)
    seen = gathered.gather(case.pages, rows, case.length[:, None].expand(-1, 3, -1), case.at, dtype)
    got = gathered.attend(seen, 1, case.query, chunk.key, chunk.value, case.scale)
    expected = reference.attend(*case._replace(chunk=chunk).widened())
    torch.testing.assert_close(got.float(), expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 3e-2)


@pytest.mark.parametrize("chunk", [7, 512])
@pytest.mark.parametrize(("shift", "kv_dtype"), [(0, None), (1, None), (0, "int8")])
def test_a_model_on_these_forms_equals_the_mask(monkeypatch, chunk, shift, kv_dtype):
    monkeypatch.setattr(gathered, "suits", lambda pages, queries: queries == 1)
    monkeypatch.setattr(banded, "suits", lambda query, key: query.shape[2] == key.shape[2])
    monkeypatch.setattr(select, "attend", padded.attend)
    model, ids = tiny_model(), tokens(2, 150)
    attach(model, tiny_adapter(model, shift=shift), chunk=chunk, kv_dtype=kv_dtype)
    got, _ = feed(model, ids, 110)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
    if kv_dtype is None:
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    else:
        assert (got - expected).abs().mean() < 0.05 * expected.abs().mean()
    assert require_attachment(model).settings.kv_dtype == kv_dtype
