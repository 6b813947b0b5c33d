"""Builds the bus's C extensions with flags of one's own, beside the ones that are installed."""

from __future__ import annotations

import os
import shlex
import subprocess
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MEMORY = ROOT / "bus" / "memory"
BASE_FLAGS = (
    "-std=gnu11",
    "-g",
    "-fPIC",
    "-shared",
    "-Wall",
    "-Wextra",
    "-Wno-unused-parameter",
    "-Wno-psabi",
)
TIMEOUT_S = 300


def extensions() -> Iterator[tuple[str, list[Path]]]:
    """Name and sources of each extension: `_x` is made of `_x.c` and all `_x_*.c`."""
    parts: dict[str, list[Path]] = {}
    for source in sorted(MEMORY.glob("_*.c")):
        parts.setdefault("_" + source.stem.split("_")[1], []).append(source)
    yield from parts.items()


def compiler() -> list[str]:
    """Return the C compiler's command."""
    return shlex.split(os.environ.get("CC", "cc"))


def build_extension(name: str, sources: Sequence[Path], directory: Path, flags: Sequence[str]) -> Path:
    """Compile one extension into `directory`; return its file. CalledProcessError shows the compiler's words."""
    target = directory / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    include = f"-I{sysconfig.get_path('include')}"
    command = [*compiler(), *BASE_FLAGS, *flags, include, *map(str, sources), "-lm", "-o", str(target)]
    subprocess.run(command, check=True, timeout=TIMEOUT_S)
    return target
