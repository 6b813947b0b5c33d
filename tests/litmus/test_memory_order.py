"""Every permitted outcome of two racing processes is enumerated; any other one is a failure.

The processes run freely against each other, on one core and on two, so each test sees 10^5 interleavings and more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from bus.clock import NS_PER_S, Deadline, now_ns
from bus.memory import _native
from bus.memory.ring import Consumer, RingLayout
from bus.memory.segment import Segment
from bus.memory.wait import Adaptive, Doorbell, wait_until

COUNT = 400_000
RING = RingLayout(num_slots=64, slot_bytes=64)
PING_PONG_NS = 3 * NS_PER_S
Spawn = Callable[..., Any]


def test_a_seen_flag_means_seen_data(segment: Segment, cpus: list[set[int]], spawn: Spawn) -> None:
    """Message passing: the writer stores `data`, then `flag` (release); the reader loads `flag` (acquire), then `data`.

    allowed: flag and data equal       the reader came between two rounds
             data newer than flag      the reader came between the two stores
    forbidden: data older than flag    the release store was seen before what it publishes
    """
    child = spawn("two-words", segment.name, COUNT, cpus=cpus[1])
    assert child.line() == "ready"
    buf, base = segment.buf, segment.layout.app_offset
    outcomes: Counter[str] = Counter()
    flag, deadline = 0, Deadline.after_ms(30_000)
    while flag < COUNT and not deadline.expired():
        flag = _native.load_u64(buf, base + 64)
        data = _native.load_u64(buf, base)
        outcomes["equal" if data == flag else "newer" if data > flag else "OLDER"] += 1
    assert flag == COUNT
    assert set(outcomes) <= {"equal", "newer"}, outcomes
    assert child.wait() == 0


def test_a_cell_is_never_torn(segment: Segment, cpus: list[set[int]], spawn: Spawn) -> None:
    """Seqlock.

    allowed: nothing                   the cell was empty, being written, or changed while it was read
             four words of one write   the reader came between two writes
    forbidden: words of two writes
    """
    child = spawn("cells", segment.name, COUNT, cpus=cpus[1])
    assert child.line() == "ready"
    offset, num_read, w0 = segment.cell_offset(0), 0, 0
    deadline = Deadline.after_ms(30_000)
    while w0 < COUNT and not deadline.expired():
        cell = _native.read_cell(segment.buf, offset)
        if cell is None:
            continue
        assert cell == (cell[0], cell[0] * 3, cell[0] * 5, cell[0] ^ 0xFFFFFFFF)
        assert cell[0] >= w0, "a cell went back in time"
        w0 = cell[0]
        num_read += 1
    assert (w0, child.wait()) == (COUNT, 0)
    assert num_read > 1


def test_two_adders_never_miss_each_other(segment: Segment, cpus: list[set[int]], spawn: Spawn) -> None:
    """Store buffering, the doorbell's core: each adds to its own word, then reads the other's (seq_cst).

    Of round i here and round j there:
    allowed: one sees the other's add, or both do
    forbidden: neither does (i read less than j, and j read less than i): then a waiter could go to sleep while its
               ringer thinks that it is awake
    """
    buf, base = segment.buf, segment.layout.app_offset
    child = spawn("store-buffering", segment.name, COUNT, cpus=cpus[1])
    assert child.line() == "ready"
    assert _native.wait_u32(buf, base + 1024, 0, 10 * NS_PER_S, 10 * NS_PER_S) == 1
    seen_here = segment.array(base + 4096, (COUNT + 1,), np.uint64)
    for i in range(1, COUNT + 1):
        _native.fetch_add_u64(buf, base, 1)
        seen_here[i] = _native.load_u64(buf, base + 64)
    assert child.wait() == 0
    seen_there = segment.array(base + 4096 + 8 * (COUNT + 1), (COUNT + 1,), np.uint64)
    rounds = np.arange(1, COUNT + 1)
    first_unseen = seen_here[1:].astype(np.int64) + 1  # the earliest round there that round i did not see
    raced = first_unseen <= COUNT
    missed = seen_there[first_unseen[raced]].astype(np.int64) < rounds[raced]
    assert not missed.any(), f"{int(missed.sum())} pairs of rounds missed each other"


def test_no_wake_up_is_lost_in_ping_pong(segment: Segment, cpus: list[set[int]], spawn: Spawn) -> None:
    """Sleep, be rung, ring back.

    allowed: the waiter is woken by the ring
    forbidden: it wakes by its time-out, and the bell had rung
    """
    base = segment.layout.app_offset
    there, here = Doorbell(segment.buf, base), Doorbell(segment.buf, base + 64)
    until_ns = now_ns() + PING_PONG_NS
    child = spawn("ping-pong", segment.name, until_ns, cpus=cpus[1])
    assert child.line() == "ready"
    rounds, timeout_ns = 0, 10 * NS_PER_S
    while now_ns() < until_ns:
        there.ring()
        start_ns = now_ns()
        seq = here.wait(rounds, (0, 300, 0, 3_000)[rounds % 4], timeout_ns)
        if now_ns() >= until_ns and seq == rounds:
            break  # the other one stopped first
        assert seq == rounds + 1, "the answer never came"
        assert now_ns() - start_ns < timeout_ns, "it came, but nobody woke the waiter"
        rounds += 1
    there.ring()
    rounds_there, lost_there = map(int, child.line().split())
    assert lost_there == 0
    assert rounds_there >= rounds > 2_000


def test_no_ring_of_many_ringers_is_lost(segment: Segment, cpus: list[set[int]], spawn: Spawn) -> None:
    """Three ringers, one waiter that sleeps whenever it is up to date: all announced work is seen, by rings alone."""
    count = 20_000
    children = [spawn("ringer", segment.name, count, cpus=cpus[i % 2]) for i in range(3)]
    buf, base, done, timeout_ns = segment.buf, segment.layout.app_offset, 0, 15 * NS_PER_S
    while done < 3 * count:
        seen = segment.doorbell_seq()
        work = _native.load_u64(buf, base)
        if work == done:
            start_ns = now_ns()
            assert segment.wait_doorbell(seen, 0, timeout_ns) != seen, "nobody rang for a long time"
            assert now_ns() - start_ns < timeout_ns, "it rang, but nobody woke the waiter"
        done = work
    assert [child.wait() for child in children] == [0, 0, 0]
    assert segment.doorbell_seq() == 3 * count


def test_ring_records_arrive_whole_and_in_order(segment: Segment, cpus: list[set[int]], spawn: Spawn) -> None:
    """Every record names its source and number sixteen times over; the consumer expects exactly the next number."""
    count, source = 40_000, 77
    child = spawn("producer", segment.name, source, count, cpus=cpus[1])
    assert child.line() == "ready"
    consumer, strategy = Consumer(segment.managed, RING), Adaptive(20_000)
    bell, sender_bell = Doorbell(segment.buf, 128), Doorbell(segment.buf, segment.layout.app_offset)
    for seq in range(count):
        record = wait_until(
            consumer.peek,
            bell,
            strategy,
            Deadline.after_ms(20_000),
            check=lambda: None,
            check_interval_ns=NS_PER_S,
        )
        assert record is not None, "the producer fell silent"
        words = np.frombuffer(record.payload, np.uint32)
        assert (words[0::2] == source).all(), words
        assert (words[1::2] == seq).all(), words
        assert record.event_id == seq
        consumer.release()
        sender_bell.ring()
    assert child.wait() == 0
    assert consumer.peek() is None
