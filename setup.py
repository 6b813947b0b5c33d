"""The two C extensions; everything else is declared in pyproject.toml."""

from setuptools import Extension, setup

COMPILE_ARGS = ["-std=gnu11", "-O3", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-psabi"]

setup(
    ext_modules=[
        Extension("bus.memory._native", ["bus/memory/_native.c"], extra_compile_args=COMPILE_ARGS),
        Extension(
            "services.model._kernels",
            ["services/model/_kernels.c"],
            depends=["services/model/_kernels_impl.h"],
            extra_compile_args=COMPILE_ARGS,
            libraries=["m"],
        ),
    ]
)
