"""Processes that use the cores up, to measure beside."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# Ends by itself should the harness be gone.
_LOOP = """
import os, sys
os.setpriority(os.PRIO_PROCESS, 0, int(sys.argv[1]))
parent = os.getppid()
print(flush=True)
while os.getppid() == parent:
    for _ in range(100_000): pass
"""


@contextmanager
def busy(count: int, nice: int) -> Iterator[None]:
    """Run `count` busy loops at that nice value for the length of the block.

    PermissionError: the harness has a higher one, and may not lower it.
    """
    command = [sys.executable, "-c", _LOOP, str(nice)]
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for _ in range(count):
            # In our session, as the processes of the ways: with autogroup a nice value counts within its session only.
            processes.append(
                subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, process_group=0)
            )
        for process in processes:
            assert process.stdout is not None
            if not process.stdout.readline():
                raise PermissionError(f"a busy process may not have the nice value {nice}: ours is higher")
        yield
    finally:
        for process in processes:
            process.kill()
            process.communicate()
