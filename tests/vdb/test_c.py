"""The C header's own tests (tests/vdb/c), built with sanitizers and run; and that every compiler takes the header.

Programs print one line and exit 0, or say which check failed and exit 1. Without a C compiler all of this is skipped;
what needs clang is skipped without clang.
"""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import octavo.vdb
from octavo.vdb.join import HEADER as JOINED
from octavo.vdb.join import PARTS, joined

C = Path(__file__).parent / "c"
HEADER = Path(octavo.vdb.__file__).parent
WARNINGS = ["-Wall", "-Wextra", "-Wpedantic", "-Werror"]
COMMON = [*WARNINGS, f"-I{HEADER}", f"-I{C}", "-g1", "-pthread"]
ADDRESS = ["-O1", "-DVDB_MULTITHREADED", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
QUICKLY = [*ADDRESS[1:], "-O0"]  # half the time to compile, for programs that do not run long
THREAD = ["-O1", "-DVDB_MULTITHREADED", "-fsanitize=thread"]
PROGRAMS = {
    "test_kernels": ADDRESS,
    "test_exact": ADDRESS,
    "test_rows": QUICKLY,
    "test_values": QUICKLY,
    "test_original": QUICKLY,
    "test_hnsw": [*ADDRESS, "-DROWS=1200"],
    "test_files": ADDRESS,
    "kill_save": ["-O2", "-DVDB_MULTITHREADED"],
    "test_fork": ["-O2", "-DVDB_MULTITHREADED"],
    "test_threads": THREAD,
}
ARGUMENTS = {
    "test_exact": ["12"],
    "test_files": ["8"],
    "kill_save": ["40"],
    "test_fork": ["600"],
}  # shorter than the defaults, which take minutes and which --full runs

needs_a_compiler = pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")


def test_the_header_is_joined_from_its_parts() -> None:
    assert {path.stem for path in (JOINED.parent / "parts").iterdir()} == set(PARTS)
    assert JOINED.read_text() == joined(), "run python src/octavo/vdb/join.py"


def compiled(compiler: list[str], flags: list[str], sources: list[Path], out: Path) -> str:
    """Empty, or what the compiler said."""
    command = [*compiler, *COMMON, *flags, *map(str, sources), "-x", "none", "-lm", "-o", str(out)]
    return subprocess.run(command, capture_output=True, text=True).stderr


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every program of PROGRAMS."""
    folder = tmp_path_factory.mktemp("programs")

    def build(name: str) -> str:
        return compiled(["cc", "-std=c11"], PROGRAMS[name], [C / f"{name}.c"], folder / name)

    with ThreadPoolExecutor(2) as pool:
        assert not "".join(pool.map(build, PROGRAMS))
    return folder


@needs_a_compiler
@pytest.mark.parametrize("name", PROGRAMS)
def test_program(programs: Path, name: str, tmp_path: Path, full: bool) -> None:
    argument = {"test_original": [str(tmp_path / "x.vdb")], "test_threads": [str(tmp_path / "x.vdb")]}
    argument |= {"test_files": [str(tmp_path / "files")], "kill_save": [str(tmp_path)]}
    argument |= {"test_values": [str(tmp_path / "x.vdb")]}
    command = [str(programs / name), *argument.get(name, []), *([] if full else ARGUMENTS.get(name, []))]
    # gcc 13 misaligns vectors of 64 bytes on the address sanitizer's own stack (gcc bug 110027)
    environment = {**os.environ, "ASAN_OPTIONS": "detect_stack_use_after_return=0"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip()
    assert "Sanitizer" not in done.stderr


COMPILERS = [
    ["cc", "-std=gnu11"],
    ["c++", "-x", "c++", "-std=c++11"],
    ["c++", "-x", "c++", "-std=c++17"],
    ["clang", "-std=c11"],
    ["clang++", "-x", "c++", "-std=c++17"],
]


@needs_a_compiler
@pytest.mark.parametrize("compiler", COMPILERS, ids=" ".join)
@pytest.mark.parametrize("threads", [[], ["-DVDB_MULTITHREADED"]], ids=["single", "multi"])
def test_the_original_s_program_compiles_everywhere(compiler: list[str], threads: list[str], tmp_path: Path) -> None:
    if not shutil.which(compiler[0]):
        pytest.skip(f"no {compiler[0]}")
    assert not compiled(compiler, ["-O1" if threads else "-O0", *threads], [C / "test_original.c"], tmp_path / "out")
    done = subprocess.run([str(tmp_path / "out"), str(tmp_path / "x.vdb")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_a_compiler
def test_a_program_of_two_files(tmp_path: Path) -> None:
    sources = [C / "two_files_a.c", C / "two_files_b.c"]
    assert not compiled(["cc", "-std=c11"], ["-O0"], sources, tmp_path / "out")
    assert subprocess.run([str(tmp_path / "out")]).returncode == 0


@needs_a_compiler
@pytest.mark.parametrize("effort", ["-O0", "-O1"])  # at -O0 such functions keep the system's names in the object file
def test_a_program_with_names_of_the_system_that_declares_first(effort: str, tmp_path: Path) -> None:
    assert not compiled(["cc", "-std=c11"], [effort], [C / "own_names.c"], tmp_path / "out")
    assert subprocess.run([str(tmp_path / "out"), str(tmp_path / "x.vdb")]).returncode == 0


@needs_a_compiler
@pytest.mark.parametrize("own", [[], ["-DOWN_MALLOC"], ["-DOWN_FREE"], ["-DOWN_MALLOC", "-DOWN_FREE"]], ids=" ".join)
def test_parts_of_an_allocator(own: list[str], tmp_path: Path) -> None:
    assert not compiled(["cc", "-std=c11"], ["-O0", *own], [C / "allocators.c"], tmp_path / "out")
    assert subprocess.run([str(tmp_path / "out")]).returncode == 0


@pytest.mark.skipif(not shutil.which("clang"), reason="no clang, so no libFuzzer")
def test_fuzzing_the_loaders(tmp_path: Path) -> None:
    """A short run from the committed corpus. Longer: run the program by hand with -max_total_time=600."""
    flags = ["-O1", "-DVDB_MULTITHREADED", "-fsanitize=fuzzer,address,undefined", "-fno-sanitize-recover=all"]
    assert not compiled(["clang", "-std=c11"], flags, [C / "fuzz_load.c"], tmp_path / "fuzz")
    corpus = shutil.copytree(C / "corpus", tmp_path / "corpus")
    # no limit on the peak memory: a process begins with that of the one that started it, which may hold models
    limits = ["-max_total_time=20", "-max_len=16384", "-timeout=20", "-rss_limit_mb=0", "-malloc_limit_mb=1024"]
    command = [str(tmp_path / "fuzz"), *limits, str(corpus)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
