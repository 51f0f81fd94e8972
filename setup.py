"""What pyproject.toml cannot say about the build: the C extensions and their stable-ABI wheel tag."""

import sysconfig

from setuptools import Extension, setup

LIMITED = not sysconfig.get_config_var("Py_GIL_DISABLED")  # a free-threaded Python has no stable ABI


def _extension(room: str, name: str, sources: list[str], headers: list[str], flags: list[str]) -> Extension:
    folder = f"src/octavo/{room.replace('.', '/')}"
    return Extension(
        f"octavo.{room}.{name}",
        sources=[f"{folder}/{source}" for source in sources],
        depends=[f"{folder}/{header}" for header in headers],
        define_macros=[("Py_LIMITED_API", "0x030B0000")] if LIMITED else [("OCTAVO_FREE_THREADED", "1")],
        extra_compile_args=["-std=c11", "-pthread", *flags],
        extra_link_args=["-pthread"],
        libraries=["m", "dl"],
        py_limited_api=LIMITED,
        optional=True,  # without a compiler attention has a torch path, and there is no octavo.vdb
    )


_attention = _extension(
    "attention.cpu",
    "_kernels",
    ["module.c", "decode.c", "prefill.c", "copies.c"],
    ["job.h", "threads.h", "decode_kernels.h", "copies.h"],
    flags=["-O3", "-ffp-contract=fast"],
)

# Contraction off: distances are the same, bit for bit, on every machine.
_vdb = _extension(
    "vdb",
    "_vdb",
    ["_vdb.c"],
    ["vdb.h", "_values.h", "_metadata.h", "_filter.h", "_hits.h"],
    flags=["-O3", "-g0", "-ffp-contract=off", "-DVDB_MULTITHREADED"],
)

setup(
    package_dir={"": "src"},
    ext_modules=[_attention, _vdb],
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if LIMITED else {},
)
