"""Any order of claims, commits, aborts, peeks and releases keeps the ring a bounded FIFO queue; damage is noticed."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from bus.errors import SegmentCorrupt
from bus.memory import _native
from bus.memory.ring import (
    HEAD_OFFSET,
    RECORD,
    SLOTS_OFFSET,
    TAIL_OFFSET,
    Consumer,
    Producer,
    RingLayout,
)

Message = tuple[bytes, int, int]


class RingMachine(RuleBasedStateMachine):
    @initialize(
        num_slots=st.integers(1, 7),
        slot_bytes=st.integers(1, 130),
        start=st.sampled_from([0, 1, 2**32 - 3, 2**40]),
    )
    def make(self, num_slots: int, slot_bytes: int, start: int) -> None:
        self.layout = RingLayout(num_slots, slot_bytes)
        self.region = memoryview(bytearray(self.layout.total_bytes))
        for offset in (TAIL_OFFSET, HEAD_OFFSET):
            _native.store_u64(self.region, offset, start)
        self.producer = Producer(self.region, self.layout)
        self.consumer = Consumer(self.region, self.layout)
        self.queue: list[Message] = []
        self.num_unpublished = 0
        self.slot: memoryview | None = None

    @precondition(lambda self: self.slot is None)
    @rule()
    def claim(self) -> None:
        self.slot = self.producer.try_claim()
        is_full = len(self.queue) + self.num_unpublished == self.layout.num_slots
        assert (self.slot is None) == is_full

    @precondition(lambda self: self.slot is not None)
    @rule(payload=st.binary(max_size=130), event_id=st.integers(0, 2**64 - 1), chunk_id=st.integers(0, 9))
    def commit(self, payload: bytes, event_id: int, chunk_id: int) -> None:
        assert self.slot is not None
        payload = payload[: self.layout.slot_bytes]
        self.slot[: len(payload)] = payload
        self.producer.commit(len(payload), event_id=event_id, chunk_id=chunk_id)
        self.queue.append((payload, event_id, chunk_id))
        self.slot = None

    @precondition(lambda self: self.slot is not None)
    @rule(garbage=st.binary(min_size=1, max_size=130))
    def fill_and_abort(self, garbage: bytes) -> None:
        assert self.slot is not None
        garbage = garbage[: len(self.slot)]
        self.slot[: len(garbage)] = garbage
        self.producer.abort()
        self.slot = None

    @rule()
    def peek(self) -> None:
        record = self.consumer.peek()
        found = None if record is None else (bytes(record.payload), record.event_id, record.chunk_id)
        assert found == (self.queue[0] if self.queue else None)

    @precondition(lambda self: self.queue)
    @rule(publish=st.booleans())
    def take(self, publish: bool) -> None:
        self.peek()
        self.consumer.release(publish=publish)
        self.queue.pop(0)
        self.num_unpublished = 0 if publish else self.num_unpublished + 1

    @precondition(lambda self: self.slot is None and self.num_unpublished == 0)
    @rule()
    def reopen_both_ends(self) -> None:
        self.producer = Producer(self.region, self.layout)
        self.consumer = Consumer(self.region, self.layout)

    @precondition(lambda self: self.slot is None and self.num_unpublished == 0)
    @rule(excess=st.integers(1, 2**20), sign=st.sampled_from([-1, 1]))
    def damage_the_tail(self, excess: int, sign: int) -> None:
        tail = self.producer.tail
        bad = tail + self.layout.num_slots + excess if sign > 0 else self.consumer.head - excess
        _native.store_u64(self.region, TAIL_OFFSET, bad % 2**64)
        with pytest.raises(SegmentCorrupt):
            Consumer(self.region, self.layout)
        _native.store_u64(self.region, TAIL_OFFSET, tail)

    @precondition(lambda self: self.queue)
    @rule(position=st.integers(0, 2**64 - 1), excess=st.integers(1, 2**31))
    def damage_the_oldest_record(self, position: int, excess: int) -> None:
        offset = SLOTS_OFFSET + self.consumer.head % self.layout.num_slots * self.layout.slot_stride
        good = bytes(self.region[offset : offset + RECORD.size])
        fields = RECORD.unpack(good)
        bad_records = [(fields[0], self.layout.slot_bytes + excess, *fields[2:])]
        if position != fields[0]:
            bad_records.append((position, *fields[1:]))
        for bad in bad_records:
            RECORD.pack_into(self.region, offset, *bad)
            with pytest.raises(SegmentCorrupt):
                self.consumer.peek()
        self.region[offset : offset + RECORD.size] = good

    @invariant()
    def positions_agree(self) -> None:
        if hasattr(self, "layout"):
            assert self.producer.tail - self.consumer.head == len(self.queue) <= self.layout.num_slots
            assert _native.load_u64(self.region, TAIL_OFFSET) == self.producer.tail
            assert _native.load_u64(self.region, HEAD_OFFSET) == self.consumer.head - self.num_unpublished


RingMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestRingMachine = RingMachine.TestCase
