"""The watcher of deaths: told by the kernel, by its own looks where the kernel tells nothing, gone with its work."""

from __future__ import annotations

import functools
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from bus.memory import deaths as module
from bus.memory.deaths import RECHECK_NS, DeathWatch
from bus.memory.inotify import CLOSE_WRITE, OVERFLOW, Inotify
from bus.memory.layout import SegmentLayout
from bus.memory.segment import Segment, segment_name
from tests.harness import poll

eventually = functools.partial(poll.eventually, timeout_s=30, interval_s=0.002)
LAYOUT = SegmentLayout(4, 4096, 4096)


class Own:
    """Stands in for the own segment: counts alarms."""

    def __init__(self) -> None:
        self.alarms = 0

    def sound_alarm(self) -> None:
        self.alarms += 1


class Peer:
    """Stands in for a peer's segment: its owner lives for so many looks more."""

    def __init__(self, fd: int, looks_left: int) -> None:
        self.name, self.looks_left, self.num_looks = "/xds-stand-in", looks_left, 0
        self._fd = fd

    def fileno(self) -> int:
        return self._fd

    def owner_alive(self) -> bool:
        self.num_looks += 1
        self.looks_left -= 1
        return self.looks_left >= 0


class Queue(Inotify):
    """Events that a test makes up, beside the kernel's."""

    def __init__(self) -> None:
        super().__init__()
        self.made_up: list[tuple[int, int]] = []

    def read(self) -> list[tuple[int, int]]:
        found = [*super().read(), *self.made_up]
        self.made_up.clear()
        return found


@pytest.fixture
def watch(request: pytest.FixtureRequest) -> Iterator[DeathWatch]:
    """A watch of its own."""
    made = DeathWatch(*([request.param] if hasattr(request, "param") else []))
    yield made
    for own in tuple(made._own):
        made.unsubscribe(own)


@pytest.fixture
def file(tmp_path) -> Iterator[int]:  # type: ignore[no-untyped-def]
    """A file that can be watched."""
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    yield fd
    os.close(fd)


def touch(fd: int) -> None:
    """Make an event of the file of `fd`."""
    os.close(os.open(f"/proc/self/fd/{fd}", os.O_RDWR))


def start_owner(name: str) -> tuple[int, int]:
    """Fork a process that owns a segment until it is killed or its pipe is closed; return its pid and that pipe."""
    told, tell = os.pipe()
    hold, held = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(held)
        segment = Segment.create(name, LAYOUT, service="expert", index=0, incarnation=1)
        os.write(tell, b"there")
        os.read(hold, 1)
        os._exit(0 if segment.owner_alive() else 1)
    os.close(hold)
    os.close(tell)
    assert os.read(told, 8) == b"there"
    os.close(told)
    return pid, held


@pytest.mark.parametrize("how", ["killed", "ended"])
def test_the_end_of_an_owner_sounds_the_alarm_once(pod: str, how: str) -> None:
    own = Segment.create(segment_name(pod, "expert", 1, 1), LAYOUT, service="expert", index=1, incarnation=1)
    name = segment_name(pod, "expert", 0, 1)
    pid, held = start_owner(name)
    peer = Segment.attach(name)
    seq, looks = own.doorbell_seq(), module.deaths.stats().num_fallback_looks
    assert own.num_alarms() == 0
    if how == "killed":
        os.kill(pid, signal.SIGKILL)
    os.close(held)
    os.waitpid(pid, 0)
    eventually(lambda: own.num_alarms() == 1)
    assert own.doorbell_seq() == seq + 1
    assert not peer.owner_alive()
    assert module.deaths.stats().num_fallback_looks == looks  # the kernel told it
    peer.unlink()
    peer.close()
    own.unlink()
    own.close()


@pytest.mark.parametrize("watch", [lambda: None], indirect=True, ids=["no-inotify"])
def test_without_events_it_looks_itself(watch: DeathWatch, file: int) -> None:
    own, peer = Own(), Peer(file, looks_left=2)
    watch.subscribe(own)
    watch.watch(peer)
    eventually(lambda: own.alarms == 1)
    assert peer.num_looks == 3
    assert watch.stats().num_fallback_looks == 3
    assert watch.stats().num_events == 0


def test_a_lock_that_is_still_held_at_the_event_is_looked_at_again(watch: DeathWatch, file: int) -> None:
    """The kernel tells of a close just before it frees the lock."""
    own, peer = Own(), Peer(file, looks_left=len(RECHECK_NS))
    watch.subscribe(own)
    watch.watch(peer)
    assert peer.num_looks == 0
    touch(file)
    eventually(lambda: own.alarms == 1)
    assert peer.num_looks == len(RECHECK_NS) + 1


def test_somebody_elses_close_is_no_alarm(watch: DeathWatch, file: int) -> None:
    own, peer = Own(), Peer(file, looks_left=1000)
    watch.subscribe(own)
    watch.watch(peer)
    touch(file)
    eventually(lambda: peer.num_looks == len(RECHECK_NS) + 1)
    touch(file)
    eventually(lambda: peer.num_looks == 2 * (len(RECHECK_NS) + 1))
    assert own.alarms == 0
    assert watch.stats().num_deaths == 0


def test_lost_events_are_a_reason_to_look_at_all(file: int) -> None:
    queue = Queue()
    watch = DeathWatch(lambda: queue)
    own, peer = Own(), Peer(file, looks_left=0)
    watch.subscribe(own)
    watch.watch(peer)
    queue.made_up.append((-1, OVERFLOW))
    os.write(watch._machinery.wake_write, b"x")  # type: ignore[union-attr]
    eventually(lambda: own.alarms == 1)
    watch.unsubscribe(own)


def test_all_own_segments_hear_it_and_those_that_have_left_do_not(watch: DeathWatch, file: int) -> None:
    first, second, gone = Own(), Own(), Own()
    for own in (first, second, gone):
        watch.subscribe(own)
    watch.unsubscribe(gone)
    watch.watch(Peer(file, looks_left=0))
    touch(file)
    eventually(lambda: first.alarms == second.alarms == 1)
    assert gone.alarms == 0


def test_who_is_watched_no_longer_is_not_looked_at(watch: DeathWatch, file: int) -> None:
    own, peer = Own(), Peer(file, looks_left=0)
    watch.subscribe(own)
    watch.watch(peer)
    watch.unwatch(peer)
    touch(file)
    watch.watch(other := Peer(file, looks_left=0))
    touch(file)
    eventually(lambda: own.alarms == 1)
    assert (peer.num_looks, other.num_looks) == (0, 1)
    watch.unwatch(peer)  # again


def test_thread_and_descriptors_live_as_long_as_there_is_an_own_segment(watch: DeathWatch, file: int) -> None:
    before, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    peer, first, second = Peer(file, 1000), Own(), Own()
    watch.watch(peer)
    assert threading.active_count() == threads  # nobody is to be told
    watch.subscribe(first)
    watch.subscribe(second)
    assert threading.active_count() == threads + 1
    watch.unsubscribe(first)
    assert threading.active_count() == threads + 1
    watch.unsubscribe(second)
    watch.unsubscribe(second)
    assert threading.active_count() == threads
    assert len(os.listdir("/proc/self/fd")) == before
    watch.subscribe(first)
    touch(file)
    eventually(lambda: peer.num_looks > 0)  # watched again, with all that were there


def test_a_forked_child_begins_anew(watch: DeathWatch, file: int) -> None:
    own, peer = Own(), Peer(file, 1000)
    watch.subscribe(own)
    watch.watch(peer)
    machinery = watch._machinery
    assert machinery is not None
    assert machinery.events is not None
    inherited = (machinery.wake_read, machinery.wake_write, machinery.events.fileno())
    pid = os.fork()
    if pid == 0:
        watch.begin_anew()
        num_open = sum(Path(f"/proc/self/fd/{fd}").exists() for fd in inherited)
        is_new = watch._machinery is None and not watch._own and not watch._files
        os._exit(0 if is_new and num_open == 0 else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert own.alarms == 0


def test_inotify_names_the_error(file: int) -> None:
    queue = Inotify()
    with pytest.raises(OSError, match="inotify_add_watch"):
        queue.add(-1, CLOSE_WRITE)
    assert queue.read() == []
    number = queue.add(file, CLOSE_WRITE)
    assert queue.add(file, CLOSE_WRITE) == number
    touch(file)
    assert queue.read() == [(number, CLOSE_WRITE)]
    queue.remove(number)
    touch(file)
    assert queue.read() == []
    queue.close()
    queue.close()
