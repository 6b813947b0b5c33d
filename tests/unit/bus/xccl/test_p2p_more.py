"""Beyond send and recv: parts, handles, zero-copy, pulling, one-sided access, counters, the event loop."""

from __future__ import annotations

import asyncio
import ctypes
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from bus.clock import Deadline
from bus.config import XcclConfig
from bus.errors import EventMismatch, PeerDied, PeerStalled, SegmentCorrupt, Truncated
from bus.memory import _native
from bus.memory.ring import SLOTS_OFFSET, RingLayout
from bus.memory.wait import Adaptive, Blocking, Spin, WaitStrategy, Yielding
from bus.xccl.aio import AsyncP2p
from bus.xccl.endpoint import Endpoint, Rank, World
from bus.xccl.message import POINTER, PULL, READ
from bus.xccl.p2p import P2p, SlowP2p

WORLD = World.of(attention=1, expert=1)
A, B = WORLD.ranks
APP_BYTES = 64 * 1024


def soon() -> Deadline:
    return Deadline.after_ms(20_000)


class Side:
    def __init__(
        self, pod: str, me: Rank, peer: Rank, strategy: WaitStrategy | None, incarnation: int = 1
    ) -> None:
        self.endpoint = Endpoint(
            pod=pod,
            world=WORLD,
            me=me,
            incarnation=incarnation,
            config=XcclConfig(),
            p2p_peers=[peer],
            p2p_ring=RingLayout(num_slots=4, slot_bytes=256),
            app_bytes=APP_BYTES,
            strategy=strategy,
        )
        self.p2p = P2p(self.endpoint, pull_bytes_min=1024)
        self.app = self.endpoint.segment.array(
            self.endpoint.segment.layout.app_offset, (APP_BYTES,), np.uint8
        )

    def learn(self, other: Side) -> None:
        self.endpoint.learn(other.endpoint.me, other.endpoint.incarnation, other.endpoint.segment.name)

    def close(self) -> None:
        self.p2p.close()
        self.endpoint.close()


@pytest.fixture
def strategy() -> WaitStrategy | None:
    return None


@pytest.fixture
def sides(pod: str, strategy: WaitStrategy | None) -> Iterator[tuple[Side, Side]]:
    a, b = Side(pod, A, B, strategy), Side(pod, B, A, strategy)
    a.learn(b)
    b.learn(a)
    b.p2p.accept(A)
    yield a, b
    a.close()
    b.close()


def together(first: Callable[[], Any], second: Callable[[], Any]) -> Any:
    """Run `first` in a thread of its own while `second` runs here; return what `second` returns."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            first()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        return second()
    finally:
        thread.join(30)
        assert errors == []


@pytest.mark.parametrize("strategy", [Adaptive(20_000), Adaptive(0), Blocking(), Yielding(), Spin()])
def test_every_strategy_delivers(sides: tuple[Side, Side]) -> None:
    a, b = sides
    arrays = [np.full(size, i, np.float32) for i, size in enumerate([1, 5000, 0, 64, 300])]

    def send() -> None:
        for i, array in enumerate(arrays):
            a.p2p.send(array, B, i, soon())

    def recv() -> list[Any]:
        return [b.p2p.recv(None, A, i, soon()) for i in range(len(arrays))]

    assert all(map(np.array_equal, together(send, recv), arrays))


def test_parts_arrive_together(sides: tuple[Side, Side]) -> None:
    a, b = sides
    parts = [
        np.arange(1000),
        np.zeros((0, 4), np.uint8),
        np.ones((1, 2, 1, 2, 1), np.complex64),
        np.float64(2.5).reshape(()),
    ]
    got = together(lambda: a.p2p.send_parts(parts, B, 9, soon()), lambda: b.p2p.recv_parts(A, 9, soon()))
    assert [(part.dtype, part.shape) for part in got] == [(part.dtype, part.shape) for part in parts]
    assert all(map(np.array_equal, got, parts))
    got = together(lambda: a.p2p.send(parts[0], B, 10, soon()), lambda: b.p2p.recv_parts(A, 10, soon()))
    assert len(got) == 1


def test_recv_refuses_a_message_of_several_parts_and_it_stays(sides: tuple[Side, Side]) -> None:
    a, b = sides
    parts = [np.arange(2), np.arange(3)]

    def recv() -> list[Any]:
        with pytest.raises(ValueError, match="2 parts"):
            b.p2p.recv(None, A, 9, soon())
        return b.p2p.recv_parts(A, 9, soon())

    assert len(together(lambda: a.p2p.send_parts(parts, B, 9, soon()), recv)) == 2
    assert together(lambda: a.p2p.send_parts(parts, B, 3, soon()), lambda: b.p2p.discard(A, soon())) == 3


def test_a_message_of_parts_given_up_half_way_is_skipped(sides: tuple[Side, Side]) -> None:
    a, b = sides
    with pytest.raises(PeerStalled, match="stayed full"):
        a.p2p.send_parts([np.arange(10), np.arange(1000)], B, 1, Deadline.after_ms(30))
    sent = together(
        lambda: a.p2p.send_parts([np.arange(2), np.arange(3)], B, 1, soon()),
        lambda: b.p2p.recv_parts(A, 1, soon()),
    )
    assert [len(part) for part in sent] == [2, 3]
    assert b.p2p.receiver(A).num_drops > 0


def test_parts_are_counted_and_checked(sides: tuple[Side, Side]) -> None:
    a, _ = sides
    with pytest.raises(ValueError, match="parts: 0"):
        a.p2p.send_parts([], B, 1, soon())
    with pytest.raises(ValueError, match="C-contiguous"):
        a.p2p.send_parts([np.arange(3), np.arange(4)[::2]], B, 1, soon())


def test_handles_pipeline_messages_in_one_thread(sides: tuple[Side, Side]) -> None:
    a, b = sides
    arrays = [np.full(size, i) for i, size in enumerate([1, 3, 500, 2, 0])]
    sends = [a.p2p.isend(array, B, i) for i, array in enumerate(arrays)]
    recvs = [b.p2p.irecv(None, A, i) for i in range(len(arrays))]
    assert not sends[2].test()
    deadline = soon()
    while sum(handle.test() for handle in (*sends, *recvs)) < 2 * len(arrays):
        assert not deadline.expired()
    assert all(np.array_equal(handle.array, array) for handle, array in zip(recvs, arrays, strict=True))
    assert all(handle.test() for handle in sends)
    sends[0].wait(soon())


def test_send_comes_after_the_isends_before_it(sides: tuple[Side, Side]) -> None:
    a, b = sides
    handle = a.p2p.isend(np.arange(1000), B, 1)
    got = together(
        lambda: a.p2p.send(np.arange(3), B, 2, soon()),
        lambda: (b.p2p.recv(None, A, 1, soon()), b.p2p.recv(None, A, 2, soon())),
    )
    assert [len(array) for array in got] == [1000, 3]
    assert handle.test()


def test_a_cancelled_isend_is_never_delivered(sides: tuple[Side, Side]) -> None:
    a, b = sides
    big, small = a.p2p.isend(np.arange(1000), B, 1), a.p2p.isend(np.arange(3), B, 2)
    assert big.cancel()
    assert not big.cancel()
    with pytest.raises(PeerStalled, match="cancelled"):
        big.test()
    # The receiver cannot know that the rest will never come, until the next message does.
    assert together(lambda: small.push(soon()), lambda: b.p2p.discard(A, soon())) == 1
    recv = b.p2p.irecv(None, A, 2)
    while not (recv.test() and small.test()):
        pass
    assert not small.cancel()
    assert recv.array is not None
    assert np.array_equal(recv.array, np.arange(3))


def test_isend_waits_for_its_grant_in_wait_only(pod: str) -> None:
    a, b = Side(pod, A, B, None), Side(pod, B, A, None)
    a.learn(b)
    b.learn(a)
    handle = a.p2p.isend(np.arange(3), B, 1)
    assert not handle.test()
    with pytest.raises(PeerStalled, match="granted"):
        handle.wait(Deadline.after_ms(20))
    together(lambda: handle.wait(soon()), lambda: b.p2p.recv(None, A, 1, soon()))
    a.close()
    b.close()


def test_an_irecv_refuses_like_recv_and_goes_on(sides: tuple[Side, Side]) -> None:
    a, b = sides
    sent = a.p2p.isend(np.arange(4), B, 5)
    wrong = b.p2p.irecv(None, A, 6)
    with pytest.raises(EventMismatch):
        wrong.test()
    with pytest.raises(RuntimeError, match="pending"):
        b.p2p.recv(None, A, 5, soon())
    assert wrong.cancel()
    with pytest.raises(PeerStalled, match="cancelled"):
        wrong.test()
    short = b.p2p.irecv(np.zeros(1), A, 5)
    with pytest.raises(Truncated):
        short.test()
    assert short.cancel()
    assert len(b.p2p.irecv(None, A, 5).wait(soon())) == 4
    sent.wait(soon())
    with pytest.raises(PeerStalled, match="nothing arrived"):
        b.p2p.irecv(None, A, 7).wait(Deadline.after_ms(20))


def test_handles_of_a_dead_peer_fail(sides: tuple[Side, Side]) -> None:
    a, b = sides
    sent, received = a.p2p.isend(np.arange(4), B, 5), a.p2p.irecv(None, B, 1)
    assert not received.test()
    b.endpoint.close()
    with pytest.raises(PeerDied):
        sent.wait(soon())
    with pytest.raises(PeerDied):
        received.wait(soon())


def test_a_handle_does_not_outlive_the_incarnation_it_went_to(sides: tuple[Side, Side], pod: str) -> None:
    a, b = sides
    pushed, queued = a.p2p.isend(np.arange(4), B, 1), a.p2p.isend(np.arange(1000), B, 2)
    assert not pushed.test()
    b.endpoint.close()
    again = Side(pod, B, A, None, incarnation=2)
    a.learn(again)
    again.learn(a)
    with pytest.raises(RuntimeError, match="under way"):
        a.p2p.sender(B).send(np.arange(2), 3, soon())
    for handle in (pushed, queued):
        with pytest.raises(PeerDied):
            handle.wait(soon())
    assert not queued.cancel()
    got = together(lambda: a.p2p.send(np.arange(3), B, 3, soon()), lambda: again.p2p.recv(None, A, 3, soon()))
    assert len(got) == 3
    with pytest.raises(PeerDied, match="replaced"):
        pushed.test()
    again.close()


def test_a_message_whose_receiver_gave_up_fails_even_after_a_later_one_was_taken(
    sides: tuple[Side, Side],
) -> None:
    a, b = sides
    first = a.p2p.isend(np.arange(200), B, 1)  # needs more slots than the ring has
    half = b.p2p.irecv(None, A, 1)
    assert not half.test()
    assert half.cancel()
    while a.p2p.sender(B).queue:
        assert not first.test()
        b.p2p.probe(A)  # skips what is left over
    second = a.p2p.isend(np.arange(2), B, 2)
    assert len(b.p2p.recv(None, A, 2, soon())) == 2
    with pytest.raises(PeerStalled, match="gave the message up"):
        first.test()
    assert second.test()


def test_probe_tells_what_comes_and_takes_nothing(sides: tuple[Side, Side]) -> None:
    a, b = sides
    assert b.p2p.probe(A) is None
    sent = a.p2p.isend(np.zeros((2, 3), np.int16), B, 77)
    for _ in range(2):
        found = b.p2p.probe(A)
        assert found is not None
        assert (found[0], found[1].dtype, found[1].shape) == (77, np.int16, (2, 3))
    b.p2p.recv(None, A, 77, soon())
    sent.wait(soon())


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
    assert not a.p2p.sender(B)._taken(tail, 4)
    b.p2p.release(A, 4)
    assert a.p2p.sender(B)._taken(tail, 4)
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
    ends = [
        Endpoint(
            pod=pod,
            world=WORLD,
            me=me,
            incarnation=1,
            config=XcclConfig(num_lanes=4),
            p2p_peers=[peer],
            app_bytes=4 << 20,
        )
        for me, peer in ((A, B), (B, A))
    ]
    for end, other in (ends, ends[::-1]):
        end.learn(other.me, 1, other.segment.name)
    a, b = P2p(ends[0]), P2p(ends[1])
    b.accept(A)
    apps = [end.segment.array(end.segment.layout.app_offset, (4 << 20,), np.uint8) for end in ends]
    x = apps[0][3 : 3 + num_bytes]
    for event_id in range(20):
        x[:] = np.random.default_rng(event_id).integers(0, 256, num_bytes, np.uint8)
        out = np.zeros(num_bytes + 16, np.uint8)[event_id % 16 :][:num_bytes]
        handle = a.isend(x, B, event_id)
        assert b.recv(out, A, event_id, soon()) is out
        assert np.array_equal(out, x)
        handle.wait(soon())
    assert b.stats()[A, "recv"]["num_pulled"] == 20
    out = apps[1][64 : 64 + num_bytes]
    together(lambda: a.put(x, B, 0, 20, soon()), lambda: b.recv(out, A, 20, soon()))
    assert np.array_equal(out, x), "a put may be received into the app area that it lies in"
    for p2p, end in zip((a, b), ends, strict=True):
        p2p.close()
        end.close()


def can_read_processes() -> bool:
    """Whether the system has process_vm_readv and allows it here: an emulator may lack it, a container forbid it."""
    libc, source, target = ctypes.CDLL(None, use_errno=True), ctypes.c_uint64(7), ctypes.c_uint64()
    if not hasattr(libc, "process_vm_readv"):
        return False
    remote, local = ((ctypes.c_size_t * 2)(ctypes.addressof(word), 8) for word in (source, target))
    libc.process_vm_readv(os.getpid(), local, ctypes.c_ulong(1), remote, ctypes.c_ulong(1), ctypes.c_ulong(0))
    return target.value == source.value


@pytest.fixture
def readable(sides: tuple[Side, Side]) -> tuple[Side, Side]:
    """Sides whose first message is over: B has shown that it reads A's memory."""
    if not can_read_processes():
        pytest.skip("no process may read another's memory here: large arrays go through the ring")
    a, b = sides
    together(lambda: a.p2p.send(np.ones(3), B, 0, soon()), lambda: b.p2p.recv(None, A, 0, soon()))
    return a, b


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


@pytest.mark.parametrize("strategy", [None, Blocking()])
def test_a_sleeping_waiter_uses_no_cpu(sides: tuple[Side, Side]) -> None:
    """Of its own thread's CPU time, since others of this process may work meanwhile."""
    wait_s = 1.5
    before = time.thread_time()
    with pytest.raises(PeerStalled):
        sides[1].p2p.recv(None, A, 1, Deadline.after_ms(1000 * wait_s))
    assert time.thread_time() - before < wait_s / 20


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


def test_a_second_thread_is_refused(sides: tuple[Side, Side]) -> None:
    a, b = sides

    def busy() -> None:
        receiver = b.p2p.receiver(A)
        deadline = soon()
        while True:
            try:
                receiver._peek(0, deadline)
            except RuntimeError as error:
                assert "another thread" in str(error)
                break
            assert not deadline.expired()
        a.p2p.send(np.arange(3), B, 1, soon())

    assert len(together(busy, lambda: b.p2p.recv(None, A, 1, soon()))) == 3


def test_a_closed_link_opens_again_where_it_was(sides: tuple[Side, Side]) -> None:
    a, b = sides
    for turn in range(6):
        got = together(lambda: a.p2p.send(np.arange(3), B, 1, soon()), lambda: b.p2p.recv(None, A, 1, soon()))
        assert len(got) == 3
        (a if turn % 2 else b).p2p.close()
        a.p2p, b.p2p = P2p(a.endpoint), P2p(b.endpoint)


def test_open_refuses_offsets_outside_the_mappings() -> None:
    buffer = bytearray(8192)
    good: dict[str, Any] = {
        "ring_offset": 1024,
        "num_slots": 4,
        "slot_bytes": 128,
        "out_cell": 0,
        "in_cell": 64,
        "own_bell": 128,
        "peer_bell": 256,
        "incarnation": 1,
        "peer_incarnation": 1,
        "own_app": (0, 0),
        "peer_app": (0, 0),
        "pull_bytes_min": 1,
        "message_bytes_max": 1,
        "poll_ns": 1,
        "copy_lanes": 1,
        "read_bytes_min": 1,
        "pause_rounds": 1,
        "yield_ns": 1,
        "may_sleep": True,
    }
    end = _native.RecvEnd()
    end._open(buffer, buffer, **good)
    with pytest.raises(BufferError):
        buffer.extend(b"x")  # the end holds its mappings
    for field, bad in {
        "ring_offset": 8192 - 800,
        "num_slots": 2**21,
        "slot_bytes": 64,
        "out_cell": 8,
        "in_cell": 8192,
        "own_bell": 8190,
        "peer_bell": 2**63,
        "own_app": (0, 8193),
        "peer_app": (5, 4),
        "poll_ns": 0,
        "message_bytes_max": 2**63,
    }.items():
        with pytest.raises(ValueError, match=r"link|outside"):
            end._open(buffer, buffer, **good | {field: bad})
    end._close()
    buffer.extend(b"x")


def test_the_event_loop_sends_and_receives(sides: tuple[Side, Side]) -> None:
    a, b = sides

    async def talk() -> None:
        left, right = AsyncP2p(a.endpoint, a.p2p), AsyncP2p(b.endpoint, b.p2p)
        a.p2p.accept(B)
        try:
            for i in range(20):
                x = np.full(1 + 100 * i, i)
                back: list[Any] = await asyncio.gather(
                    right.recv(None, A, i, soon()),
                    left.recv(None, B, i, soon()),
                    left.send(x, B, i, soon()),
                    right.send(x + 1, A, i, soon()),
                )
                assert np.array_equal(back[0], x)
                assert np.array_equal(back[1], x + 1)
            with pytest.raises(PeerStalled, match="deadline"):
                await right.recv(None, A, 50, Deadline.after_ms(30))
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(right.recv(None, A, 50, soon()), 0.03)
            waiting = asyncio.ensure_future(right.recv(None, A, 51, soon()))
            await asyncio.sleep(0)
            right.close()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            with pytest.raises(RuntimeError, match="closed"):
                await right.recv(None, A, 50, soon())
        finally:
            left.close()
            right.close()

    asyncio.run(talk())


def test_a_death_reaches_the_event_loop(sides: tuple[Side, Side]) -> None:
    a, b = sides

    async def talk() -> None:
        right = AsyncP2p(b.endpoint, b.p2p)
        try:
            waiting = asyncio.ensure_future(right.recv(None, A, 1, soon()))
            await asyncio.sleep(0)
            a.endpoint.close()
            with pytest.raises(PeerDied):
                await waiting
        finally:
            right.close()

    asyncio.run(talk())
