"""What pyproject.toml cannot say about the build: the C extension and its stable-ABI wheel tag."""

from setuptools import Extension, setup

setup(
    package_dir={"": "src"},
    ext_modules=[
        Extension(
            "octavo.attention._native",
            sources=["src/octavo/attention/_native.c"],
            define_macros=[("Py_LIMITED_API", "0x030B0000")],
            extra_compile_args=["-std=c11", "-O3", "-pthread", "-ffp-contract=fast"],
            extra_link_args=["-pthread"],
            libraries=["m", "dl"],
            py_limited_api=True,
            optional=True,  # without a compiler the torch path serves
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
