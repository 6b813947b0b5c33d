"""Shared memory that a peer's library names by itself: noted by who maps it, removed with the run's folder.

MPICH removes its segment when its ranks end by themselves; when they are killed it stays, and nothing in its name says
whose it was. So each rank writes into the run's folder what it maps.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

SHM = Path("/dev/shm")
_NOTE = "shared-"


def note_mapped(folder: Path, prefix: str) -> None:
    """Note in `folder` which files of /dev/shm whose names begin with `prefix` this process maps now."""
    found = set()
    for line in Path("/proc/self/maps").read_text().splitlines():
        *_, inode, path = line.split(maxsplit=5)
        if path.startswith(f"{SHM}/{prefix}") and Path(path).exists():
            found.add(f"{inode} {Path(path).name}\n")
    (folder / f"{_NOTE}{os.getpid()}").write_text("".join(sorted(found)))


def remove_noted(folder: Path) -> None:
    """Remove what was noted in `folder`, if it is still the same file; the processes that mapped it have ended."""
    for note in folder.glob(f"{_NOTE}*"):
        for line in note.read_text().splitlines():
            inode, name = line.split(maxsplit=1)
            path = SHM / Path(name).name
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_ino == int(inode):
                    path.unlink()
