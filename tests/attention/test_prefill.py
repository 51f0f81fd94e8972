"""The AMX prefill kernel against the reference on random shapes and several thread counts.

Where the processor lacks nothing but AMX, the kernel is compiled for these tests with its tile instructions in plain C.
"""

import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attention.case import CODES, Case, misuses
from attention.case import make_case as any_case
from octavo.attention import Pages, Scoring, reference
from octavo.attention.cpu import kernels
from octavo.attention.pages import read

NEEDED = {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16"}


@pytest.fixture(scope="module", autouse=True)
def _kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    if kernels.AMX:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_kernels", emulated(tmp_path_factory.mktemp("tiles")), raising=False)
        patch.setattr(kernels, "AMX", True)
        yield


def emulated(folder: Path) -> ModuleType:
    """The extension with AMX's tiles emulated. Skips the tests where that is not possible either."""
    about, include = Path("/proc/cpuinfo"), Path(sysconfig.get_path("include"))
    features = set(about.read_text().split()) if about.exists() else set()
    if not features >= NEEDED or shutil.which("cc") is None or not (include / "Python.h").exists():
        pytest.skip("needs AMX, or AVX-512 with bfloat16, a C compiler and Python's headers")
    kernel, library = Path(kernels.__file__).parent, folder / "_kernels.so"
    flags = ["-std=c11", "-O2", "-w", "-pthread", "-shared", "-fPIC", f"-I{include}", f"-I{kernel}", "-o", str(library)]
    sources = [source for source in kernel.glob("*.c") if source.name != "prefill.c"]  # tiles.c includes it
    sources.append(Path(__file__).parent / "tiles.c")
    subprocess.run(["cc", *flags, *map(str, sources), "-lm", "-ldl"], check=True)
    spec = spec_from_file_location("_kernels", library)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_case(lengths: list[list[int]], *, N: int = 40, stored: torch.dtype = torch.bfloat16, **options: Any) -> Case:
    return any_case(lengths, N=N, dtype=torch.bfloat16, stored=stored, **options)


def rounded(case: Case) -> Case:
    """The same with codes widened to bfloat16, as the kernel does: what that loses is not its error."""
    key, value, key_scale, value_scale, *rest = case.pages
    if key_scale is not None:
        key, value = (read(t, scale, torch.bfloat16) for t, scale in ((key, key_scale), (value, value_scale)))
    return case._replace(pages=Pages(key, value, None, None, *rest))


def assert_matches(case: Case, out: Tensor, scoring: Scoring | None = None) -> None:
    expected = reference.attend(*rounded(case).widened(), scoring)
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
    case = make_case(
        draw(st.lists(row, min_size=B, max_size=B)),
        N=N,
        stored=draw(st.sampled_from([torch.bfloat16, torch.bfloat16, *CODES])),
        G=draw(st.integers(1, 8)),
        D=draw(st.sampled_from([32, 64, 96, 128])),
        S=draw(st.one_of(st.just(16), st.integers(1, 70))),
        pad=draw(st.sampled_from([(0, 0), (0, 0), (N // 3, 0), (0, N // 2), (N // 4, N // 4), (N, 0)])),
        window=draw(st.one_of(st.none(), st.integers(0, 300))),
        disorder=draw(st.sampled_from([0.0, 0.0, 0.5])),
        seed=draw(st.integers(0, 2**32)),
    )
    return case.last(draw(st.one_of(st.just(N), st.integers(1, N))))  # SwiftKV asks for a few queries at the end


@settings(max_examples=60, deadline=None)
@given(cases())
def test_matches_the_reference(case: Case) -> None:
    out = kernels.prefill(*case, threads=1)
    assert_matches(case, out)
    for threads in (2, 3):
        assert torch.equal(out, kernels.prefill(*case, threads=threads))


@settings(max_examples=30, deadline=None)
@given(cases(), st.sampled_from([None, 0.5, 50.0]), st.booleans(), st.sampled_from([1, 3]))
def test_softcap_and_sinks_match_the_reference(case: Case, softcap: float | None, sinks: bool, threads: int) -> None:
    sink = 3 * torch.randn(case.query.shape[1], generator=torch.Generator().manual_seed(1)) if sinks else None
    scoring = Scoring(softcap, sink)
    assert_matches(case, kernels.prefill(*case, scoring, threads=threads), scoring)


@pytest.mark.parametrize("scale", [3.0, -0.5, 0.0])
def test_any_scale_under_a_cap(scale: float) -> None:
    case = make_case([[300, 40]], N=70, G=2)._replace(scale=scale)
    scoring = Scoring(4.0, torch.tensor([-90.0, 0.0, 2.0, 90.0]))
    assert_matches(case, kernels.prefill(*case, scoring), scoring)


@pytest.mark.parametrize("softcap", [1e-39, 1e-3, 3e3, 1e7, 1e35])
def test_caps_far_below_and_far_above_all_scores(softcap: float) -> None:
    case = make_case([[300, 40]], N=70, G=2)
    assert_matches(case, kernels.prefill(*case, Scoring(softcap)), Scoring(softcap))


@pytest.mark.parametrize("D", [32, 64, 160, 256])
def test_long_rows(D: int) -> None:
    case = make_case([[2100, 0, 700]], N=512, G=3, D=D, window=256)
    assert_matches(case, kernels.prefill(*case))


@pytest.mark.parametrize("scale", [3.0, -0.5, 0.0, 1e-9])
def test_any_scale(scale: float) -> None:
    case = make_case([[300, 40]], N=70, G=2, window=50)._replace(scale=scale)
    assert_matches(case, kernels.prefill(*case))


def test_scores_far_apart() -> None:
    case = make_case([[700, 200]], N=70, G=2)
    rising = torch.linspace(0, 60, case.pages.position.numel()).view(*case.pages.position.shape, 1)
    case.pages.key.mul_(rising.bfloat16())  # the largest score rises all the time
    assert_matches(case, kernels.prefill(*case))


def test_strided_inputs() -> None:
    case = make_case([[40, 9], [0, 70]], N=33, G=2, D=96)
    B, Hq, N, D = case.query.shape
    fused = torch.randn(N, B, 8 * D).bfloat16()  # queries, keys and values of one projection
    heads = fused.view(N, B, 8, D).permute(1, 2, 0, 3)
    q, k, v = heads[:, :Hq], heads[:, 4:6], heads[:, 6:8]
    expanded = case.at[:1].expand(B, N)
    case = case._replace(query=q, at=expanded, chunk=case.chunk._replace(key=k, value=v, position=expanded))
    assert_matches(case, kernels.prefill(*case))


def test_empty_past_and_empty_batch() -> None:
    case = make_case([[0, 0]], N=50, G=2)
    case = case._replace(table=torch.zeros(1, 2, 0, dtype=torch.int32))
    assert_matches(case, kernels.prefill(*case))
    none = make_case([[0, 0]], N=0)
    assert kernels.prefill(*none).shape == (1, 0, 2, 64)


def test_past_of_which_all_has_expired() -> None:
    case = make_case([[90, 130]], G=2)
    case.pages.expiry[case.table.long()] = case.at[0, 0] - 1
    case.pages.key.fill_(torch.nan)  # what no query sees is never read
    case.pages.value.fill_(torch.nan)
    out = kernels.prefill(*case)
    torch.testing.assert_close(out[0, 0, ::2], case.chunk.value[0, :, 0])
    assert out.isfinite().all()
    case.chunk.expiry.copy_(case.at[:, None] - 1)  # nor do the new tokens see anything
    assert not kernels.prefill(*case).any()


def test_misuse_is_refused() -> None:
    case = make_case([[20, 20]], G=2)
    for change in (
        *misuses(case),
        {"query": case.query.float()},
        {"query": case.query[..., :40]},
        {"scale": float("nan")},
    ):
        with pytest.raises(ValueError, match="attention"):
            kernels.prefill(*case._replace(**change))


def test_what_is_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case([[20]])
    assert kernels.has_prefill(case.query, case.pages)
    for dtype in (torch.float32, torch.float16):
        assert not kernels.has_prefill(case.query.to(dtype), case.pages)
        assert not kernels.has_prefill(case.query, make_case([[20]], stored=dtype).pages)
    assert not kernels.has_prefill(case.query[..., :48], case.pages)
    assert not kernels.has_prefill(case.query.to("meta"), case.pages)
    monkeypatch.setattr(kernels, "AMX", False)
    assert not kernels.has_prefill(case.query, case.pages)
    with pytest.raises(ValueError, match="AMX"):
        kernels.prefill(*case)
