"""What pyproject.toml cannot say: the compiled kernels, without which everything works, only slower."""

from setuptools import Extension, setup

# Vectors are passed to functions that are always inlined: how they would be passed does not matter.
FLAGS = ["-std=c++17", "-O3", "-Wno-psabi"]
THREADS = ["-fopenmp"]  # of the runtime that torch brings and has loaded before


def kernel(name: str, *flags: str) -> Extension:
    """The compiled module `name`, which any Python from 3.11 on can load; left out where there is no compiler."""
    return Extension(
        name,
        [name.replace(".", "/") + ".cpp"],
        extra_compile_args=[*FLAGS, *flags],
        extra_link_args=list(flags),
        py_limited_api=True,
        optional=True,
    )


setup(
    ext_modules=[
        kernel("igstore.masks._ranking"),
        kernel("igstore.acceleration._convolutions", *THREADS),
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
