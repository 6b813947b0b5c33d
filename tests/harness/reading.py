"""Whether one process may read another's memory here."""

from __future__ import annotations

import ctypes
import os

NO_READING = "no process may read another's memory here: large arrays go through the ring"


def can_read_processes() -> bool:
    """Whether the system has process_vm_readv and allows it: an emulator may lack it, a container forbid it."""
    libc, source, target = ctypes.CDLL(None, use_errno=True), ctypes.c_uint64(7), ctypes.c_uint64()
    if not hasattr(libc, "process_vm_readv"):
        return False
    remote, local = ((ctypes.c_size_t * 2)(ctypes.addressof(word), 8) for word in (source, target))
    libc.process_vm_readv(os.getpid(), local, ctypes.c_ulong(1), remote, ctypes.c_ulong(1), ctypes.c_ulong(0))
    return target.value == source.value
