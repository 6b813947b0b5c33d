"""Processes that use the cores up, to measure beside."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# Ends by itself should the harness be gone.
_LOOP = "import os, sys\nos.nice(int(sys.argv[1]))\nparent = os.getppid()\nprint(flush=True)\n" + (
    "while os.getppid() == parent:\n    for _ in range(100_000): pass"
)


@contextmanager
def busy(count: int, nice: int) -> Iterator[None]:
    """Run `count` busy loops at that nice value for the length of the block."""
    command = [sys.executable, "-c", _LOOP, str(nice)]
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for _ in range(count):
            processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True))
        for process in processes:
            assert process.stdout is not None
            process.stdout.readline()
        yield
    finally:
        for process in processes:
            process.kill()
            process.communicate()
