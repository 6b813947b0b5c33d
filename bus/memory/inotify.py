"""Events of files from the kernel: the three calls of inotify that the standard library lacks.

`read` returns at once; `fileno` can be polled. One thread.
"""

from __future__ import annotations

import ctypes
import os
import struct

CLOSE_WRITE = 0x00000008  # an open file that could be written was closed, by its process or by that one's end
ATTRIB = 0x00000004  # also: a name of it was removed
OVERFLOW = 0x00004000  # events were lost
_IGNORED = 0x00008000

_EVENT = struct.Struct("=iIII")  # watch, mask, cookie, length of the name behind it
_READ_BYTES = 64 * 1024

_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int, what: str) -> int:
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")
    return result


class Inotify:
    """One queue of events. OSError: the system gives no more of them (fs.inotify.max_user_instances) or forbids it."""

    def __init__(self) -> None:
        self._fd = _checked(_libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK), "inotify_init1")

    def fileno(self) -> int:
        """Return the descriptor, for `select.poll`."""
        return self._fd

    def add(self, fd: int, mask: int) -> int:
        """Watch the file that is open as `fd` for the events of `mask`; return the number of the watch.

        Whatever its names are by now. A file that is watched already keeps its number. OSError: too many watches.
        """
        path = f"/proc/self/fd/{fd}"
        return _checked(
            _libc.inotify_add_watch(self._fd, path.encode(), ctypes.c_uint32(mask)),
            f"inotify_add_watch {path}",
        )

    def remove(self, watch: int) -> None:
        """Watch it no longer; ignored where the file is gone."""
        _libc.inotify_rm_watch(self._fd, watch)

    def read(self) -> list[tuple[int, int]]:
        """Return (watch, mask) of all events that wait; (-1, OVERFLOW) says that some were lost."""
        try:
            data = os.read(self._fd, _READ_BYTES)
        except BlockingIOError:
            return []
        events, at = [], 0
        while at < len(data):
            watch, mask, _, name_bytes = _EVENT.unpack_from(data, at)
            at += _EVENT.size + name_bytes
            if not mask & _IGNORED:
                events.append((watch, mask))
        return events

    def close(self) -> None:
        """Give it back. Safe to call twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
