"""Wait strategies: how long a waiter burns its core before it sleeps in the kernel.

A waiter reads a doorbell's `seq`, looks for work, and if there is none waits until `seq` has moved on from
what it read. Nothing can be missed in between: whoever publishes work rings afterwards. The strategies
differ only in what they do meanwhile, and are objects handed to the waiter, never an `if` in a ring.

Measured here: a spinning waiter costs its peer 4-10 ms when both share a core, and a futex 20 us when they
do not. So the default is `Adaptive`: a bounded burst that yields the core, and that shrinks to nothing
where it wins nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

from bus.clock import NS_PER_S, Deadline, now_ns
from bus.memory import _native

if TYPE_CHECKING:
    from typing_extensions import Buffer

T = TypeVar("T")

PAUSE_ROUNDS = 40  # 1 to 2 us: longer than a cache line takes, shorter than a wake-up
LOOK_TIMES_MAX = 32
PROBE_EVERY = 64  # a burst that has shrunk to nothing is tried again once in so many waits


def next_look_ns(interval_ns: int, poll_ns: int) -> int:
    """Return how long to wait until the next look at owner locks when `interval_ns` was over without news.

    First `poll_ns`, then twice, 4 times, ... `LOOK_TIMES_MAX` times that: deaths are told by the kernel
    (bus/memory/deaths.py), and a waiter looks on its own only in case that they were not. As in _native.h.
    """
    return min(2 * interval_ns, LOOK_TIMES_MAX * poll_ns)


@dataclass(frozen=True, slots=True)
class Doorbell:
    """The pair {seq u32, sleepers u32} at `offset` of `buf`. Anyone may ring; any process may wait."""

    buf: Buffer
    offset: int

    def seq(self) -> int:
        """Return the current seq (acquire)."""
        return _native.load_u32(self.buf, self.offset)

    def ring(self) -> int:
        """Increment seq, wake whoever sleeps, return the new seq."""
        return _native.ring_doorbell(self.buf, self.offset)

    def wait(self, seen: int, spin_ns: int, timeout_ns: int) -> int:
        """Wait until seq differs from `seen`; return it (`seen` = timed out)."""
        return _native.wait_doorbell(self.buf, self.offset, seen, spin_ns, timeout_ns)


@dataclass(frozen=True, slots=True)
class LinkWait:
    """The same strategy for the ends of links, which wait in C (bus/memory/_native_wait.c) and learn per ring.

    `pause_rounds` polls without giving the core away and the GIL kept, then up to `yield_ns` of polls that give the
    core away, then sleep if `may_sleep`. For each kind of polling an end
    keeps a moving average of how often it won (weight 1/8 for the newest wait) and polls that way only while it
    wins one time in eight; otherwise it is probed after 32 waits, then 64, ... up to 4,096. Beside processes that
    compute, all ends of a process leave yields out, and the ends of a link join on a core.
    """

    pause_rounds: int
    yield_ns: int
    may_sleep: bool


class WaitStrategy(Protocol):
    """One waiter's way of waiting. One thread each: it may learn."""

    @property
    def link_wait(self) -> LinkWait:
        """How a link's end waits under this strategy."""

    def wait(self, bell: Doorbell, seen: int, timeout_ns: int) -> int:
        """Wait until `bell` differs from `seen`; return its seq (`seen` = timed out)."""


class Spin:
    """Poll without pause: only for measurements, on a core of its own; it starves a peer that shares it."""

    @property
    def link_wait(self) -> LinkWait:
        """See `WaitStrategy`."""
        return LinkWait(pause_rounds=1000, yield_ns=NS_PER_S, may_sleep=False)

    def wait(self, bell: Doorbell, seen: int, timeout_ns: int) -> int:
        """See `WaitStrategy`."""
        until = now_ns() + timeout_ns
        while (seq := bell.seq()) == seen and now_ns() < until:
            pass
        return seq


class Yielding:
    """Poll and give the core away between polls; never sleeps, so the system stays busy."""

    @property
    def link_wait(self) -> LinkWait:
        """See `WaitStrategy`."""
        return LinkWait(pause_rounds=0, yield_ns=NS_PER_S, may_sleep=False)

    def wait(self, bell: Doorbell, seen: int, timeout_ns: int) -> int:
        """See `WaitStrategy`."""
        return bell.wait(seen, timeout_ns, timeout_ns)


class Blocking:
    """Sleep in the kernel at once."""

    @property
    def link_wait(self) -> LinkWait:
        """See `WaitStrategy`."""
        return LinkWait(pause_rounds=0, yield_ns=0, may_sleep=True)

    def wait(self, bell: Doorbell, seen: int, timeout_ns: int) -> int:
        """See `WaitStrategy`."""
        return bell.wait(seen, 0, timeout_ns)


class Adaptive:
    """Poll for a bounded burst that learns whether it pays, then sleep in the kernel.

    The burst doubles (up to `spin_ns_max`) when the ring came while polling and halves when it did not; below
    `spin_ns_max` / 16 it is 0, and every `PROBE_EVERY`-th wait tries a full burst again.
    """

    def __init__(self, spin_ns_max: int) -> None:
        if spin_ns_max < 0:
            raise ValueError(f"spin_ns_max: {spin_ns_max} must not be negative")
        self.spin_ns_max = spin_ns_max
        self.spin_ns = spin_ns_max
        self._waits = 0

    @property
    def link_wait(self) -> LinkWait:
        """See `WaitStrategy`."""
        return LinkWait(PAUSE_ROUNDS if self.spin_ns_max else 0, self.spin_ns_max, may_sleep=True)

    def wait(self, bell: Doorbell, seen: int, timeout_ns: int) -> int:
        """See `WaitStrategy`."""
        self._waits += 1
        spin_ns = self.spin_ns
        if spin_ns == 0 and self._waits % PROBE_EVERY == 0:
            spin_ns = self.spin_ns_max
        start_ns = now_ns()
        seq = bell.wait(seen, spin_ns, timeout_ns)
        if spin_ns:
            self._learn(spin_ns, won=seq != seen and now_ns() - start_ns <= spin_ns)
        return seq

    def _learn(self, spin_ns: int, *, won: bool) -> None:
        if won:
            self.spin_ns = min(self.spin_ns_max, 2 * spin_ns)
        else:
            self.spin_ns = spin_ns // 2 if spin_ns // 2 > self.spin_ns_max // 16 else 0


def wait_until(
    probe: Callable[[], T | None],
    bell: Doorbell,
    strategy: WaitStrategy,
    deadline: Deadline,
    *,
    check: Callable[[], None],
    check_interval_ns: int,
    num_alarms: Callable[[], int] | None = None,
) -> T | None:
    """Call `probe` after every ring until it returns something; None when the deadline passed first.

    Args:
        probe: looks for work; returns None when there is none. Called at least once, also after the
        deadline. bell: rung by whoever makes work. strategy: how to wait. deadline: absolute, monotonic.
        check: called after `check_interval_ns` of waiting, however often the bell rings, then after twice that,
        ... (`next_look_ns`), and before the first sleep and whenever `num_alarms` returns another number, if it is
        given; raises to give up.

    Raises:
        Whatever `probe` or `check` raise.

    Blocks: yes; releases the GIL while waiting.
    """
    check_at_ns, interval_ns, alarms = 0, check_interval_ns, -1
    while True:
        seen = bell.seq()
        found = probe()
        if found is not None:
            return found
        now = now_ns()
        if now >= deadline.at_ns:
            return None
        if check_at_ns == 0:
            check_at_ns = now + interval_ns
        elif now >= check_at_ns:
            check()
            interval_ns = next_look_ns(interval_ns, check_interval_ns)
            check_at_ns = now + interval_ns
        if num_alarms is not None and (now_alarms := num_alarms()) != alarms:  # behind `seen`
            alarms = now_alarms
            check()
            continue
        strategy.wait(bell, seen, max(0, min(deadline.at_ns, check_at_ns) - now))
