"""Without a copy, or with one: slots written and read in place, pulling, one-sided access."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bus.clock import Deadline
from bus.config import XcclConfig
from bus.errors import EventMismatch, PeerDied, PeerStalled, SegmentCorrupt
from bus.memory.ring import SLOTS_OFFSET
from bus.xccl.message import POINTER, PULL
from bus.xccl.p2p import SlowP2p
from tests.harness.p2p_sides import APP_BYTES, A, B, Side, soon, together, two_sides


@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (1, 2, 1, 2, 3), (0,)])
def test_reserve_and_peek_copy_nothing(sides: tuple[Side, Side], shape: tuple[int, ...]) -> None:
    a, b = sides
    slot = a.p2p.reserve(shape, np.float64, B, 4, soon())
    slot[...] = 1.5
    tail = a.p2p.sender(B).commit(4)
    seen = b.p2p.peek(A, 4, soon())
    assert (seen.shape, seen.dtype) == (shape, np.float64)
    assert (seen == 1.5).all()
    assert not seen.flags.writeable
    if shape:
        slot[...] = 2.5
        assert (seen == 2.5).all(), "both ends look at the same bytes"
    assert not a.p2p.sender(B)._taken(tail, 4, 0)
    b.p2p.release(A, 4)
    assert a.p2p.sender(B)._taken(tail, 4, 0)
    with pytest.raises(RuntimeError, match="no record"):
        b.p2p.release(A, 4)


def test_reserve_and_peek_know_their_limits(sides: tuple[Side, Side]) -> None:
    a, b = sides
    with pytest.raises(ValueError, match="do not fit a slot of 256"):
        a.p2p.reserve((257,), np.uint8, B, 1, soon())
    with pytest.raises(ValueError, match="dtype"):
        a.p2p.reserve((2,), "M8[s]", B, 1, soon())
    with pytest.raises(RuntimeError, match="nothing is reserved"):
        a.p2p.sender(B).commit(1)
    with pytest.raises(PeerStalled, match="nothing arrived"):
        b.p2p.peek(A, 1, Deadline.after_ms(20))
    sent = a.p2p.isend(np.arange(60), B, 1)
    with pytest.raises(EventMismatch):
        b.p2p.peek(A, 2, soon())
    with pytest.raises(ValueError, match="several records"):
        b.p2p.peek(A, 1, soon())
    b.p2p.recv(None, A, 1, soon())
    sent.wait(soon())


def test_large_arrays_in_the_app_area_are_pulled(sides: tuple[Side, Side]) -> None:
    a, b = sides
    a.app[:] = np.arange(APP_BYTES) % 251
    x = a.app[100:50_100]
    got = together(lambda: a.p2p.send(x, B, 1, soon()), lambda: b.p2p.recv(None, A, 1, soon()))
    assert np.array_equal(got, x)
    assert a.p2p.stats()[B, "send"]["num_chunks"] == 1
    assert b.p2p.stats()[A, "recv"]["num_pulled"] == 1
    handle = a.p2p.isend(x, B, 2)
    seen = b.p2p.peek(A, 2, soon())
    a.app[100] = 99
    assert seen[0] == 99, "peek shows the sender's own bytes"
    b.p2p.release(A, 2)
    handle.wait(soon())
    slow = SlowP2p(b.endpoint)
    assert np.array_equal(
        together(lambda: a.p2p.send(x, B, 3, soon()), lambda: slow.recv(None, A, 3, soon())), x
    )


@pytest.mark.parametrize("num_bytes", [512 * 1024, 3 * 256 * 1024 + 1, (2 << 20) - 7])
def test_lanes_share_the_copy_of_a_large_array(pod: str, num_bytes: int) -> None:
    """Whichever lanes get to run, every byte comes; ranges that may overlap are copied by one lane."""
    a, b = two_sides(pod, config=XcclConfig(num_lanes=4), app_bytes=4 << 20)
    b.p2p.accept(A)
    x = a.app[3 : 3 + num_bytes]
    for event_id in range(20):
        x[:] = np.random.default_rng(event_id).integers(0, 256, num_bytes, np.uint8)
        out = np.zeros(num_bytes + 16, np.uint8)[event_id % 16 :][:num_bytes]
        handle = a.p2p.isend(x, B, event_id)
        assert b.p2p.recv(out, A, event_id, soon()) is out
        assert np.array_equal(out, x)
        handle.wait(soon())
    assert b.p2p.stats()[A, "recv"]["num_pulled"] == 20
    out = b.app[64 : 64 + num_bytes]
    together(lambda: a.p2p.put(x, B, 0, 20, soon()), lambda: b.p2p.recv(out, A, 20, soon()))
    assert np.array_equal(out, x), "a put may be received into the app area that it lies in"
    a.close()
    b.close()


@pytest.mark.parametrize("offset", [0, 4096, 2**63, 2**64 - 1])
def test_a_pointer_outside_the_app_area_is_corrupt(sides: tuple[Side, Side], offset: int) -> None:
    a, b = sides
    x = a.app[:2048]
    sent = a.p2p.isend(x, B, 1)
    ring = b.endpoint.ring_offset(A)
    assert ring is not None
    at = ring + SLOTS_OFFSET
    assert b.endpoint.segment.buf[at + 29] == PULL
    b.endpoint.segment.buf[at + 64 : at + 72] = POINTER.pack(offset)
    for receiver in (b.p2p, SlowP2p(b.endpoint)):
        with pytest.raises(SegmentCorrupt):
            receiver.recv(None, A, 1, soon())
    b.endpoint.segment.buf[at + 64 : at + 72] = POINTER.pack(a.endpoint.segment.layout.app_offset)
    b.p2p.recv(None, A, 1, soon())
    sent.wait(soon())


def test_put_stores_in_the_peers_app_area_and_notifies(sides: tuple[Side, Side]) -> None:
    a, b = sides
    x = np.arange(300, dtype=np.int32).reshape(3, 100)

    def see() -> Any:
        seen = b.p2p.peek(A, 6, soon())
        assert np.shares_memory(seen, b.app)
        copy = seen.copy()
        b.p2p.release(A, 6)
        return copy

    assert np.array_equal(together(lambda: a.p2p.put(x, B, 400, 6, soon()), see), x)
    assert np.array_equal(b.app[400:1600].view(np.int32).reshape(3, 100), x)
    got = together(lambda: a.p2p.put(x, B, 0, 7, soon()), lambda: b.p2p.recv(None, A, 7, soon()))
    assert np.array_equal(got, x)
    for offset in (-1, APP_BYTES - 1199):
        with pytest.raises(ValueError, match="offset"):
            a.p2p.put(x, B, offset, 8, soon())


def test_get_copies_out_of_the_peers_app_area(sides: tuple[Side, Side]) -> None:
    a, b = sides
    b.app[10:20] = 5
    out = np.zeros(10, np.uint8)
    a.p2p.get(out, B, 10)
    assert (out == 5).all()
    with pytest.raises(ValueError, match="offset"):
        a.p2p.get(out, B, APP_BYTES - 9)
    b.endpoint.close()
    with pytest.raises(PeerDied):
        a.p2p.get(out, B, 10)
