"""What pyproject.toml cannot say: the compiled kernels, without which everything works, only slower."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "igstore.engine._winograd",
            ["igstore/engine/_winograd.cpp"],
            extra_compile_args=["-std=c++17", "-O3", "-fopenmp"],
            extra_link_args=["-fopenmp"],  # the runtime that torch brings, if torch was imported first
            py_limited_api=True,
            optional=True,  # no compiler, no kernels
        ),
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
