"""The C kernels against the reference, on every instruction set of this machine and several thread counts."""

import os
import platform
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attention.case import CODES, DTYPES, Case, make_case, misuses
from octavo.attention import Scoring, reference
from octavo.attention.cpu import kernels

if not kernels.BUILT:
    pytest.skip("the extension is not built", allow_module_level=True)
from octavo.attention.cpu import _kernels

UNIT = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # rounding of the output


def _supported() -> list[str]:
    best, names = kernels.isa(), []
    for name in ("scalar", "avx2", "avx512"):
        try:
            _kernels.set_isa(name)
            names.append(name)
        except ValueError:
            pass
    _kernels.set_isa(best)
    return names


ISAS = _supported()


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    best, work = kernels.isa(), _kernels.set_chunk_work(1)
    _kernels.set_chunk_work(work)
    yield
    _kernels.set_isa(best)
    _kernels.set_chunk_work(work)


def assert_matches(case: Case, out: Tensor) -> None:
    expected = reference.attend(*case.widened())
    assert out.shape == expected.shape
    assert out.dtype == case.query.dtype
    error = (out.float() - expected).abs()
    rounding = UNIT[out.dtype] * expected.abs() + 2.0**-24 * (out.dtype == torch.float16)
    allowed = 2e-6 * expected.norm() + 1e-7 * expected.numel() ** 0.5  # values are about 1 and may cancel
    assert (error - rounding).clamp(min=0).norm() <= allowed
    assert torch.equal(out[case.at < 0], torch.zeros_like(out[case.at < 0]))


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
        stored=draw(st.sampled_from([*DTYPES, *CODES])),
        chunk=draw(st.booleans()),
        padding=draw(st.sampled_from([0.0, 0.3])),
        window=draw(st.one_of(st.none(), st.integers(0, 200))),
        disorder=draw(st.sampled_from([0.0, 0.5, 1.0])),
        seed=draw(st.integers(0, 2**32)),
    )


@settings(max_examples=120, deadline=None)
@given(cases(), st.sampled_from([1, 3000, 200000]))
def test_matches_the_reference(case: Case, chunk_work: int) -> None:
    _kernels.set_chunk_work(chunk_work)
    for isa in ISAS:
        _kernels.set_isa(isa)
        for threads in (1, 2, 3):
            out = kernels.decode(*case, threads=threads)
            assert_matches(case, out)
            assert torch.equal(out, kernels.decode(*case, threads=threads))


@settings(max_examples=40, deadline=None)
@given(cases(), st.sampled_from([None, 0.5, 30.0]), st.booleans(), st.sampled_from([1, 200000]))
def test_softcap_and_sinks_match_the_reference(case: Case, softcap: float | None, sinks: bool, chunk_work: int) -> None:
    _kernels.set_chunk_work(chunk_work)
    sink = 3 * torch.randn(case.query.shape[1], generator=torch.Generator().manual_seed(1)) if sinks else None
    scoring = Scoring(softcap, sink)
    expected = reference.attend(*case.widened(), scoring)
    for isa in ISAS:
        _kernels.set_isa(isa)
        for threads in (1, 3):
            out = kernels.decode(*case, scoring, threads=threads)
            close = {"rtol": 1e-4 + UNIT[out.dtype], "atol": 3e-5}
            torch.testing.assert_close(out.float(), expected, **close)


@pytest.mark.parametrize("isa", ISAS)
def test_scores_far_beyond_a_cap_and_far_from_a_sink(isa: str) -> None:
    _kernels.set_isa(isa)
    case = make_case([[130, 7]], G=2)
    case = case._replace(query=case.query * 400)
    for sink in (-300.0, 0.0, 300.0):
        scoring = Scoring(50.0, torch.tensor([sink, -sink, 1.0, 60.0]))
        expected = reference.attend(*case.widened(), scoring)
        torch.testing.assert_close(kernels.decode(*case, scoring), expected, rtol=1e-4, atol=3e-5)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("softcap", [1e-39, 1e-3, 3e3, 1e7, 1e35])
def test_caps_far_below_and_far_above_all_scores(isa: str, softcap: float) -> None:
    _kernels.set_isa(isa)
    case = make_case([[130, 7]], G=2)
    expected = reference.attend(*case.widened(), Scoring(softcap))
    torch.testing.assert_close(kernels.decode(*case, Scoring(softcap)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("stored", [*DTYPES, *CODES])
@pytest.mark.parametrize("D", [32, 64, 80, 96, 128, 256])
def test_long_rows(isa: str, stored: torch.dtype, D: int) -> None:
    _kernels.set_isa(isa)
    case = make_case([[1100, 3, 500]], G=3, D=D, stored=stored)
    for threads in (1, 2):
        assert_matches(case, kernels.decode(*case, threads=threads))


def test_scores_far_apart() -> None:
    case = make_case([[300, 200]], G=2)
    case = case._replace(query=case.query * 40)  # weights from 1 down to 0, the largest in any tile
    assert_matches(case, kernels.decode(*case))


def test_strided_inputs() -> None:
    case = make_case([[40, 9], [0, 70]], N=3, G=2, D=48)
    B, Hq, N, D = case.query.shape
    fused = torch.randn(N, B, 8 * D)  # queries, keys and values of one projection
    heads = fused.view(N, B, 8, D).permute(1, 2, 0, 3)
    q, k, v = heads[:, :Hq], heads[:, 4:6], heads[:, 6:8]
    expanded = case.at[:1].expand(B, N)
    chunk = case.chunk._replace(key=k, value=v, position=expanded)
    case = case._replace(query=q, at=expanded, chunk=chunk)
    assert_matches(case, kernels.decode(*case))


def test_empty_past_and_empty_batch() -> None:
    case = make_case([[0, 0]], N=5, G=2)
    case = case._replace(table=torch.zeros(1, 2, 0, dtype=torch.int32))
    assert_matches(case, kernels.decode(*case))
    none = make_case([[0, 0]], N=0)
    assert kernels.decode(*none).shape == (1, 0, 2, 64)


def test_row_of_which_all_has_expired() -> None:
    case = make_case([[90, 90]], G=2)
    row = case.table[0, 0].long()
    case.pages.expiry[row] = 50
    case.pages.key[row] = torch.nan  # what no query sees is never read
    case.pages.value[row] = torch.nan
    out = kernels.decode(*case)
    torch.testing.assert_close(out[0, 0, :2], case.chunk.value[0, :1, 0].expand(2, -1))
    assert out.isfinite().all()


def test_concurrent_calls() -> None:
    _kernels.set_chunk_work(1000)
    work = [make_case([[400 + i, 30]], G=3, seed=i) for i in range(4)]
    alone = [kernels.decode(*case, threads=2) for case in work]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(25):
            outs = pool.map(lambda case: kernels.decode(*case, threads=2), work)
            assert all(torch.equal(a, b) for a, b in zip(alone, outs, strict=True))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forked_child() -> None:
    case = make_case([[3000, 3000]], G=3)
    expected = kernels.decode(*case, threads=2)
    child = os.fork()
    if child == 0:
        same = torch.equal(expected, kernels.decode(*case, threads=2))
        os._exit(0 if same else 1)
    deadline = time.monotonic() + 15
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            pytest.fail("the forked child hangs")
        time.sleep(0.01)
    assert ended == (child, 0)


def test_tables_of_a_larger_batch_are_read_in_place() -> None:
    case = make_case([[40, 9], [7, 70]], N=2, G=2)
    tables = torch.full((5, 2, 2, case.table.shape[2] + 3), 99999, dtype=torch.int32)
    lengths = torch.full((5, 2, 2), 99999, dtype=torch.int32)
    tables[2:4, 1, :, : case.table.shape[2]], lengths[2:4, 1] = case.table, case.length
    assert_matches(case, kernels.decode(*case._replace(table=tables[2:4, 1], length=lengths[2:4, 1])))


def test_misuse_is_refused() -> None:
    case = make_case([[20, 20]], N=3, G=2)
    for change in misuses(case):
        with pytest.raises(ValueError, match="attention"):
            kernels.decode(*case._replace(**change))
    with pytest.raises(ValueError, match="attention"):
        kernels.decode(*case._replace(scale=float("nan")))
    for scoring in (Scoring(0.0), Scoring(float("nan")), Scoring(sinks=torch.zeros(3)), Scoring(float("inf"))):
        with pytest.raises(ValueError, match="attention"):
            kernels.decode(*case, scoring)
    with pytest.raises(ValueError, match="attention: a request has"):
        _kernels.decode(b"short")
    with pytest.raises(ValueError, match="vax"):
        _kernels.set_isa("vax")


@pytest.mark.parametrize("code", range(256))
def test_every_code_is_read_as_torch_reads_it(code: int) -> None:
    stored = torch.tensor([code], dtype=torch.uint8).view(torch.float8_e4m3fn)
    if stored.isnan():
        pytest.skip("a NaN, which pages never hold")
    case = make_case([[1]], chunk=False, stored=torch.float8_e4m3fn, D=32)
    case.pages.value.view(torch.uint8)[:] = code
    for isa in ISAS:
        _kernels.set_isa(isa)
        row = case.table[0, 0, 0].long()
        expected = (stored.float() * case.pages.value_scale[row, 0]).expand(32)
        assert torch.equal(kernels.decode(*case)[0, 0, 0], expected)


PROCESSOR = """
#include <cpuid.h>
#include <string.h>
static const char *missing;
static int supports(const char *feature) { return strcmp(feature, missing) != 0; }
static int cpuid(unsigned *c) { return *c = ~(strcmp("f16c", missing) ? 0u : 1u << 29), 1; }
#define __builtin_cpu_supports(feature) supports(feature)
#define __get_cpuid(leaf, a, b, c, d) (*(a) = *(b) = *(d) = 0, cpuid(c))
#include "decode.c"
int main(int count, char **argument) {
    missing = argument[count - 1];
    return decode_has(0) + 2 * decode_has(1) + 4 * decode_has(2);
}
"""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="these are features of x86-64")
@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_instruction_sets_need_all_that_they_are_compiled_for(tmp_path: Path) -> None:
    """The choice, compiled for processors that lack one feature each."""
    source, program = tmp_path / "processor.c", tmp_path / "processor"
    source.write_text(PROCESSOR)
    folder = Path(kernels.__file__).parent
    flags = ["-std=c11", "-O1", "-w", "-pthread", "-I", str(folder), "-o", str(program), str(source), "-lm", "-ldl"]
    subprocess.run(["cc", *flags], check=True)
    scalar, avx2, avx512 = 1, 3, 7
    most = dict.fromkeys(("avx2", "fma", "f16c"), scalar)
    most |= dict.fromkeys(("avx512f", "avx512bw", "avx512vl", "avx512dq"), avx2) | {"nothing": avx512}
    assert {missing: subprocess.run([program, missing]).returncode for missing in most} == most


def test_codes_are_summed_with_the_new_token() -> None:
    """Pages of codes and a chunk of floats never share a tile."""
    for stored in CODES:
        for isa in ISAS:
            _kernels.set_isa(isa)
            case = make_case([[1, 63, 65, 130]], N=2, G=3, stored=stored, window=40)
            assert_matches(case, kernels.decode(*case))
