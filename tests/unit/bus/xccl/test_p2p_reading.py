"""Large arrays that the receiver reads in the sender's memory."""

from __future__ import annotations

import numpy as np
import pytest

from bus.clock import Deadline
from bus.errors import PeerStalled, SegmentCorrupt
from bus.memory.ring import SLOTS_OFFSET, RingLayout
from bus.xccl.message import POINTER, READ
from bus.xccl.p2p import SlowP2p
from tests.harness.p2p_sides import A, B, Side, soon, together


def test_large_arrays_are_read_where_they_are(readable: tuple[Side, Side]) -> None:
    a, b = readable
    x = np.random.default_rng(1).random((7, 1, 2, 1, 1000))
    got = together(lambda: a.p2p.send(x, B, 1, soon()), lambda: b.p2p.recv(None, A, 1, soon()))
    assert np.array_equal(got, x)
    assert b.p2p.stats()[A, "recv"]["num_pulled"] == 1
    slow = SlowP2p(b.endpoint)
    got = together(lambda: a.p2p.send(x, B, 2, soon()), lambda: slow.recv(None, A, 2, soon()))
    assert np.array_equal(got, x)


def test_nothing_is_read_before_the_receiver_has_shown_the_nonce(sides: tuple[Side, Side]) -> None:
    a, b = sides
    x, slow = np.arange(10_000.0), SlowP2p(b.endpoint)
    for event_id in range(2):
        got = together(
            lambda at=event_id: a.p2p.send(x, B, at, soon()),
            lambda at=event_id: slow.recv(None, A, at, soon()),
        )
        assert np.array_equal(got, x)
    assert a.p2p.stats()[B, "send"]["num_pulled"] == 0


@pytest.mark.parametrize("is_slow", [False, True])
def test_an_array_whose_sender_has_returned_is_not_read(readable: tuple[Side, Side], is_slow: bool) -> None:
    a, b = readable
    x = np.ones(10_000)
    with pytest.raises(PeerStalled):
        a.p2p.send(x, B, 1, Deadline.after_ms(30))
    receiver = SlowP2p(b.endpoint) if is_slow else b.p2p
    with pytest.raises(PeerStalled):
        receiver.recv(None, A, 1, Deadline.after_ms(30))
    x[:] = 2
    got = together(lambda: a.p2p.send(x, B, 1, soon()), lambda: receiver.recv(None, A, 1, soon()))
    assert np.array_equal(got, x)


@pytest.mark.parametrize("address", [0, 4096, 2**63, 2**64 - 8])
def test_an_address_outside_the_senders_memory_is_corrupt(readable: tuple[Side, Side], address: int) -> None:
    a, b = readable
    x = np.arange(10_000.0)
    deadline = Deadline.after_ms(20_000)

    def recv() -> None:
        while b.p2p.probe(A) is None:
            assert b.p2p.receiver(A)._wait(0, soon())
        ring = b.endpoint.ring_offset(A)
        assert ring is not None
        at = ring + SLOTS_OFFSET + RingLayout(4, 256).slot_stride
        buf = b.endpoint.segment.buf
        assert buf[at + 29] == READ
        offered = bytes(buf[at + 64 : at + 72])
        buf[at + 64 : at + 72] = POINTER.pack(address)
        for receiver in (b.p2p, SlowP2p(b.endpoint)):
            with pytest.raises(SegmentCorrupt, match="sender's memory"):
                receiver.recv(None, A, 1, soon())
        buf[at + 64 : at + 72] = offered
        assert np.array_equal(b.p2p.recv(None, A, 1, soon()), x)

    together(lambda: a.p2p.send(x, B, 1, deadline), recv)


def test_what_must_be_read_cannot_be_peeked_at(readable: tuple[Side, Side]) -> None:
    a, b = readable

    def recv() -> None:
        with pytest.raises(ValueError, match="cannot be read in place"):
            b.p2p.peek(A, 1, soon())
        assert b.p2p.discard(A, soon()) == 1

    together(lambda: a.p2p.send(np.arange(10_000.0), B, 1, soon()), recv)
