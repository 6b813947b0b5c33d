"""Any order of sends, isends, commits, receipts, peeks, probes, mistakes, cancels keeps a link a FIFO of messages."""

from __future__ import annotations

import contextlib
import uuid
from collections import deque
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from bus.config import XcclConfig
from bus.errors import EventMismatch, PeerStalled
from bus.memory.ring import RingLayout
from bus.xccl.channel import NOW
from bus.xccl.endpoint import Endpoint, World
from bus.xccl.handle import SendHandle
from bus.xccl.p2p import P2p
from tests.harness.p2p_sides import soon, together
from tests.harness.reading import can_read_processes

WORLD = World.of(attention=1, expert=1)
A, B = WORLD.ranks
SHAPES = st.lists(st.integers(0, 6), max_size=6).map(tuple)
DTYPES = st.sampled_from(["<f4", "|u1", "<c16", ">i2"])
EVENTS = st.integers(0, 2**64 - 1)
READ_BYTES_MIN = 64


class P2pMachine(RuleBasedStateMachine):
    @initialize(num_slots=st.integers(1, 4), slot_bytes=st.sampled_from([128, 192, 1000]))
    def make(self, num_slots: int, slot_bytes: int) -> None:
        self.pod = f"mach{uuid.uuid4().hex[:12]}"
        self.slot_bytes = slot_bytes
        self.ends = [
            Endpoint(
                pod=self.pod,
                world=WORLD,
                me=me,
                incarnation=1,
                config=XcclConfig(spin_us=0),
                p2p_peers=[peer],
                p2p_ring=RingLayout(num_slots, slot_bytes),
                app_bytes=4096,
            )
            for me, peer in ((A, B), (B, A))
        ]
        for end in self.ends:
            for other in self.ends:
                end.learn(other.me, 1, other.segment.name)
        self.sender = P2p(self.ends[0], pull_bytes_min=64, read_bytes_min=READ_BYTES_MIN)
        self.receiver = P2p(self.ends[1])
        self.receiver.accept(A)
        self.app = self.ends[0].segment.array(self.ends[0].segment.layout.app_offset, (4096,), np.uint8)
        self.app[:] = np.arange(4096) % 253
        self.sent: deque[tuple[int, npt.NDArray[Any]]] = deque()
        self.handles: deque[SendHandle | None] = deque()  # None: committed in place
        self.count = self.num_withdrawn = 0
        self.is_read = False  # the receiver has shown that it reads the sender's memory

    def teardown(self) -> None:
        if not hasattr(self, "sent"):
            return
        try:
            while self.sent:
                self.receive(False)
            assert self.receiver.probe(A) is None
            counters = self.receiver.receiver(A).stats(), self.sender.sender(B).stats()
            assert counters[0]["num_messages"] == self.count
            assert counters[1]["num_messages"] == self.count + self.num_withdrawn
            assert counters[0]["num_chunks"] == counters[1]["num_chunks"]
            self.sender.close()
            self.receiver.close()
        finally:
            for end in self.ends:
                end.close()

    def queue(self, array: npt.NDArray[Any], event_id: int) -> None:
        self.handles.append(self.sender.isend(array, B, event_id))
        self.sent.append((event_id, array))
        self.count += 1

    @rule(shape=SHAPES, dtype=DTYPES, event_id=EVENTS)
    def isend(self, shape: tuple[int, ...], dtype: str, event_id: int) -> None:
        self.queue((np.arange(np.prod(shape, dtype=int)) + self.count).astype(dtype).reshape(shape), event_id)

    @rule(start=st.integers(0, 2000), size=st.integers(64, 2000), event_id=EVENTS)
    def isend_from_the_app_area(self, start: int, size: int, event_id: int) -> None:
        self.queue(self.app[start : start + size], event_id)

    @precondition(lambda self: not self.sender.sender(B).queue)
    @rule(shape=st.lists(st.integers(1, 3), max_size=4).map(tuple), value=st.integers(0, 99), event_id=EVENTS)
    def commit_in_place(self, shape: tuple[int, ...], value: int, event_id: int) -> None:
        channel = self.sender.sender(B)
        if channel._claim(event_id, NOW) is None:
            return
        self.sender.reserve(shape, np.uint8, B, event_id, NOW)[...] = value
        channel.commit(event_id)
        self.sent.append((event_id, np.full(shape, value, np.uint8)))
        self.handles.append(None)
        self.count += 1

    @precondition(lambda self: not self.sent)
    @rule(size=st.integers(READ_BYTES_MIN, 100_000), event_id=EVENTS)
    def send_now(self, size: int, event_id: int) -> None:
        """By `send`: read in the sender's memory, from 16 KiB on shared, once the receiver has shown that it can."""
        x = (np.arange(size) + self.count).astype(np.uint8)
        before = self.receiver.receiver(A).stats()["num_pulled"]
        got = together(
            lambda: self.sender.send(x, B, event_id, soon()),
            lambda: self.receiver.recv(None, A, event_id, soon()),
        )
        assert np.array_equal(got, x)
        is_pulled = self.receiver.receiver(A).stats()["num_pulled"] > before
        assert is_pulled or not self.is_read or size < READ_BYTES_MIN
        self.count += 1
        self.is_read = can_read_processes()

    @precondition(lambda self: not self.sent and self.is_read)
    @rule(size=st.integers(READ_BYTES_MIN, 100_000), event_id=EVENTS)
    def withdraw(self, size: int, event_id: int) -> None:
        """A `send` that nobody takes in time: its array must never arrive, but the next one of that event."""
        x, channel = np.zeros(size, np.uint8), self.sender.sender(B)
        tail = channel.tail
        with pytest.raises(PeerStalled):
            self.sender.send(x, B, event_id, NOW)
        self.num_withdrawn += channel.tail - tail
        self.send_now(size, event_id)

    @precondition(lambda self: len(self.sender.sender(B).queue) > 1)
    @rule()
    def cancel_the_last(self) -> None:
        handle = self.handles.pop()
        assert handle is not None
        assert handle.cancel()
        self.sent.pop()
        self.count -= 1

    @precondition(lambda self: self.sent)
    @rule(into_own=st.booleans())
    def receive(self, into_own: bool) -> None:
        event_id, array = self.sent.popleft()
        out = np.zeros_like(array) if into_own else None
        handle, sent = self.receiver.irecv(out, A, event_id), self.handles.popleft()
        for _ in range(10_000):
            if handle.test():
                break
            if sent is not None:
                sent.test()
        got = handle.array
        assert got is not None
        assert out is None or got is out
        assert (got.dtype, got.shape, got.tobytes()) == (array.dtype, array.shape, array.tobytes())
        assert sent is None or sent.test()

    @precondition(lambda self: self.sent)
    @rule(event_id=EVENTS)
    def ask_for_another_event(self, event_id: int) -> None:
        if event_id != self.sent[0][0] and self.receiver.probe(A) is not None:
            handle = self.receiver.irecv(None, A, event_id)
            with pytest.raises(EventMismatch):
                handle.test()
            assert handle.cancel()

    @rule()
    def probe(self) -> None:
        found = self.receiver.probe(A)
        if found is not None:
            event_id, array = self.sent[0]
            assert (found[0], found[1].dtype, found[1].shape) == (event_id, array.dtype, array.shape)

    @precondition(lambda self: self.sent and self.receiver.probe(A) is not None)
    @rule(is_taken=st.booleans())
    def peek(self, is_taken: bool) -> None:
        event_id, array = self.sent[0]
        with contextlib.suppress(ValueError):  # of several records
            seen = self.receiver.peek(A, event_id, NOW)
            assert np.array_equal(seen, array)
            if is_taken:
                self.receiver.release(A, event_id)
                self.sent.popleft()
                sent = self.handles.popleft()
                assert sent is None or sent.test()


P2pMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
TestP2pMachine = P2pMachine.TestCase
