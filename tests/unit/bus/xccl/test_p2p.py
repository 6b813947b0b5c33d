"""Point-to-point within one process: one thread per rank, every rule of the protocol by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from bus.clock import Deadline
from bus.config import XcclConfig
from bus.errors import (
    EventMismatch,
    PeerDied,
    PeerStalled,
    ResourceError,
    SegmentCorrupt,
    Truncated,
    XcclError,
)
from bus.memory import _native
from bus.memory.ring import SLOTS_OFFSET, RingLayout
from bus.xccl.endpoint import P2P_ACK_LANE, P2P_GRANT_LANE, Endpoint, Rank, World, stamp
from bus.xccl.p2p import P2p, SlowP2p

WORLD = World.of(attention=2, expert=2)
A, B = Rank("attention", 1), Rank("expert", 0)
Make = Callable[..., Endpoint]


def soon() -> Deadline:
    return Deadline.after_ms(20_000)


def at_once() -> Deadline:
    return Deadline.after_ms(30)


@pytest.fixture
def make(pod: str) -> Iterator[Make]:
    endpoints: list[Endpoint] = []

    def make_endpoint(me: Rank, peer: Rank, incarnation: int = 1, **changes: Any) -> Endpoint:
        arguments: dict[str, Any] = {
            "pod": pod,
            "world": WORLD,
            "me": me,
            "incarnation": incarnation,
            "config": XcclConfig(),
            "p2p_peers": [peer],
            "p2p_ring": RingLayout(num_slots=4, slot_bytes=256),
        }
        endpoints.append(Endpoint(**arguments | changes))
        return endpoints[-1]

    yield make_endpoint
    for endpoint in endpoints:
        endpoint.close()


class Pair:
    """A sends, B receives; `start` runs A's call in its own thread."""

    def __init__(self, a: Endpoint, b: Endpoint) -> None:
        self.a, self.b = a, b
        introduce(a, b)
        self.sender, self.receiver = P2p(a), P2p(b)
        self._pool = ThreadPoolExecutor(1)

    def arrived(self) -> int:
        """Wait until B sees A's next message and return its event id; consumes nothing."""
        deadline = soon()
        while (found := self.receiver.probe(A)) is None:
            assert self.receiver.receiver(A)._wait(0, deadline)
        return found[0]

    def start(
        self, array: np.ndarray[Any, Any], event_id: int, deadline: Deadline | None = None
    ) -> Future[None]:
        return self._pool.submit(self.sender.send, array, B, event_id, deadline or soon())

    def close(self) -> None:
        self._pool.shutdown()


def introduce(*endpoints: Endpoint) -> None:
    for one in endpoints:
        for other in endpoints:
            one.learn(other.me, other.incarnation, other.segment.name)


@pytest.fixture
def pair(make: Make) -> Iterator[Pair]:
    pair = Pair(make(A, B), make(B, A))
    yield pair
    pair.close()


def test_a_message_larger_than_the_ring_arrives_whole(pair: Pair) -> None:
    x = np.arange(10_000, dtype=np.float64).reshape(100, 100)
    sent = pair.start(x, 7)
    out = np.zeros_like(x)
    assert pair.receiver.recv(out, A, 7, soon()) is out
    assert np.array_equal(out, x)
    sent.result(20)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (16,), (17,), (1,) * 8])
def test_every_shape_travels(pair: Pair, shape: tuple[int, ...]) -> None:
    x = np.full(shape, 2.5, np.float32)
    sent = pair.start(x, 1)
    got = pair.receiver.recv(None, A, 1, soon())
    sent.result(20)
    assert (got.dtype, got.shape) == (x.dtype, x.shape)
    assert np.array_equal(got, x)


def test_read_only_arrays_may_be_sent(pair: Pair) -> None:
    x = np.arange(5)
    x.flags.writeable = False
    sent = pair.start(x, 1)
    assert np.array_equal(pair.receiver.recv(None, A, 1, soon()), x)
    sent.result(20)


def test_send_returns_only_after_recv(pair: Pair) -> None:
    pair.receiver.accept(A)
    sent = pair.start(np.zeros(3), 1)
    pair.arrived()
    assert not sent.done()
    pair.receiver.recv(None, A, 1, soon())
    sent.result(20)


def test_another_event_is_refused_and_stays(pair: Pair) -> None:
    sent = pair.start(np.arange(3), 5)
    for _ in range(2):
        with pytest.raises(
            EventMismatch, match=r"next message is event 0x5 .*rank expert-0, peer attention-1, event 0x6"
        ):
            pair.receiver.recv(None, A, 6, soon())
    assert np.array_equal(pair.receiver.recv(None, A, 5, soon()), np.arange(3))
    sent.result(20)


def test_discard_drops_one_message_and_lets_its_sender_go_on(pair: Pair) -> None:
    sent = pair.start(np.arange(3000), 5)
    assert pair.receiver.discard(A, soon()) == 5
    sent.result(20)
    sent = pair.start(np.arange(2), 6)
    assert np.array_equal(pair.receiver.recv(None, A, 6, soon()), np.arange(2))
    sent.result(20)


def test_a_buffer_that_does_not_fit_is_refused_and_the_message_stays(pair: Pair) -> None:
    x = np.arange(6, dtype=np.float32)
    sent = pair.start(x, 5)
    with pytest.raises(Truncated, match="24 bytes, the buffer 20"):
        pair.receiver.recv(np.zeros(5, np.float32), A, 5, soon())
    for out in (np.zeros(6, np.int32), np.zeros((2, 3), np.float32), np.zeros(7, np.float32)):
        with pytest.raises(ValueError, match="must be the message's"):
            pair.receiver.recv(out, A, 5, soon())
    with pytest.raises(ValueError, match="C-contiguous"):
        pair.receiver.recv(np.zeros(12, np.float32)[::2], A, 5, soon())
    assert np.array_equal(pair.receiver.recv(None, A, 5, soon()), x)
    sent.result(20)


@pytest.mark.parametrize(
    ("array", "rule"),
    [
        (np.zeros(8)[::2], "C-contiguous"),
        (np.zeros((1,) * 9), "dimensions"),
        (np.array([None]), "dtype"),
        (np.array(["a"]), "dtype"),
        (np.zeros(2, [("a", "f4")]), "dtype"),
        (np.zeros(2, "M8[s]"), "dtype"),
    ],
)
def test_arrays_that_cannot_travel_are_refused_before_anything_is_sent(
    pair: Pair, array: np.ndarray[Any, Any], rule: str
) -> None:
    with pytest.raises(ValueError, match=rule):
        pair.sender.send(array, B, 1, soon())


@pytest.mark.parametrize("event_id", [-1, 2**64])
def test_event_ids_are_u64(pair: Pair, event_id: int) -> None:
    with pytest.raises(ValueError, match="event_id"):
        pair.sender.send(np.zeros(1), B, event_id, soon())


def test_a_receiver_that_never_turned_to_the_sender_has_stalled(pair: Pair) -> None:
    with pytest.raises(PeerStalled, match="not granted a ring"):
        pair.sender.send(np.zeros(1), B, 1, at_once())


def test_a_receiver_that_does_not_drain_has_stalled(pair: Pair) -> None:
    pair.receiver.accept(A)
    with pytest.raises(PeerStalled, match="stayed full"):
        pair.sender.send(np.zeros(1000), B, 1, at_once())


def test_a_sender_that_is_silent_has_stalled(pair: Pair) -> None:
    with pytest.raises(PeerStalled, match="nothing arrived"):
        pair.receiver.recv(None, A, 1, at_once())


def test_a_message_that_was_given_up_by_its_sender_is_skipped(pair: Pair) -> None:
    pair.receiver.accept(A)
    with pytest.raises(PeerStalled):
        pair.sender.send(np.full(1000, 1), B, 1, at_once())
    sent = pair.start(np.full(1000, 2), 2)
    assert pair.arrived() == 1
    with pytest.raises(EventMismatch):
        pair.receiver.recv(None, A, 1, soon())
    assert (pair.receiver.recv(None, A, 2, soon()) == 2).all()
    sent.result(20)


def test_a_retry_under_the_same_event_replaces_the_half_message(pair: Pair) -> None:
    pair.receiver.accept(A)
    with pytest.raises(PeerStalled):
        pair.sender.send(np.full(1000, 1), B, 1, at_once())
    sent = pair.start(np.full(500, 2), 1)
    got = pair.receiver.recv(None, A, 1, soon())
    assert got.shape == (500,)
    assert (got == 2).all()
    sent.result(20)


def test_a_message_that_was_given_up_by_its_receiver_fails_at_the_sender(pair: Pair) -> None:
    pair.receiver.accept(A)
    sent = pair.start(np.full(60, 1), 1)  # two chunks: the whole message fits the ring
    pair.arrived()
    # A receiver that stalled in the middle has consumed the first chunk and forgotten it: so does this one.
    slow = SlowP2p(pair.b).incoming(A, 1)
    slow.await_record(1, soon())
    slow.release()
    slow._publish()
    pair.receiver = P2p(pair.b)
    with pytest.raises(PeerStalled, match="nothing arrived"):
        pair.receiver.recv(None, A, 2, Deadline.after_ms(300))
    with pytest.raises(PeerStalled, match="gave the message up"):
        sent.result(20)
    sent = pair.start(np.full(3, 2), 2)
    assert (pair.receiver.recv(None, A, 2, soon()) == 2).all()
    sent.result(20)


def test_only_named_peers_have_a_ring(pair: Pair) -> None:
    with pytest.raises(ValueError, match=r"expert-1 has no ring at expert-0"):
        pair.receiver.recv(None, Rank("expert", 1), 1, soon())


def test_a_closed_peer_is_dead_until_its_next_incarnation_is_known(pair: Pair, make: Make) -> None:
    sent = pair.start(np.zeros(1), 1)
    pair.receiver.recv(None, A, 1, soon())
    sent.result(20)
    pair.b.close()
    with pytest.raises(PeerDied, match="owner lock"):
        pair.sender.send(np.zeros(1), B, 2, soon())
    again = make(B, A, incarnation=2)
    introduce(again, pair.a)
    receiver = P2p(again)
    sent = pair.start(np.full(2000, 3), 3)
    assert (receiver.recv(None, A, 3, soon()) == 3).all()
    sent.result(20)


def test_a_wait_ends_when_a_newer_incarnation_becomes_known(pair: Pair) -> None:
    pair.receiver.accept(A)
    sent = pair.start(np.zeros(1), 1)
    pair.arrived()
    pair.a.learn(B, 2, "/xds-somewhere-else")
    with pytest.raises(PeerDied, match="incarnation 2 has replaced it"):
        sent.result(20)


def test_older_addresses_are_ignored(pair: Pair) -> None:
    pair.a.learn(B, 0, "/xds-older")
    pair.a.learn(B, 1, "/xds-same-incarnation")
    address = pair.a.address(B)
    assert address is not None
    assert address.segment == pair.b.segment.name


def test_a_segment_of_another_identity_is_corrupt(pair: Pair) -> None:
    pair.a.learn(B, 9, pair.b.segment.name)
    with pytest.raises(SegmentCorrupt, match=r"belongs to expert-0\.1"):
        pair.sender.send(np.zeros(1), B, 1, soon())


@pytest.mark.parametrize(
    ("offset", "geometry"),
    [
        (0, 4 << 32 | 256),
        (2**63, 4 << 32 | 256),
        (None, 0),
        (None, 2**20 << 32 | 256),
        (None, 4 << 32 | 64),
        (4, None),
    ],
)
def test_a_grant_outside_the_managed_area_is_corrupt(
    pair: Pair, offset: int | None, geometry: int | None
) -> None:
    own, managed = pair.a.segment, pair.b.segment.layout.managed_offset
    cell = pair.a.cell_from(B, P2P_GRANT_LANE)
    base = managed + offset if offset == 4 else managed if offset is None else offset
    _native.write_cell(own.buf, cell, stamp(1, 1), 1, base, 4 << 32 | 256 if geometry is None else geometry)
    with pytest.raises(SegmentCorrupt, match="grant"):
        pair.sender.send(np.zeros(1), B, 1, soon())


def acknowledge(pair: Pair, position: int) -> None:
    """Write, in B's name, that it has taken all up to `position`."""
    cell = pair.a.cell_from(B, P2P_ACK_LANE)
    _native.write_cell(pair.a.segment.buf, cell, stamp(1, 99), 1, position, position)
    pair.a.segment.ring_doorbell()


def test_an_ack_beyond_the_tail_is_corrupt(pair: Pair) -> None:
    pair.receiver.accept(A)
    sent = pair.start(np.zeros(1), 1)
    pair.arrived()
    acknowledge(pair, 50)
    with pytest.raises(SegmentCorrupt, match="beyond tail"):
        sent.result(20)


def test_an_ack_that_goes_back_is_corrupt(pair: Pair) -> None:
    sent = pair.start(np.zeros(1), 1)
    pair.receiver.recv(None, A, 1, soon())
    sent.result(20)
    sent = pair.start(np.zeros(1), 2)
    pair.arrived()
    acknowledge(pair, 0)
    with pytest.raises(SegmentCorrupt, match="head 0 after 1 does not fit tail 2 and 4 slots"):
        sent.result(20)


@pytest.mark.parametrize(
    ("at", "bad", "text"),
    [
        (24, b"<q9\0", "dtype"),
        (24, b"<i3\0", "unknown"),
        (28, b"\x09", "9 dimensions"),
        (29, b"\0", "kind"),
        (32, b"\xff" * 8, "num_bytes"),
        (40, b"\x01", "shape"),
        (0, b"\x07", "position 0 says 7"),
        (8, b"\xff\xff\xff\xff", "record of 4294967295 bytes"),
        (8, b"\x09", "chunk 0 has 9 bytes of 8"),
    ],
)
def test_a_damaged_record_is_corrupt(pair: Pair, at: int, bad: bytes, text: str) -> None:
    pair.receiver.accept(A)
    sent = pair.start(np.zeros(1), 1)
    pair.arrived()
    offset = pair.b.ring_offset(A)
    assert offset is not None
    at += offset + SLOTS_OFFSET
    good = bytes(pair.b.segment.buf[at : at + len(bad)])
    pair.b.segment.buf[at : at + len(bad)] = bad
    with pytest.raises(SegmentCorrupt, match=text):
        pair.receiver.recv(None, A, 1, soon())
    pair.b.segment.buf[at : at + len(bad)] = good
    pair.receiver.recv(None, A, 1, soon())
    sent.result(20)


def test_announcements_beyond_the_bound_are_refused_before_allocating(pair: Pair) -> None:
    receiver = P2p(pair.b, message_bytes_max=100)
    sent = pair.start(np.zeros(100), 1, Deadline.after_ms(300))
    with pytest.raises(SegmentCorrupt, match="num_bytes: 800"):
        receiver.recv(None, A, 1, soon())
    with pytest.raises(PeerStalled):
        sent.result(20)


def test_every_error_names_rank_peer_and_event(pair: Pair) -> None:
    with pytest.raises(XcclError) as caught:
        pair.receiver.recv(None, A, 0xABC, at_once())
    error = caught.value
    assert (error.rank, error.peer, error.event_id) == ("expert-0", "attention-1", 0xABC)
    assert "(rank expert-0, peer attention-1, event 0xabc)" in str(error)


def test_an_endpoint_refuses_what_the_pod_may_not_hold(make: Make) -> None:
    with pytest.raises(ResourceError, match="shared_bytes_max 4096"):
        make(A, B, config=XcclConfig(shared_bytes_max=4096))
    with pytest.raises(ValueError, match="num_lanes"):
        make(A, B, num_lanes=1)
    with pytest.raises(ValueError, match="slot_bytes"):
        P2p(make(A, B, p2p_ring=RingLayout(4, 64)))


def test_the_world_gives_every_rank_one_slot() -> None:
    assert [WORLD.slot(rank) for rank in WORLD.ranks] == list(range(len(WORLD))) == [0, 1, 2, 3]
    assert [str(rank) for rank in WORLD.ranks] == ["attention-0", "attention-1", "expert-0", "expert-1"]
    with pytest.raises(ValueError, match="distinct"):
        World([A, A])
