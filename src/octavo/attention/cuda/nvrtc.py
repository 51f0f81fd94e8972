"""Kernels in CUDA C++, compiled when first needed by NVRTC, the compiler that comes with PyTorch for CUDA.

So nothing is built at installation, and nobody needs nvcc. A compiled kernel is started through the CUDA driver, on
PyTorch's current stream and in its context; like any other launch it can be captured in a CUDA graph.
"""

import ctypes
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

NO_CONTEXT = 201  # a driver's error: this thread has no context yet


class Function:
    """One compiled kernel, which takes one struct."""

    def __init__(self, handle: ctypes.c_void_p, threads: int, resident: int) -> None:
        self._handle, self._threads = handle, threads
        self.resident = resident  # blocks that a core holds at once

    def __call__(self, blocks: int, struct: bytes, stream: int) -> None:
        """Start it; `struct` is copied. Raises RuntimeError where the driver refuses."""
        arguments = (ctypes.c_void_p * 1)(ctypes.cast(ctypes.c_char_p(struct), ctypes.c_void_p))
        what = self._handle, blocks, 1, 1, self._threads, 1, 1, 0, ctypes.c_void_p(stream), arguments, None
        status = _driver().cuLaunchKernel(*what)
        if status == NO_CONTEXT:
            _enter(torch.device("cuda", torch.cuda.current_device()))
            status = _driver().cuLaunchKernel(*what)
        if status:
            raise RuntimeError(f"CUDA driver: a kernel could not be started (error {status})")


def compiled(source: str, name: str, constants: Mapping[str, int], threads: int, device: torch.device) -> Function:
    """The kernel `name` (declared `extern "C"`) of a source, with `constants` as macros, for blocks of `threads`.

    Raises RuntimeError where there is no NVRTC, the source does not compile, or the driver refuses the result.
    """
    with torch.cuda.device(device):
        _enter(device)
        cubin = _cubin(source, constants, torch.cuda.get_device_capability())
        module, function, resident = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_int()
        driver = _driver()
        for status in (
            driver.cuModuleLoadData(ctypes.byref(module), cubin),
            driver.cuModuleGetFunction(ctypes.byref(function), module, name.encode()),
            driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(
                ctypes.byref(resident), function, threads, ctypes.c_size_t(0)
            ),
        ):
            if status:
                raise RuntimeError(f"CUDA driver: kernel {name} could not be loaded (error {status})")
    return Function(function, threads, max(1, resident.value))


def _enter(device: torch.device) -> None:
    """Make the device's context that of this thread: the driver asks for one, and PyTorch makes it when it must."""
    torch.zeros((), device=device)


def _cubin(source: str, constants: Mapping[str, int], capability: tuple[int, int]) -> bytes:
    """Machine code for a GPU of this capability."""
    nvrtc = _nvrtc()
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    options = [f"--gpu-architecture=sm_{capability[0]}{capability[1]}", "--std=c++17"]
    options += [f"-D{name}={value}" for name, value in constants.items()]
    given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    _check(nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None))
    try:
        status = nvrtc.nvrtcCompileProgram(program, len(options), given)
        if status:
            _check(nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size)))
            log = ctypes.create_string_buffer(size.value)
            _check(nvrtc.nvrtcGetProgramLog(program, log))
            raise RuntimeError(f"NVRTC: a kernel does not compile with {options}:\n{log.value.decode()}")
        _check(nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)))
        cubin = ctypes.create_string_buffer(size.value)
        _check(nvrtc.nvrtcGetCUBIN(program, cubin))
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return cubin.raw


def _check(status: int) -> None:
    if status:
        raise RuntimeError(f"NVRTC failed (error {status})")


@cache
def _driver() -> Any:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as e:
        raise RuntimeError(f"the CUDA driver cannot be loaded: {e}") from e


@cache
def _nvrtc() -> Any:
    """The library as PyTorch has loaded it, or from the folder in which it was installed beside PyTorch."""
    name = f"libnvrtc.so.{(torch.version.cuda or '').partition('.')[0]}"
    try:
        return ctypes.CDLL(name)
    except OSError:
        pass
    spec = find_spec("nvidia")
    folders = [] if spec is None else spec.submodule_search_locations or []
    for found in sorted(path for folder in folders for path in Path(folder).glob(f"*/lib/{name}")):
        try:
            for other in sorted(found.parent.glob("libnvrtc-builtins.so.*")):  # which it looks for by name only
                ctypes.CDLL(str(other))
            return ctypes.CDLL(str(found))
        except OSError:
            continue
    raise RuntimeError(f"{name} is not installed beside PyTorch")
