"""Facts of the machine that a figure means nothing without."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

DISTRIBUTIONS = ("numpy", "pyzmq", "mpi4py", "openmpi", "mpich", "iceoryx2", "torch")


def facts() -> dict[str, Any]:
    """Return cores, CPU, kernel, memory, load averages and versions."""
    return {
        "cores": len(os.sched_getaffinity(0)),
        "cpu": _first("/proc/cpuinfo", "model name"),
        "kernel": platform.release(),
        "architecture": platform.machine(),
        "memory": _first("/proc/meminfo", "MemTotal"),
        "load": [round(value, 2) for value in os.getloadavg()],
        "python": platform.python_version(),
        "versions": {name: version for name in DISTRIBUTIONS if (version := _version(name)) is not None},
    }


def _first(path: str, field: str) -> str:
    """Return the value of the first `field: value` line, "" when there is none."""
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == field:
            return value.strip()
    return ""


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
