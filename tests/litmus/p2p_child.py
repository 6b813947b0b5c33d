"""One end of a link, in a process that dies at a fault point: `p2p_child.py ROLE POD INCARNATION PEER_SEGMENT ...`.

Messages: event 1 says which incarnation sent it, event 2 travels when the fault point is armed, event 3 follows.
"""

from __future__ import annotations

import os
import signal
import sys

import numpy as np

from bus.clock import Deadline
from bus.config import XcclConfig
from bus.memory.ring import Position, RingLayout
from bus.memory.wait import WaitStrategy, Yielding
from bus.xccl.endpoint import Endpoint, Rank, World
from bus.xccl.p2p import P2p, SlowP2p

WORLD = World.of(attention=1, expert=1)
SENDER, RECEIVER = WORLD.ranks
RING = RingLayout(num_slots=4, slot_bytes=256)
LIVING = "none"
REPEATS = 200  # of the second message by `repeating_sender`


def endpoint_of(me: Rank, pod: str, incarnation: int, strategy: WaitStrategy | None = None) -> Endpoint:
    """Open the endpoint of `me`; the other rank may send to it."""
    return Endpoint(
        pod=pod,
        world=WORLD,
        me=me,
        incarnation=incarnation,
        config=XcclConfig(num_lanes=2, poll_interval_ms=120_000),  # deaths are told by the kernel
        p2p_peers=[peer for peer in WORLD.ranks if peer != me],
        p2p_ring=RING,
        app_bytes=1 << 16,
        strategy=strategy,
    )


def first_message(incarnation: int) -> np.ndarray:
    """Event 1: the sender's incarnation, in more chunks than one."""
    return np.full(100, incarnation, np.int64)


def second_message(num_bytes: int) -> np.ndarray:
    """Event 2."""
    return (np.arange(num_bytes) % 251).astype(np.uint8)


LAST_MESSAGE = np.arange(3)


def soon() -> Deadline:
    return Deadline.after_ms(60_000)


def say(*words: object) -> None:
    print(*words, flush=True)


def die(point: str) -> None:
    """End this process as a fault point in C does."""
    say("fault", point)
    os.kill(os.getpid(), signal.SIGKILL)


def leave_lock() -> None:
    """Make a process that holds this one's descriptors, and so its lock, until stdin says or closes."""
    if os.fork() == 0:
        sys.stdin.readline()
        os._exit(0)


def arm(point: str) -> None:
    """Die at this fault point of the extension from now on (see bus/memory/_fault.h)."""
    os.environ["XDS_FAULT_POINT"] = point


class KillingPosition:
    """A ring position that ends the process right before or right after it is published."""

    def __init__(self, position: Position, point: str) -> None:
        self._position = position
        self._point = point

    def load(self) -> int:
        return self._position.load()

    def store(self, value: int) -> None:
        if self._point == "recorded":
            die(self._point)
        self._position.store(value)
        die(self._point)


def slow_sender(endpoint: Endpoint, incarnation: int, point: str, num_bytes: int) -> None:
    """The twin in Python; it dies between its steps."""
    p2p = SlowP2p(endpoint)
    p2p.send(first_message(incarnation), RECEIVER, 1, soon())
    link = p2p._outgoing[RECEIVER]
    if point == "claimed":
        link.claim(2, soon())[:] = b"x" * RING.slot_bytes
        die(point)
    if point in ("recorded", "published"):
        link._producer._tail = KillingPosition(link._producer._tail, point)
    p2p.send(second_message(num_bytes), RECEIVER, 2, soon())
    p2p.send(LAST_MESSAGE, RECEIVER, 3, soon())


def sender(endpoint: Endpoint, incarnation: int, point: str, num_bytes: int) -> None:
    """Send; `reserved` dies with a slot filled in place and not committed, the other points are in C."""
    p2p = P2p(endpoint)
    p2p.send(first_message(incarnation), RECEIVER, 1, soon())
    if point == "reserved":
        p2p.reserve((RING.slot_bytes // 2,), np.uint8, RECEIVER, 2, soon())[:] = 7
        die(point)
    if point == "leaves-its-lock":
        leave_lock()
    arm(point)
    p2p.send(second_message(num_bytes), RECEIVER, 2, soon())
    p2p.send(LAST_MESSAGE, RECEIVER, 3, soon())
    p2p.close()


def repeating_sender(endpoint: Endpoint, incarnation: int, point: str, num_bytes: int) -> None:
    """Send the second message again and again."""
    p2p = P2p(endpoint)
    p2p.send(first_message(incarnation), RECEIVER, 1, soon())
    arm(point)
    for _ in range(REPEATS):
        p2p.send(second_message(num_bytes), RECEIVER, 2, soon())
    p2p.close()


def receiver(endpoint: Endpoint, incarnation: int, point: str, num_bytes: int) -> None:
    """Receive; `viewed` dies while it looks at a message in place, the other points are in C."""
    p2p = P2p(endpoint)
    assert (p2p.recv(None, SENDER, 1, soon()) == first_message(incarnation)).all()
    if point == "viewed":
        assert np.array_equal(p2p.peek(SENDER, 2, soon()), second_message(num_bytes))
        die(point)
    arm(point)
    if point == "block-copied":  # it dies there; who must not wait shares with nobody but its own lanes
        assert np.array_equal(p2p.irecv(None, SENDER, 2).wait(soon()), second_message(num_bytes))
    assert np.array_equal(p2p.recv(None, SENDER, 2, soon()), second_message(num_bytes))
    assert np.array_equal(p2p.recv(None, SENDER, 3, soon()), LAST_MESSAGE)
    p2p.close()


def main(role: str, pod: str, incarnation: int, peer_segment: str, point: str, num_bytes: int) -> None:
    me, act = {
        "slow-sender": (SENDER, slow_sender),
        "sender": (SENDER, sender),
        "repeating-sender": (SENDER, repeating_sender),
        "receiver": (RECEIVER, receiver),
    }[role]
    # One that sleeps does not share a copy, and beside others that compute it may sleep at once.
    endpoint = endpoint_of(me, pod, incarnation, Yielding() if role == "repeating-sender" else None)
    endpoint.learn(RECEIVER if me == SENDER else SENDER, 1, peer_segment)
    say("ready", endpoint.segment.name)
    act(endpoint, incarnation, point, num_bytes)
    say("done")
    endpoint.close()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4], sys.argv[5], int(sys.argv[6]))
