"""Ten million messages that testify: each says who sent it, its number, and a checksum; none is lost, torn or late.

`make test` sends thousands; `make test-native` ten million over p2p and two million through the ring in Python, both on
one core and on two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from bus.memory import _native
from bus.memory.ring import Consumer, Record
from bus.memory.segment import Segment
from bus.memory.wait import Adaptive, Doorbell
from bus.xccl.p2p import P2p
from tests.litmus.stream_child import BATCH, RECEIVER, RING, SENDER, awaiting, batches, endpoint_of, far

FEW = 10 * BATCH
MANY = pytest.mark.slow
Spawn = Callable[..., Any]
P2P_COUNTS = [FEW, pytest.param(10_000_000, marks=MANY)]
RING_COUNTS = [FEW, pytest.param(2_000_000, marks=MANY)]


@pytest.mark.parametrize("count", P2P_COUNTS)
def test_p2p_messages_testify(pod: str, spawn: Spawn, cpus: list[set[int]], count: int) -> None:
    endpoint, deadline = endpoint_of(RECEIVER, pod), far()
    child = spawn("p2p", pod, endpoint.segment.name, count, cpus=cpus[1], script="stream_child.py")
    endpoint.learn(SENDER, 1, child.line().split()[1])
    p2p, got = P2p(endpoint), np.empty((BATCH, 4), np.uint64)
    recv, rows = p2p.receiver(SENDER).recv, list(got)
    for first, expected in batches(count):
        for number, row in enumerate(rows, first):
            recv(row, number, deadline)
        assert np.array_equal(got, expected), f"among the messages from {first} on"
        got.fill(0)
    assert child.wait() == 0
    assert p2p.probe(SENDER) is None
    p2p.close()
    endpoint.close()


@pytest.mark.parametrize("count", RING_COUNTS)
def test_ring_records_testify(
    pod: str, segment: Segment, spawn: Spawn, cpus: list[set[int]], count: int
) -> None:
    child = spawn("ring", pod, segment.name, count, cpus=cpus[1], script="stream_child.py")
    assert child.line() == "ready -"
    consumer, strategy, got = (
        Consumer(segment.managed, RING),
        Adaptive(20_000),
        np.empty((BATCH, 4), np.uint64),
    )
    filled, emptied = Doorbell(segment.buf, 128), Doorbell(segment.buf, segment.layout.app_offset)
    flat = got.reshape(-1)
    for first, expected in batches(count):
        for number in range(BATCH):
            record = consumer.peek() or awaiting(consumer.peek, filled, strategy)
            assert isinstance(record, Record)
            assert record.event_id == first + number
            _native.copy(flat, 32 * number, record.payload, 0, 32)
            consumer.release()
            emptied.ring()
        assert np.array_equal(got, expected), f"among the records from {first} on"
        got.fill(0)
    assert child.wait() == 0
    assert consumer.peek() is None
