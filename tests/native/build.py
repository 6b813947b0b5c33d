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
    """Name and sources of each extension: `_native` has several files, any other has one."""
    native = sorted(MEMORY.glob("_native*.c"))
    yield "_native", native
    for source in sorted(MEMORY.glob("*.c")):
        if source not in native:
            yield source.stem, [source]


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
