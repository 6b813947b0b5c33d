"""Owner locks: who lives, and which incarnation it is.

Every member holds a write lock on one byte range of its own file for its whole life. The lock belongs to the
open file description (`F_OFD_SETLK`), so the kernel drops it at the very moment the process ends, however it
ends, and a process cannot lose it by closing another descriptor of the same file. Others ask with
`F_OFD_GETLK`, which takes nothing. Unlike a process id, a lock is never reused and means the same in every
container that shares the folder.

The file holds `<incarnation> <pid>`. A new owner writes the last incarnation plus one, so an incarnation
never repeats as long as the file lives. No `fsync`: the number need not outlive the machine.
"""

from __future__ import annotations

import contextlib
import os
import signal
from dataclasses import dataclass
from pathlib import Path

from bus.errors import ResourceError
from bus.memory import ofd

_RECORD_BYTES = 32  # fixed width, so that one write replaces the whole record
_ACQUIRE_ATTEMPTS_MAX = 100


@dataclass(frozen=True, slots=True)
class Owner:
    """What a lock file says about its present or last owner."""

    incarnation: int
    pid: int  # in the owner's own pid namespace


class OwnerLock:
    """The write lock of one member, held until `release` or the end of the process."""

    def __init__(self, path: Path, fd: int, incarnation: int) -> None:
        self.path = path
        self.incarnation = incarnation
        self._fd = fd

    @classmethod
    def acquire(cls, path: Path) -> OwnerLock:
        """Take the lock of `path` (created if absent, mode 0600) and become its next incarnation.

        Raises:
            ResourceError: another process holds it (the text names it), or the file cannot be used.
        """
        for _ in range(_ACQUIRE_ATTEMPTS_MAX):
            fd = _open(path)
            try:
                if not ofd.try_lock(fd):
                    raise _already_running(path)
                if _is_same_file(fd, path):  # else: a stopping pod has just unlinked it; take the new file
                    incarnation = _read_record(fd, path).incarnation + 1
                    os.pwrite(fd, f"{incarnation} {os.getpid()}".ljust(_RECORD_BYTES - 1).encode() + b"\n", 0)
                    return cls(path, fd, incarnation)
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)
        raise ResourceError(f"{path}: the lock file keeps being replaced")

    def release(self) -> None:
        """Give the lock back. The file stays, with the incarnation in it. Safe to call twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class LockWatch:
    """Looks at one lock again and again, cheaply: the file stays open between looks."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = -1

    def look(self) -> tuple[bool, Owner | None]:
        """Return whether a living process holds the lock, and what the file says of its last owner.

        Takes nothing, never blocks. While a new owner is just taking over, the record may still be the one
        before. The owner is None when there is no file or no owner yet.

        Raises:
            ResourceError: the file holds something else than an owner's record.
        """
        if self._fd >= 0 and os.fstat(self._fd).st_nlink == 0:
            self.close()  # somebody removed the file: there may be a new one
        if self._fd < 0 and not self._open():
            return False, None
        # The record first: a successor that takes over in between is then at worst reported under its
        # predecessor's number, never as a dead new incarnation.
        owner = _read_record(self._fd, self._path)
        held = ofd.is_locked(self._fd)
        return held, owner if owner.incarnation else None

    def close(self) -> None:
        """Close the file. Safe to call twice; a later look opens it again."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _open(self) -> bool:
        with contextlib.suppress(FileNotFoundError):
            self._fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        return self._fd >= 0


def is_locked(path: Path) -> bool:
    """Tell whether a living process holds the lock of `path`; takes nothing, never blocks."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        return ofd.is_locked(fd)
    finally:
        os.close(fd)


def read_owner(path: Path) -> Owner | None:
    """Return what the file says of its present or last owner; as the second value of `LockWatch.look`."""
    watch = LockWatch(path)
    try:
        return watch.look()[1]
    finally:
        watch.close()


def signal_owner(path: Path, pid: int, signal_number: int) -> bool:
    """Send a signal to process `pid` if, and only if, that very process holds the lock of `path`.

    Process ids of another container's namespace, and ids that were used again, are thereby never signalled.

    Returns:
        False when the process is gone or is not the owner; nothing was sent.

    Raises:
        PermissionError: the owner belongs to another user.
    """
    try:
        pid_fd = os.pidfd_open(pid)
    except (ProcessLookupError, ValueError, OSError):
        return False
    try:
        if not (is_locked(path) and _holds_lock(pid, path)):
            return False
        signal.pidfd_send_signal(pid_fd, signal_number)
    except ProcessLookupError:
        return False
    finally:
        os.close(pid_fd)
    return True


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise ResourceError(f"lock file {path}: {error.strerror}") from None


def _is_same_file(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False


def _read_record(fd: int, path: Path) -> Owner:
    text = os.pread(fd, _RECORD_BYTES, 0).decode("ascii", "replace").split()
    if not text:
        return Owner(incarnation=0, pid=0)
    if len(text) != 2 or not all(word.isdecimal() for word in text):
        raise ResourceError(f"lock file {path}: holds {' '.join(text)!r}, not `<incarnation> <pid>`")
    return Owner(incarnation=int(text[0]), pid=int(text[1]))


def _already_running(path: Path) -> ResourceError:
    owner = read_owner(path)
    who = f" (pid {owner.pid}, incarnation {owner.incarnation})" if owner else ""
    return ResourceError(f"{path.stem} is already running{who}: {path} is locked")


def _holds_lock(pid: int, path: Path) -> bool:
    with contextlib.suppress(OSError):
        wanted = path.stat()
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):  # a descriptor may be closed while we look
                if os.path.samestat(entry.stat(), wanted):
                    details = Path(f"/proc/{pid}/fdinfo/{entry.name}").read_text("ascii")
                    if "OFDLCK" in details:  # else it only looks at the lock, as the manager does
                        return True
    return False
