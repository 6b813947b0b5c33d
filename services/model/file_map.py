"""Read-only mappings of byte ranges of a file.

`mmap.mmap` keeps a duplicated file descriptor per mapping; an expert worker maps hundreds of separate ranges,
so this asks the C library directly and needs no descriptor once mapped. A mapping lives as long as an array
that views it.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from typing import Any

import numpy as np
import numpy.typing as npt

from bus.errors import ResourceError

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int64,
]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

_MAP_FAILED = ctypes.c_void_p(-1).value


def page_run(start: int, end: int) -> tuple[int, int]:
    """Return the smallest page-aligned range that covers start .. end."""
    page = mmap.PAGESIZE
    return start // page * page, -(-end // page) * page


def map_range(fd: int, start: int, end: int) -> npt.NDArray[np.uint8]:
    """Map bytes start .. end of a file, `start` page-aligned, as a read-only uint8 array.

    The kernel is asked to read ahead. `fd` may be closed afterwards. The file must not shrink while mapped.

    Raises:
        ResourceError: the system refused (address space, number of mappings).
    """
    num_bytes = end - start
    address: Any = _libc.mmap(None, num_bytes, mmap.PROT_READ, mmap.MAP_SHARED, fd, start)
    if address == _MAP_FAILED:
        reason = os.strerror(ctypes.get_errno())
        raise ResourceError(f"cannot map {num_bytes} bytes of a checkpoint: {reason}")
    _libc.madvise(address, num_bytes, mmap.MADV_WILLNEED)
    memory = (ctypes.c_uint8 * num_bytes).from_address(address)
    finalizer = weakref.finalize(memory, _libc.munmap, address, num_bytes)
    finalizer.atexit = False
    array: npt.NDArray[np.uint8] = np.frombuffer(memoryview(memory), dtype=np.uint8)
    array.flags.writeable = False
    return array
