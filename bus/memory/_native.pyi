"""Atomics, futexes, doorbells, cells and copies over shared memory.

`buf` is anything with a contiguous buffer (mmap, memoryview, bytearray, array); offsets are bytes from its
start. Errors of every call: IndexError (range outside the buffer), ValueError (unaligned offset, value
outside the word), BufferError (a store into a read-only buffer), TypeError. Nothing was touched then.
Durations are nanoseconds >= 0. Waits release the GIL and run Python signal handlers when interrupted.
"""

from typing import Any, TypeAlias

import numpy.typing as npt
from typing_extensions import Buffer as _Buffer

# The stubs of NumPy do not declare arrays as buffers before Python 3.12.
Buffer: TypeAlias = _Buffer | npt.NDArray[Any]

def load_u32(buf: Buffer, offset: int, /) -> int:
    """Acquire load."""

def load_u64(buf: Buffer, offset: int, /) -> int:
    """Acquire load."""

def store_u32(buf: Buffer, offset: int, value: int, /) -> None:
    """Release store."""

def store_u64(buf: Buffer, offset: int, value: int, /) -> None:
    """Release store."""

def fetch_add_u32(buf: Buffer, offset: int, delta: int, /) -> int:
    """Add, wrapping, sequentially consistent; return the old value."""

def fetch_add_u64(buf: Buffer, offset: int, delta: int, /) -> int:
    """Add, wrapping, sequentially consistent; return the old value."""

def cas_u32(buf: Buffer, offset: int, expected: int, desired: int, /) -> bool:
    """Compare and swap, sequentially consistent; tell whether it swapped."""

def futex_wait(buf: Buffer, offset: int, expected: int, timeout_ns: int, /) -> bool:
    """Sleep while the u32 equals `expected`. True: woken (may be spurious) or it differs; False: timeout."""

def futex_wake(buf: Buffer, offset: int, count: int, /) -> int:
    """Wake up to `count` sleepers of the u32, in any process; return how many."""

def wait_u32(buf: Buffer, offset: int, expected: int, spin_ns: int, timeout_ns: int, /) -> int:
    """Spin up to `spin_ns`, then sleep, until the u32 differs; return its value (`expected` = timed out).

    The writer must `futex_wake` after its store; use a doorbell where it should do so only if someone sleeps.
    """

def ring_doorbell(buf: Buffer, offset: int, /) -> int:
    """Increment `seq` at `offset`, wake all sleepers if `sleepers` at `offset + 4` is nonzero; return seq."""

def wait_doorbell(buf: Buffer, offset: int, seen: int, spin_ns: int, timeout_ns: int, /) -> int:
    """Spin up to `spin_ns`, then sleep, until `seq` differs from `seen`; return it (`seen` = timed out)."""

def write_cell(buf: Buffer, offset: int, w0: int, w1: int, w2: int, w3: int, /) -> None:
    """Publish four u64 at a 32-byte aligned offset; `w0` is the sequence word.

    One writer. NOTE: `w0` must be nonzero and differ from the previous one, or a reader cannot see that the
    cell changed under it.
    """

def read_cell(buf: Buffer, offset: int, /) -> tuple[int, int, int, int] | None:
    """Return a consistent copy of the cell; None when it is empty (`w0` = 0) or being written."""

def copy(dst: Buffer, dst_offset: int, src: Buffer, src_offset: int, num_bytes: int, /) -> None:
    """Copy bytes; overlapping ranges behave like memmove. Releases the GIL from 16 KiB on."""
