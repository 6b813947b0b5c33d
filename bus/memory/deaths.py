"""Deaths as they happen: a process learns that an owner of a segment ended when it ends, and looks at no lock before.

Whoever dies closes its files, and the kernel tells those who watch them (inotify). The owner lock stays the only
truth: an event is a reason to look at it. So the survivors notice within a millisecond, sleep without a timer
meanwhile, and need no process ids, which mean nothing between containers.

    owner ends --> kernel closes its file --> event --> the watcher thread looks at the owner lock: free
               --> for each own segment: alarm + 1, ring the doorbell --> waiters wake and look at their peers' locks

The close is told just before the lock is freed, so a lock that is still held is looked at again after 1, 2, ... 16 ms.
Where the kernel gives no watch (limits, old file systems), the watcher itself looks at the locks, every
`FALLBACK_INTERVAL_NS`. Waiters look on their own, too, every `xccl.poll_interval_ms`: whatever the watcher misses is
noticed then.

One watcher per process. Its thread lives while the process has a segment of its own and maps one of others, and
sleeps in the kernel. It does not survive a fork; the child's first segment starts its own.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

from bus.clock import NS_PER_MS, now_ns
from bus.memory.inotify import ATTRIB, CLOSE_WRITE, OVERFLOW, Inotify

FALLBACK_INTERVAL_NS = 20 * NS_PER_MS
RECHECK_NS = tuple(ms * NS_PER_MS for ms in (1, 2, 4, 8, 16))
NO_LOOK_DUE = len(RECHECK_NS) + 1  # one at the event, and all of these


class Watched(Protocol):
    """A peer's segment: what the watcher needs of it."""

    @property
    def name(self) -> str:
        """Its name, which no other segment ever has."""

    def fileno(self) -> int:
        """Return a descriptor of its file."""

    def owner_alive(self) -> bool:
        """Tell whether the owner lock is held. One system call."""


class Alarmed(Protocol):
    """An own segment: whose waiters are to be told."""

    def sound_alarm(self) -> None:
        """Count one more death, and wake the waiters."""


@dataclass(slots=True)
class _File:
    """A watched file, which several mappings of a process may share."""

    peers: list[Watched]
    watch: int = -1  # of inotify; -1 = the kernel gave none
    num_looks: int = NO_LOOK_DUE  # since the last event
    look_at: int = 0  # the next one
    is_dead: bool = False


@dataclass(slots=True)
class DeathStats:
    """Counters of a process: events of watched files, owners found dead, looks that no event was the reason of."""

    num_events: int = 0
    num_deaths: int = 0
    num_fallback_looks: int = 0


@dataclass(slots=True)
class _Machinery:
    """What exists while the thread runs."""

    events: Inotify | None
    wake_read: int
    wake_write: int
    thread: threading.Thread | None = None
    must_stop: bool = False
    files_by_watch: dict[int, _File] = field(default_factory=dict)

    def close(self) -> None:
        """Give back what is open."""
        os.close(self.wake_read)
        os.close(self.wake_write)
        if self.events is not None:
            self.events.close()


def _open_inotify() -> Inotify | None:
    try:
        return Inotify()
    except OSError:  # no more instances, or a sandbox that forbids it
        return None


class DeathWatch:
    """Watches the owners of mapped segments and tells the own ones. Threads: any."""

    def __init__(self, open_events: Callable[[], Inotify | None] = _open_inotify) -> None:
        self._open_events = open_events
        self._lock = threading.RLock()  # a finaliser may close a segment while the watcher looks
        self._own: list[Alarmed] = []
        self._files: dict[str, _File] = {}
        self._machinery: _Machinery | None = None
        self._counts = DeathStats()

    def subscribe(self, own: Alarmed) -> None:
        """Tell `own` of deaths from now on."""
        with self._lock:
            self._own.append(own)
            self._start()

    def unsubscribe(self, own: Alarmed) -> None:
        """Tell it no longer; it is not touched once this returns. Idempotent."""
        with self._lock:
            self._own = [other for other in self._own if other is not own]
            stopping = self._stop()
        self._join(stopping)

    def watch(self, peer: Watched) -> None:
        """Watch the owner of `peer` from now on. One that is dead already may go unnoticed."""
        with self._lock:
            file = self._files.get(peer.name)
            if file is None or file.is_dead:
                file = self._files[peer.name] = _File([])
            file.peers.append(peer)
            self._start()
            if self._machinery is not None:
                self._add(self._machinery, file)

    def unwatch(self, peer: Watched) -> None:
        """Watch it no longer; it is not looked at once this returns. Idempotent."""
        with self._lock:
            file = self._files.get(peer.name)
            if file is None or peer not in file.peers:
                return
            file.peers.remove(peer)
            if not file.peers:
                del self._files[peer.name]
                self._drop(file)

    def stats(self) -> DeathStats:
        """Return a copy of the counters since the process began."""
        with self._lock:
            return replace(self._counts)

    def begin_anew(self) -> None:
        """Forget everything, in a forked child: the thread is the parent's, and so are the mappings."""
        machinery, self._machinery = self._machinery, None
        self._lock = threading.RLock()
        self._own, self._files, self._counts = [], {}, DeathStats()
        if machinery is not None:
            machinery.close()

    # ------------------------------------------------------------------ the thread's life; the lock is held

    def _start(self) -> None:
        if self._machinery is not None or not self._own or not self._files:
            return
        wake_read, wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        machinery = self._machinery = _Machinery(self._open_events(), wake_read, wake_write)
        for file in self._files.values():
            self._add(machinery, file)
        machinery.thread = threading.Thread(
            target=self._run, args=(machinery,), name="xds-deaths", daemon=True
        )
        machinery.thread.start()

    def _stop(self) -> _Machinery | None:
        machinery = self._machinery
        if machinery is None or self._own:
            return None
        self._machinery, machinery.must_stop = None, True
        self._wake(machinery)
        for file in self._files.values():
            file.watch = -1
        return machinery

    @staticmethod
    def _join(machinery: _Machinery | None) -> None:
        """Wait for its end without the lock, which it may want, and give back what it had open."""
        if machinery is None or machinery.thread is None:
            return
        if machinery.thread is not threading.current_thread():
            machinery.thread.join()
        machinery.close()

    @staticmethod
    def _wake(machinery: _Machinery) -> None:
        with contextlib.suppress(BlockingIOError):  # full of wake-ups that were not read yet
            os.write(machinery.wake_write, b"x")

    def _add(self, machinery: _Machinery, file: _File) -> None:
        if file.watch >= 0:
            return
        if machinery.events is not None:
            with contextlib.suppress(OSError):  # too many watches: then it is looked at
                file.watch = machinery.events.add(file.peers[0].fileno(), CLOSE_WRITE | ATTRIB)
                machinery.files_by_watch[file.watch] = file
        if file.watch < 0:
            self._wake(machinery)

    def _drop(self, file: _File) -> None:
        machinery = self._machinery
        if machinery is not None and machinery.events is not None and file.watch >= 0:
            machinery.events.remove(file.watch)
            machinery.files_by_watch.pop(file.watch, None)

    # ------------------------------------------------------------------ in the thread

    def _run(self, machinery: _Machinery) -> None:
        poll = select.poll()
        poll.register(machinery.wake_read, select.POLLIN)
        if machinery.events is not None:
            poll.register(machinery.events, select.POLLIN)
        timeout_ms: float | None = None
        while True:
            poll.poll(timeout_ms)
            with self._lock:
                if machinery.must_stop:
                    return
                with contextlib.suppress(BlockingIOError):
                    os.read(machinery.wake_read, 4096)
                timeout_ms = self._look(machinery)

    def _look(self, machinery: _Machinery) -> float | None:
        """Look at the locks that there is a reason to look at, sound the alarm; return when to look again, ms."""
        now = now_ns()
        for watch, mask in machinery.events.read() if machinery.events is not None else ():
            self._counts.num_events += 1
            lost = mask & OVERFLOW
            for file in self._files.values() if lost else filter(None, [machinery.files_by_watch.get(watch)]):
                file.num_looks, file.look_at = 0, now
        num_deaths = sum(self._has_died(file, now) for file in tuple(self._files.values()))
        if num_deaths:
            self._counts.num_deaths += num_deaths
            for own in tuple(self._own):
                own.sound_alarm()
        return self._next_look_ms(now)

    def _has_died(self, file: _File, now: int) -> bool:
        if file.is_dead or not self._is_due(file, now) or any(peer.owner_alive() for peer in file.peers):
            return False
        file.is_dead = True
        return True

    def _is_due(self, file: _File, now: int) -> bool:
        if file.watch < 0:
            self._counts.num_fallback_looks += 1
            return True
        if file.num_looks == NO_LOOK_DUE or now < file.look_at:
            return False
        if file.num_looks < len(RECHECK_NS):
            file.look_at = now + RECHECK_NS[file.num_looks]
        file.num_looks += 1
        return True

    def _next_look_ms(self, now: int) -> float | None:
        living = [file for file in self._files.values() if not file.is_dead]
        waits = [file.look_at - now for file in living if file.num_looks != NO_LOOK_DUE]
        waits += [FALLBACK_INTERVAL_NS for file in living if file.watch < 0][:1]
        return max(0.0, min(waits) / NS_PER_MS) if waits else None


deaths = DeathWatch()  # of this process


os.register_at_fork(after_in_child=deaths.begin_anew)
