"""The C extensions; everything else is declared in pyproject.toml."""

from pathlib import Path

from setuptools import Extension, setup

COMPILE_ARGS = ["-std=gnu11", "-O3", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-psabi"]
ENDS = ("", "_attention", "_attention_send", "_attention_recv", "_expert", "_forward", "_wait", "_spread")
SHARED = ["bus/memory/_native.h", "bus/memory/_burst.h", "bus/memory/_fault.h"]

setup(
    ext_modules=[
        Extension(
            "bus.memory._native",
            [
                f"bus/memory/_native{part}.c"
                for part in (
                    "",
                    "_lanes",
                    "_link",
                    "_wait",
                    "_place",
                    "_reach",
                    "_share",
                    "_send",
                    "_recv",
                    "_header",
                    "_content",
                    "_in_place",
                    "_ends",
                    "_bench",
                )
            ],
            depends=[*SHARED, "bus/memory/_native_link.h", "bus/memory/_native_ends.h"],
            extra_compile_args=COMPILE_ARGS,
        ),
        Extension(
            "bus.memory._collectives",
            [
                f"bus/memory/_collectives{part}.c"
                for part in (
                    "",
                    "_rows",
                    "_group",
                    "_spread",
                    "_exchange",
                    "_dispatch",
                    "_pull",
                    "_alltoall",
                    "_swap",
                    "_persistent",
                )
            ],
            depends=[*SHARED, *map(str, Path("bus/memory").glob("_collectives*.h"))],
            # The order and rounding of every addition is a promise: a fused multiply-add would break it on Arm.
            extra_compile_args=[*COMPILE_ARGS, "-ffp-contract=off"],
        ),
        Extension(
            "bus.memory._relay",
            [
                *(f"bus/memory/_relay{part}.c" for part in ENDS),
                "bus/memory/_collectives_rows.c",
            ],
            depends=[
                *SHARED,
                *map(str, Path("bus/memory").glob("_relay*.h")),
                "bus/memory/_collectives_rows.h",
            ],
            extra_compile_args=[*COMPILE_ARGS, "-ffp-contract=off"],
        ),
        Extension(
            "services.model._kernels",
            [f"services/model/_kernels{part}.c" for part in ("", "_sets", "_products", "_rows", "_paged")],
            depends=[
                f"services/model/_{name}.h"
                for name in ("kernels", "kernels_impl", "arguments", "quantise_row")
            ],
            extra_compile_args=COMPILE_ARGS,
            libraries=["m"],
        ),
        Extension(
            "services.model._int8",
            ["services/model/_int8.c"],
            depends=["services/model/_arguments.h", "services/model/_quantise_row.h"],
            extra_compile_args=COMPILE_ARGS,
        ),
    ]
)
