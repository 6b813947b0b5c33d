"""Open-file-description locks: the owner token of segments and members.

The kernel frees such a lock when the last descriptor of the open file is closed, so also on SIGKILL; it is
not tied to a process id, so it works between containers that share the file. Asking whether it is held
takes nothing. NOTE: a descriptor inherited by a child keeps the lock; every descriptor that holds one must
be close-on-exec.
"""

from __future__ import annotations

import fcntl
import struct

# struct flock of 64-bit Linux: type, whence, (padding), start, len, pid, (padding); zeros = whole file.
_FLOCK = struct.Struct("@hhqqi0q")


def _request(lock_type: int) -> bytes:
    return _FLOCK.pack(lock_type, 0, 0, 0, 0)


def try_lock(fd: int) -> bool:
    """Take the write lock on the whole file without waiting; False when another open file holds it.

    `fd` must be open for writing. Taking a lock that this very open file holds succeeds.
    """
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _request(fcntl.F_WRLCK))
    except (BlockingIOError, PermissionError):
        return False
    return True


def unlock(fd: int) -> None:
    """Give the lock back; a no-op when this open file holds none."""
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _request(fcntl.F_UNLCK))


def is_locked(fd: int) -> bool:
    """Tell whether another open file than this one holds the lock. One system call, takes nothing."""
    answer: bytes = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _request(fcntl.F_WRLCK))
    lock_type: int = _FLOCK.unpack(answer)[0]
    return lock_type != fcntl.F_UNLCK
