"""The views that `reserve` and `peek` hand out: made once for each place and shape, and never shared or stale."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from bus.clock import Deadline
from bus.errors import PeerStalled, SegmentCorrupt
from bus.memory.ring import SLOTS_OFFSET
from bus.xccl.message import MessageHeader
from tests.harness.p2p_sides import A, B, Side, soon, two_sides

NUM_SLOTS = 4


def pass_on(a: Side, b: Side, shape: tuple[int, ...], dtype: npt.DTypeLike, value: int) -> Any:
    """Send an array in place and return what the receiver saw, still in place."""
    slot = a.p2p.reserve(shape, dtype, B, 1, soon())
    assert (slot.shape, slot.dtype) == (shape, np.dtype(dtype))
    assert slot.flags.writeable
    slot[...] = value
    tail = a.p2p.sender(B).commit(1)
    seen = b.p2p.peek(A, 1, soon())
    assert (seen.shape, seen.dtype) == (shape, np.dtype(dtype))
    assert not seen.flags.writeable
    assert (seen == value).all()
    b.p2p.release(A, 1)
    a.p2p.sender(B).await_taken(tail, 1, soon())
    return seen


def test_recycled_slots_show_what_the_message_announces(sides: tuple[Side, Side]) -> None:
    """Shapes and types change from lap to lap, so each slot is seen as everything."""
    a, b = sides
    kinds: list[tuple[tuple[int, ...], str]] = [
        ((6,), "f8"),
        ((2, 3), "f8"),
        ((6,), "i8"),
        ((), "u1"),
        ((1, 2, 1, 2, 1), "f4"),
        ((2, 1, 1, 2, 1), "f4"),
        ((1, 2, 1, 1, 2), "f4"),
        ((0,), "f8"),
        ((3, 0), "c16"),
    ]
    for i in range(7 * len(kinds)):
        shape, dtype = kinds[i % len(kinds)]
        pass_on(a, b, shape, dtype, i % 100)
    for i in range(3 * NUM_SLOTS):
        pass_on(a, b, (5,), np.int16, i)


def test_each_view_is_its_receivers_own(sides: tuple[Side, Side]) -> None:
    """Whoever turns a view into something else does not change what the next one is, not even through its base."""
    a, b = sides
    spoilt: list[Any] = []
    for i in range(2 * NUM_SLOTS):
        slot = a.p2p.reserve((6,), np.float64, B, 1, soon())
        assert (slot.shape, slot.dtype) == ((6,), np.float64)
        assert slot.flags.writeable
        slot[:] = i
        slot.shape = (2, 3)
        slot.dtype = np.int64
        slot.flags.writeable = False
        a.p2p.sender(B).commit(1)
        seen = b.p2p.peek(A, 1, soon())
        assert (seen.shape, seen.dtype) == ((6,), np.float64)
        assert (seen == i).all()
        assert seen.base.dtype == np.uint8, "the base is the mapping, not the view that is kept"
        seen.shape = (3, 2)
        b.p2p.release(A, 1)
        spoilt += [slot, seen]
    again = a.p2p.reserve((6,), np.float64, B, 1, soon())
    assert a.p2p.reserve((6,), np.float64, B, 1, soon()) is not again
    assert np.shares_memory(a.p2p.reserve((6,), np.float64, B, 1, soon()), again)


def test_shapes_are_told_apart_however_they_are_written(sides: tuple[Side, Side]) -> None:
    a, _ = sides
    length: Any
    for length in (3, 4, np.int64(3), np.int64(5), 3):
        assert a.p2p.reserve((length,), np.uint8, B, 1, soon()).shape == (int(length),)
        assert a.p2p.reserve((length,), "u1", B, 1, soon()).shape == (int(length),)
        assert a.p2p.reserve((length,), np.int32, B, 1, soon()).dtype == np.int32
    for shape in ((-1,), (2, -3)):
        with pytest.raises(ValueError, match="negative"):
            a.p2p.reserve(shape, np.uint8, B, 1, soon())


def test_views_outlive_the_link_and_hold_its_mapping(pod: str) -> None:
    a, b = two_sides(pod)
    b.p2p.accept(A)
    slot = a.p2p.reserve((3,), np.float64, B, 1, soon())
    slot[:] = 7
    a.p2p.sender(B).commit(1)
    seen = b.p2p.peek(A, 1, soon())
    own, mapped = b.endpoint.segment, a.endpoint.peer(B)
    a.close()
    b.close()
    assert (seen == 7).all()
    assert (slot == 7).all()
    assert not own.buf.closed
    assert not mapped.buf.closed
    del slot, seen
    del b.app
    gc.collect()
    own.buf.close()  # BufferError: something kept in a link still looks at it
    mapped.buf.close()


def test_a_new_incarnation_is_never_seen_through_an_old_view(pod: str) -> None:
    """The same rank, ring offset, slot and shape: but another mapping."""
    a, b = two_sides(pod)
    b.p2p.accept(A)
    for i in range(NUM_SLOTS):
        old = pass_on(a, b, (3,), np.float64, i)
    old_slot = a.p2p.reserve((3,), np.float64, B, 1, soon())
    b.close()
    again = Side(pod, B, incarnation=2)
    again.learn(a)
    a.learn(again)
    again.p2p.accept(A)
    assert (old == NUM_SLOTS - 1).all(), "an old view shows the old bytes"
    new = [pass_on(a, again, (3,), np.float64, 40 + i) for i in range(NUM_SLOTS)]
    assert not any(np.shares_memory(old, view) or np.shares_memory(old_slot, view) for view in new)
    assert (old == NUM_SLOTS - 1).all()
    a.close()
    again.close()


def test_the_senders_new_incarnation_is_peeked_at_in_its_own_app_area(pod: str) -> None:
    a, b = two_sides(pod)
    b.p2p.accept(A)

    def pull(value: int) -> Any:
        a.app[:2000] = value
        handle = a.p2p.isend(a.app[:2000], B, 1)
        seen = b.p2p.peek(A, 1, soon())
        assert (seen == value).all()
        b.p2p.release(A, 1)
        handle.wait(soon())
        return seen

    old = pull(1)
    a.close()
    a = Side(pod, A, incarnation=2)
    a.learn(b)
    b.learn(a)
    b.p2p.accept(A)
    new = pull(2)
    assert (old == 1).all()
    assert not np.shares_memory(old, new)
    a.close()
    b.close()


def test_a_reservation_ends_with_its_slot(sides: tuple[Side, Side]) -> None:
    """What another message has been written over, or what was committed, is not sent again."""
    a, b = sides
    sender = a.p2p.sender(B)
    a.p2p.reserve((4,), np.uint8, B, 1, soon())[:] = 3
    with pytest.raises(ValueError, match="do not fit"):
        a.p2p.reserve((257,), np.uint8, B, 1, soon())
    sender.commit(1)  # the one before stands
    assert (b.p2p.peek(A, 1, soon()) == 3).all()
    b.p2p.release(A, 1)
    with pytest.raises(RuntimeError, match="nothing is reserved"):
        sender.commit(1)
    a.p2p.reserve((4,), np.uint8, B, 1, soon())
    handle = a.p2p.isend(np.arange(3), B, 2)
    with pytest.raises(RuntimeError, match="nothing is reserved"):
        sender.commit(1)
    assert np.array_equal(b.p2p.recv(None, A, 2, soon()), np.arange(3))
    handle.wait(soon())
    with pytest.raises(ValueError, match="event_id"):
        sender.commit(-1)


def test_a_full_ring_is_waited_for(sides: tuple[Side, Side]) -> None:
    a, b = sides
    for i in range(NUM_SLOTS):
        a.p2p.reserve((1,), np.uint8, B, i, soon())[0] = i
        a.p2p.sender(B).commit(i)
    with pytest.raises(PeerStalled, match="stayed full"):
        a.p2p.reserve((1,), np.uint8, B, 9, Deadline.after_ms(20))
    with pytest.raises(RuntimeError, match="nothing is reserved"):
        a.p2p.sender(B).commit(9)
    with pytest.raises(PeerStalled, match="not acknowledged"):
        a.p2p.sender(B).await_taken(1, 0, Deadline.after_ms(20))
    for i in range(NUM_SLOTS):
        assert b.p2p.peek(A, i, soon())[0] == i
        b.p2p.release(A, i)
    a.p2p.reserve((1,), np.uint8, B, 9, soon())


def test_a_type_that_numpy_lacks_is_corrupt_in_place_too(sides: tuple[Side, Side]) -> None:
    a, b = sides
    a.p2p.reserve((4, 3), np.uint8, B, 1, soon())[:] = 1
    a.p2p.sender(B).commit(1)
    ring, buffer = b.endpoint.ring_offset(A), b.endpoint.segment.buf
    assert ring is not None
    at = ring + SLOTS_OFFSET + 24
    tag = buffer[at : at + 40]
    buffer[at : at + 40] = MessageHeader(np.dtype("i4"), (4,)).pack()[0].replace(b"<i4", b"<i3")
    with pytest.raises(SegmentCorrupt, match="i3"):
        b.p2p.peek(A, 1, soon())
    buffer[at : at + 40] = tag
    assert (b.p2p.peek(A, 1, soon()) == 1).all()
