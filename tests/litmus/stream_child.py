"""The sending process of test_many_messages.py: `stream_child.py ROLE POD SEGMENT COUNT`. Its messages testify."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import numpy as np

from bus.clock import NS_PER_S, Deadline
from bus.config import XcclConfig
from bus.memory import _native
from bus.memory.ring import Producer, RingLayout
from bus.memory.segment import Segment
from bus.memory.wait import Adaptive, Doorbell, wait_until
from bus.xccl.endpoint import Endpoint, Rank, World
from bus.xccl.p2p import P2p

WORLD = World.of(attention=1, expert=1)
SENDER, RECEIVER = WORLD.ranks
SOURCE = 0x5EED
BATCH = 4000
RING = RingLayout(num_slots=64, slot_bytes=64)
P2P_RING = RingLayout(num_slots=64, slot_bytes=128)
STEP, MIX = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xFF51AFD7ED558CCD)


def testimony(first: int) -> np.ndarray:
    """[BATCH, 4] uint64: source, sequence number, a word that follows from it, and a checksum of the three."""
    words = np.empty((BATCH, 4), np.uint64)
    words[:, 0] = SOURCE
    words[:, 1] = np.arange(first, first + BATCH, dtype=np.uint64)
    words[:, 2] = words[:, 1] * STEP
    words[:, 3] = (words[:, 0] ^ words[:, 1] ^ words[:, 2]) * MIX
    return words


def batches(count: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (first number, testimony) until `count` messages are covered."""
    for first in range(0, count, BATCH):
        yield first, testimony(first)


def endpoint_of(me: Rank, pod: str) -> Endpoint:
    return Endpoint(
        pod=pod,
        world=WORLD,
        me=me,
        incarnation=1,
        config=XcclConfig(),
        p2p_peers=[peer for peer in WORLD.ranks if peer != me],
        p2p_ring=P2P_RING,
    )


def far() -> Deadline:
    return Deadline.after_ms(400_000)


def send_all(pod: str, segment: str, count: int) -> None:
    endpoint = endpoint_of(SENDER, pod)
    endpoint.learn(RECEIVER, 1, segment)
    print("ready", endpoint.segment.name, flush=True)
    p2p, deadline = P2p(endpoint), far()
    send = p2p.sender(RECEIVER).send
    for first, words in batches(count):
        for number, row in enumerate(words, first):
            send(row, number, deadline)
    p2p.close()
    endpoint.close()


def awaiting(probe: Callable[[], object], bell: Doorbell, strategy: Adaptive) -> object:
    """Return what the ring has, after waiting for it."""
    found = wait_until(probe, bell, strategy, far(), check=lambda: None, check_interval_ns=NS_PER_S)
    if found is None:
        raise TimeoutError("the other side fell silent")
    return found


def produce_all(pod: str, segment_name: str, count: int) -> None:
    segment = Segment.attach(segment_name)
    print("ready -", flush=True)
    producer, strategy = Producer(segment.managed, RING), Adaptive(20_000)
    emptied, filled = Doorbell(segment.buf, segment.layout.app_offset), Doorbell(segment.buf, 128)
    claim, commit, copy, ring = producer.try_claim, producer.commit, _native.copy, filled.ring
    for first, words in batches(count):
        flat = words.reshape(-1)
        for number in range(BATCH):
            slot = claim()
            if slot is None:
                slot = awaiting(claim, emptied, strategy)
            copy(slot, 0, flat, 32 * number, 32)
            commit(32, event_id=first + number)
            ring()
    segment.close()


ROLES = {"p2p": send_all, "ring": produce_all}

if __name__ == "__main__":
    ROLES[sys.argv[1]](sys.argv[2], sys.argv[3], int(sys.argv[4]))
