"""What pyproject.toml cannot say about the build: the C extensions and their stable-ABI wheel tag."""

from setuptools import Extension, setup


def _extension(name: str) -> Extension:
    folder = "src/octavo/attention"
    return Extension(
        f"octavo.attention.{name}",
        sources=[f"{folder}/{name}.c"],
        depends=[f"{folder}/_threads.h"],
        define_macros=[("Py_LIMITED_API", "0x030B0000")],
        extra_compile_args=["-std=c11", "-O3", "-pthread", "-ffp-contract=fast"],
        extra_link_args=["-pthread"],
        libraries=["m", "dl"],
        py_limited_api=True,
        optional=True,  # without a compiler the torch path serves
    )


setup(
    package_dir={"": "src"},
    ext_modules=[_extension("_native"), _extension("_prefill")],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
