"""POSIX shared-memory files: open, create under the owner lock, remove. Descriptors are close-on-exec."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import posix_ipc

from bus.errors import ResourceError
from bus.memory import ofd

SHM_DIR = Path("/dev/shm")
CREATE_ATTEMPTS_MAX = 8


def _close_on_exec(memory: Any) -> int:
    fd: int = memory.fd
    os.set_inheritable(fd, False)
    return fd


def open_existing(name: str) -> int:
    """Open a shared-memory file for reading and writing; FileNotFoundError, PermissionError."""
    try:
        memory = posix_ipc.SharedMemory(name)
    except posix_ipc.ExistentialError as error:
        raise FileNotFoundError(f"segment {name} does not exist") from error
    except posix_ipc.PermissionsError as error:
        raise PermissionError(f"segment {name} belongs to another user") from error
    return _close_on_exec(memory)


def _open_new(name: str) -> int:
    try:
        memory = posix_ipc.SharedMemory(name, posix_ipc.O_CREX, mode=0o600)
    except posix_ipc.ExistentialError as error:
        raise FileExistsError(f"segment {name} exists") from error
    return _close_on_exec(memory)


def open_locked(name: str) -> int:
    """Create the file and take its owner lock, even if a sweeper looks at it at that moment."""
    for _ in range(CREATE_ATTEMPTS_MAX):
        fd = _open_new(name)
        if ofd.try_lock(fd) and names_file(name, fd):
            return fd
        if names_file(name, fd):
            unlink(name)
        os.close(fd)
    raise ResourceError(f"segment {name}: another process keeps taking its owner lock")


def names_file(name: str, fd: int) -> bool:
    """Tell whether `name` still leads to the open file `fd`."""
    try:
        named = (SHM_DIR / name[1:]).stat()
    except FileNotFoundError:
        return False
    opened = os.fstat(fd)
    return (named.st_dev, named.st_ino) == (opened.st_dev, opened.st_ino)


def unlink(name: str) -> None:
    """Remove the name if it exists."""
    with contextlib.suppress(posix_ipc.ExistentialError):
        posix_ipc.unlink_shared_memory(name)
