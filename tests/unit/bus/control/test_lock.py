from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bus.control.lock import LockWatch, Owner, OwnerLock, is_locked, read_owner, signal_owner
from bus.errors import ResourceError

HOLDER = """
import sys
from pathlib import Path
from bus.control.lock import OwnerLock
lock = OwnerLock.acquire(Path(sys.argv[1]))
print(lock.incarnation, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "expert-2.lock"


@pytest.fixture
def holder(path: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdin is not None
    assert process.stdout.readline() == "1\n"
    yield process
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()


def test_incarnations_grow_and_never_repeat(path: Path) -> None:
    for expected in (1, 2, 3):
        lock = OwnerLock.acquire(path)
        assert lock.incarnation == expected
        assert read_owner(path) == Owner(expected, os.getpid())
        lock.release()
        lock.release()


def test_a_second_owner_is_told_who_runs(path: Path) -> None:
    lock = OwnerLock.acquire(path)
    with pytest.raises(
        ResourceError, match=f"expert-2 is already running .pid {os.getpid()}, incarnation 1."
    ):
        OwnerLock.acquire(path)
    assert read_owner(path) == Owner(1, os.getpid())  # the failed attempt changed nothing
    lock.release()


def test_looking_takes_nothing(path: Path) -> None:
    assert not is_locked(path)
    assert read_owner(path) is None
    watch = LockWatch(path)
    assert watch.look() == (False, None)
    lock = OwnerLock.acquire(path)
    assert is_locked(path) and is_locked(path)  # closing a look's descriptor does not drop the owner's lock
    assert watch.look() == (True, Owner(1, os.getpid()))
    lock.release()
    assert watch.look() == (False, Owner(1, os.getpid()))
    path.unlink()
    assert watch.look() == (False, None)
    other = OwnerLock.acquire(path)
    assert watch.look() == (True, Owner(1, os.getpid()))
    other.release()
    watch.close()
    watch.close()


def test_a_kill_frees_the_lock(path: Path, holder: subprocess.Popen[str]) -> None:
    assert is_locked(path)
    holder.kill()
    holder.wait()
    assert not is_locked(path)
    lock = OwnerLock.acquire(path)
    assert lock.incarnation == 2
    lock.release()


def test_a_lock_file_replaced_meanwhile_is_not_taken_for_the_new_one(path: Path) -> None:
    lock = OwnerLock.acquire(path)
    path.unlink()
    other = OwnerLock.acquire(path)  # another file, another life
    assert other.incarnation == 1
    lock.release()
    assert is_locked(path)
    other.release()


def test_a_lock_file_is_private(path: Path) -> None:
    lock = OwnerLock.acquire(path)
    assert path.stat().st_mode & 0o777 == 0o600
    lock.release()


def test_a_foreign_file_is_refused(path: Path) -> None:
    path.write_text("something else")
    with pytest.raises(ResourceError, match="holds"):
        OwnerLock.acquire(path)
    assert not is_locked(path)
    with pytest.raises(ResourceError):
        read_owner(path)


def test_a_link_is_not_followed(path: Path, tmp_path: Path) -> None:
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ResourceError):
        OwnerLock.acquire(path)
    assert not (tmp_path / "elsewhere").exists()


def test_a_signal_reaches_the_owner(path: Path, holder: subprocess.Popen[str]) -> None:
    assert signal_owner(path, holder.pid, signal.SIGKILL)
    assert holder.wait() == -signal.SIGKILL
    assert not signal_owner(path, holder.pid, signal.SIGKILL)


def test_a_signal_reaches_nobody_but_the_owner(path: Path, holder: subprocess.Popen[str]) -> None:
    watch = LockWatch(path)
    watch.look()
    assert not signal_owner(
        path, os.getpid(), signal.SIGKILL
    )  # alive, and has the file open, but is not the owner
    watch.close()
    assert not signal_owner(path.with_name("none.lock"), holder.pid, signal.SIGKILL)
    assert not signal_owner(path, 2**22 + 1, signal.SIGKILL)  # no such process
    assert holder.poll() is None
