"""Softcapping and sinks: every path that is chosen for them against the reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention.case import make_case
from octavo.attention import Scoring, attend, dense_attention, reference
from octavo.attention.torch import padded, ragged

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.mark.parametrize("path", [attend, ragged.attend, padded.attend])
@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 2**31), softcap=st.sampled_from([None, 0.5, 30.0]), sinks=st.booleans(), G=st.integers(1, 3),
    N=st.sampled_from([1, 5, 20]), window=st.sampled_from([None, 9]),
)  # fmt: skip
def test_every_path_is_the_reference(path, seed, softcap, sinks, G, N, window):
    case = make_case([[30, 0], [3, 17]], N=N, G=G, D=8, S=4, window=window, unused=0.0, seed=seed)
    sink = torch.randn(2 * G, generator=torch.Generator().manual_seed(seed)) if sinks else None
    scoring = Scoring(softcap, sink)
    torch.testing.assert_close(path(*case, scoring), reference.attend(*case, scoring), **CLOSE)


def test_without_a_cache_it_is_the_same():
    case = make_case([[0, 0]], N=30, G=2, D=8)
    key, value, position, _ = case.chunk
    chunk = case.chunk._replace(position=position - position[0, 0])
    scoring = Scoring(0.7, torch.randn(4, generator=torch.Generator().manual_seed(1)))
    expected = reference.attend(case.query, chunk.position, *case[2:6], chunk, scoring)
    got = dense_attention(case.query, key, value, None, 0, case.scale, scoring=scoring)
    torch.testing.assert_close(got, expected, **CLOSE)
