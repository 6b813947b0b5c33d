"""Builds the bus's C extensions with flags of one's own, beside the ones that are installed."""

from __future__ import annotations

import os
import runpy
import shlex
import subprocess
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "bus.memory."
MEMORY = ROOT / "bus" / "memory"
BASE_FLAGS = ("-g", "-fPIC", "-shared")
TIMEOUT_S = 300


@dataclass(frozen=True)
class ExtensionSource:
    """An extension as setup.py declares it: its last name, its C files, and the flags that it is always built with."""

    name: str
    sources: tuple[Path, ...]
    flags: tuple[str, ...]


def extensions(root: Path = ROOT) -> Iterator[ExtensionSource]:
    """Yield the bus's extensions."""
    with warnings.catch_warnings(), mock.patch("setuptools.setup") as setup:
        warnings.simplefilter("ignore")
        runpy.run_path(str(root / "setup.py"))
    for extension in setup.call_args.kwargs["ext_modules"]:
        if extension.name.startswith(PACKAGE):
            sources = tuple(root / source for source in extension.sources)
            # Optimisation is the caller's choice.
            flags = tuple(flag for flag in extension.extra_compile_args if not flag.startswith("-O"))
            yield ExtensionSource(extension.name.removeprefix(PACKAGE), sources, flags)


def compiler() -> list[str]:
    """Return the C compiler's command."""
    return shlex.split(os.environ.get("CC", "cc"))


def build_extension(extension: ExtensionSource, directory: Path, flags: Sequence[str]) -> Path:
    """Compile one extension into `directory`; return its file. CalledProcessError shows the compiler's words."""
    target = directory / f"{extension.name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    include = f"-I{sysconfig.get_path('include')}"
    sources = map(str, extension.sources)
    command = [
        *compiler(),
        *BASE_FLAGS,
        *extension.flags,
        *flags,
        include,
        *sources,
        "-lm",
        "-o",
        str(target),
    ]
    subprocess.run(command, check=True, timeout=TIMEOUT_S)
    return target


def build_all(directory: Path, flags: Sequence[str], root: Path = ROOT) -> None:
    """Compile every extension of the sources under `root` into `directory`, side by side."""
    for extension in extensions(root):
        build_extension(extension, directory, flags)
