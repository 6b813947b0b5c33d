"""A sender or a receiver that dies at any point, a peer that is stopped: what the survivor sees.

Deadlines are far longer than any test may take, and their passing would be `PeerStalled`: a `PeerDied` comes from the
dead one's owner lock.
"""

from __future__ import annotations

import contextlib
import os
import signal
import struct
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bus.clock import Deadline
from bus.errors import PeerDied, PeerStalled
from bus.memory import _native
from bus.memory.ring import RECORD_BYTES, SLOTS_OFFSET
from bus.memory.segment import Segment, segment_name, segment_prefix, sweep, total_bytes
from bus.xccl.endpoint import P2P_ACK_LANE, P2P_DATA_LANE, Endpoint
from bus.xccl.p2p import P2p, SlowP2p
from tests.harness.reading import NO_READING, can_read_processes
from tests.litmus.p2p_child import (
    LAST_MESSAGE,
    LIVING,
    RECEIVER,
    REPEATS,
    RING,
    SENDER,
    endpoint_of,
    first_message,
    second_message,
    soon,
)

ONE_RECORD, MANY_RECORDS, READ_WHOLE = 64, 2000, 600_000  # the last is offered for reading, in lanes
NEEDS_READING = pytest.mark.skipif(not can_read_processes(), reason=NO_READING)
SIZES = pytest.mark.parametrize(
    "num_bytes",
    [ONE_RECORD, MANY_RECORDS, pytest.param(READ_WHOLE, marks=NEEDS_READING)],
    ids=["one-record", "many-records", "read-whole"],
)
SENDER_POINTS = ["claimed", "copied", "recorded", "cell-begun", "published", "rung"]
RECEIVER_POINTS = ["peeked", "copied-out", "cell-begun", "published", "rung", "acknowledging", "acknowledged"]
LANE_POINTS = ["block-copied"]
INVITER_POINTS = ["invited", "share-read"]
HELPER_POINTS = ["share-claimed", "share-claimed:3", "share-written", "share-written:2"]
PUBLISHED = ("published", "rung")
NUM_RECORDS_BEFORE = 4  # of the first message
Spawn = Callable[..., Any]


@pytest.fixture
def receiver(pod: str) -> Iterator[Endpoint]:
    endpoint = endpoint_of(RECEIVER, pod, 1)
    yield endpoint
    endpoint.close()


@pytest.fixture
def sender(pod: str) -> Iterator[Endpoint]:
    endpoint = endpoint_of(SENDER, pod, 1)
    yield endpoint
    endpoint.close()


class Peers:
    """Starts the other process of a link, in one incarnation after another."""

    def __init__(self, spawn: Spawn, endpoint: Endpoint, role: str, build: Path | None = None) -> None:
        self._spawn, self._endpoint, self._role, self._build = spawn, endpoint, role, build
        self._incarnation = 0

    def start(self, point: str = LIVING, num_bytes: int = MANY_RECORDS) -> Any:
        """Start the next incarnation, which dies at `point`; the endpoint learns its address."""
        self._incarnation += 1
        endpoint, build = self._endpoint, self._build
        args = (self._role, endpoint.pod, self._incarnation, endpoint.segment.name, point, num_bytes)
        child = self._spawn(*args, script="p2p_child.py", build=build)
        ready, name = child.line().split()
        assert ready == "ready"
        endpoint.learn(RECEIVER if endpoint.me == SENDER else SENDER, self._incarnation, name)
        return child


def assert_died_at(child: Any, point: str) -> None:
    assert child.line() == f"fault {point}", "it must die there, not somewhere else"
    assert child.wait() == -signal.SIGKILL


def assert_finished(child: Any) -> None:
    assert child.line() == "done"
    assert child.wait() == 0


def kill(child: Any) -> None:
    child.process.send_signal(signal.SIGKILL)
    child.process.wait(10)


def await_message(p2p: P2p) -> None:
    """Wait until a message has begun to arrive; consumes nothing."""
    while p2p.probe(SENDER) is None:
        assert p2p.receiver(SENDER)._wait(0, soon())


def receive_all(p2p: P2p, incarnation: int, num_bytes: int = MANY_RECORDS) -> None:
    """Receive the three messages of a sender, whole."""
    assert np.array_equal(p2p.recv(None, SENDER, 1, soon()), first_message(incarnation))
    assert np.array_equal(p2p.recv(None, SENDER, 2, soon()), second_message(num_bytes))
    assert np.array_equal(p2p.recv(None, SENDER, 3, soon()), LAST_MESSAGE)


def send_all(p2p: P2p, peers: Peers, num_bytes: int) -> None:
    """Send the three messages to the next incarnation of a receiver, and close."""
    next_one = peers.start(num_bytes=num_bytes)
    p2p.send(first_message(2), RECEIVER, 1, soon())
    p2p.send(second_message(num_bytes), RECEIVER, 2, soon())
    p2p.send(LAST_MESSAGE, RECEIVER, 3, soon())
    assert_finished(next_one)
    p2p.close()


# ------------------------------------------------------------------ the sender dies


@SIZES
@pytest.mark.parametrize("point", [*SENDER_POINTS, "reserved"])
def test_a_sender_killed_at_every_point(
    spawn: Spawn, receiver: Endpoint, faulty_build: Path, point: str, num_bytes: int
) -> None:
    """Before the tail is published nothing of the message is visible; afterwards a whole one is received first.

    One that is offered for reading is whole if it was read before its sender was gone.
    """
    p2p, peers = P2p(receiver), Peers(spawn, receiver, "sender", faulty_build)
    child = peers.start(point, num_bytes)
    assert np.array_equal(p2p.recv(None, SENDER, 1, soon()), first_message(1))
    if point in PUBLISHED and num_bytes != MANY_RECORDS:
        with contextlib.suppress(PeerDied) if num_bytes == READ_WHOLE else contextlib.nullcontext():
            assert np.array_equal(p2p.recv(None, SENDER, 2, soon()), second_message(num_bytes))
    with pytest.raises(PeerDied, match=r"rank expert-0, peer attention-0, event 0x2"):
        p2p.recv(None, SENDER, 2, soon())
    assert_died_at(child, point)
    if point not in PUBLISHED:
        assert p2p.probe(SENDER) is None, "nothing of it is visible"
    if point == "cell-begun":
        assert _native.load_u64(receiver.segment.buf, receiver.cell_from(SENDER, P2P_DATA_LANE)) == 0
    survivor = peers.start(num_bytes=num_bytes)
    receive_all(p2p, 2, num_bytes)
    assert_finished(survivor)
    p2p.close()


def test_a_sender_killed_at_each_chunk_of_a_message(
    spawn: Spawn, receiver: Endpoint, faulty_build: Path
) -> None:
    p2p, peers = P2p(receiver), Peers(spawn, receiver, "sender", faulty_build)
    for incarnation, chunk in enumerate((2, 5, 8), 1):
        child = peers.start(f"recorded:{chunk}")
        assert np.array_equal(p2p.recv(None, SENDER, 1, soon()), first_message(incarnation))
        with pytest.raises(PeerDied):
            p2p.recv(None, SENDER, 2, soon())
        assert_died_at(child, "recorded")
    p2p.close()


@pytest.mark.parametrize("point", ["claimed", "recorded", "published"])
def test_the_slow_sender_killed_at_every_point(spawn: Spawn, receiver: Endpoint, point: str) -> None:
    p2p, peers = P2p(receiver), Peers(spawn, receiver, "slow-sender")
    child = peers.start(point)
    assert np.array_equal(p2p.recv(None, SENDER, 1, soon()), first_message(1))
    with pytest.raises(PeerDied, match=r"rank expert-0, peer attention-0, event 0x2"):
        p2p.recv(None, SENDER, 2, soon())
    assert_died_at(child, point)
    orphan = segment_name(receiver.pod, "attention", 0, 1)
    assert sweep(segment_prefix(receiver.pod)) == [orphan]
    assert receiver.segment.owner_alive()


def test_every_incarnation_of_a_dying_sender_starts_afresh(spawn: Spawn, receiver: Endpoint) -> None:
    p2p, peers = P2p(receiver), Peers(spawn, receiver, "slow-sender")
    for incarnation, point in ((1, "published"), (2, "claimed")):
        child = peers.start(point)
        assert np.array_equal(p2p.recv(None, SENDER, 1, soon()), first_message(incarnation))
        with pytest.raises(PeerDied):
            p2p.recv(None, SENDER, 2, soon())
        assert_died_at(child, point)
    child = peers.start()
    receive_all(p2p, 3)
    assert_finished(child)


def test_a_sender_killed_while_its_message_is_half_through(spawn: Spawn, receiver: Endpoint) -> None:
    p2p = P2p(receiver)
    child = Peers(spawn, receiver, "sender").start()
    p2p.recv(None, SENDER, 1, soon())
    await_message(p2p)  # more chunks than slots: it waits for room
    kill(child)
    with pytest.raises(PeerDied):
        p2p.recv(None, SENDER, 2, soon())


@NEEDS_READING
def test_an_array_that_a_dead_sender_offered_for_reading_is_lost(spawn: Spawn, receiver: Endpoint) -> None:
    """Its memory went with it. The next incarnation offers its own, and its arrays are read there."""
    p2p, peers = P2p(receiver), Peers(spawn, receiver, "sender")
    child = peers.start(num_bytes=READ_WHOLE)
    assert np.array_equal(p2p.recv(None, SENDER, 1, soon()), first_message(1))
    await_message(p2p)
    kill(child)
    with pytest.raises(PeerDied, match=r"rank expert-0, peer attention-0, event 0x2"):
        p2p.recv(None, SENDER, 2, soon())
    survivor = peers.start(num_bytes=READ_WHOLE)
    receive_all(p2p, 2, READ_WHOLE)
    assert_finished(survivor)
    assert p2p.stats()[SENDER, "recv"]["num_pulled"] == 1
    p2p.close()


@NEEDS_READING
@pytest.mark.parametrize("form", [P2p, SlowP2p])
def test_a_sender_whose_memory_goes_before_its_lock_has_died(
    spawn: Spawn, receiver: Endpoint, form: type[P2p] | type[SlowP2p]
) -> None:
    """As for a moment at every death; here the lock stays until a child of the sender ends too."""
    p2p, slow = P2p(receiver), SlowP2p(receiver)
    child = Peers(spawn, receiver, "sender").start("leaves-its-lock", READ_WHOLE)
    p2p.recv(None, SENDER, 1, soon())
    await_message(p2p)
    kill(child)
    segment = Segment.attach(segment_name(receiver.pod, "attention", 0, 1))
    assert segment.owner_alive()
    segment.close()
    timer = threading.Timer(0.1, child.say, ["end"])
    timer.start()
    with pytest.raises(PeerDied, match="owner lock is free"):
        (p2p if form is P2p else slow).recv(None, SENDER, 2, soon())
    timer.join()


def test_a_whole_message_of_a_dead_sender_is_received_first(spawn: Spawn, receiver: Endpoint) -> None:
    p2p = P2p(receiver)
    child = Peers(spawn, receiver, "sender").start()
    p2p.recv(None, SENDER, 1, soon())
    p2p.recv(None, SENDER, 2, soon())
    await_message(p2p)
    kill(child)
    assert np.array_equal(p2p.recv(None, SENDER, 3, soon()), LAST_MESSAGE)
    with pytest.raises(PeerDied):
        p2p.recv(None, SENDER, 4, soon())


def invite(receiver: Endpoint, peer: str, into: np.ndarray) -> None:
    """Invite the sender to write all of its message, but for one share."""
    ring = receiver.ring_offset(SENDER)
    assert ring is not None
    at = ring + SLOTS_OFFSET + RING.slot_stride * (NUM_RECORDS_BEFORE % RING.num_slots) + RECORD_BYTES
    units = -(-into.nbytes // 4096)
    buf = receiver.segment.buf
    buf[at + 16 : at + 32] = struct.pack("=QII", into.ctypes.data, 4, units)
    _native.store_u32(buf, at + 12, 1)
    segment = Segment.attach(peer)
    segment.ring_doorbell()
    segment.close()


@NEEDS_READING
@pytest.mark.parametrize("point", HELPER_POINTS)
def test_a_sender_killed_while_it_shares_a_copy(
    spawn: Spawn, receiver: Endpoint, faulty_build: Path, point: str
) -> None:
    """What it claimed and wrote is no message: its memory, where the rest is, has gone with it."""
    p2p, peers = P2p(receiver), Peers(spawn, receiver, "sender", faulty_build)
    child = peers.start(point, READ_WHOLE)
    assert np.array_equal(p2p.recv(None, SENDER, 1, soon()), first_message(1))
    await_message(p2p)
    out = np.zeros(READ_WHOLE, np.uint8)
    invite(receiver, segment_name(receiver.pod, "attention", 0, 1), out)
    assert_died_at(child, point.split(":")[0])
    if point.startswith("share-written"):
        assert np.array_equal(out[-16_384:], second_message(READ_WHOLE)[-16_384:])
    assert not out[: 4 * 4096].any()
    with pytest.raises(PeerDied, match=r"rank expert-0, peer attention-0, event 0x2"):
        p2p.recv(out, SENDER, 2, soon())
    survivor = peers.start(num_bytes=READ_WHOLE)
    receive_all(p2p, 2, READ_WHOLE)
    assert_finished(survivor)
    p2p.close()


@NEEDS_READING
def test_a_sender_stopped_while_it_shares_a_copy(
    spawn: Spawn, receiver: Endpoint, faulty_build: Path
) -> None:
    """The receiver's deadline holds; its array outlives the call, for the sender may write to it when it goes on."""
    p2p, peers = P2p(receiver), Peers(spawn, receiver, "repeating-sender", faulty_build)
    child = peers.start("share-claimed~", READ_WHOLE)
    expected, num_received = second_message(READ_WHOLE), 0
    assert np.array_equal(p2p.recv(None, SENDER, 1, soon()), first_message(1))
    while True:
        out = np.zeros(READ_WHOLE, np.uint8)
        try:
            p2p.recv(out, SENDER, 2, Deadline.after_ms(500))
        except PeerStalled as error:
            if "while it wrote to the array" in str(error):
                break
            continue  # stalled before: the machine is busy
        assert np.array_equal(out, expected)
        num_received += 1
        assert num_received < REPEATS, "it never helped"
    assert child.line() == "fault share-claimed"
    kept = weakref.ref(out)
    del out
    assert kept() is not None
    assert np.array_equal(p2p.recv(None, SENDER, 2, soon()), expected), "received alone, into another array"
    child.process.send_signal(signal.SIGCONT)
    for _ in range(num_received + 1, REPEATS):
        assert np.array_equal(p2p.recv(None, SENDER, 2, soon()), expected)
    assert kept() is None
    assert_finished(child)
    p2p.close()


# ------------------------------------------------------------------ the receiver dies


@SIZES
@pytest.mark.parametrize("point", [*RECEIVER_POINTS, "viewed"])
def test_a_receiver_killed_at_every_point(
    spawn: Spawn, sender: Endpoint, faulty_build: Path, point: str, num_bytes: int
) -> None:
    """Its acknowledgement stands from its publication on; without one the sender learns who died.

    What it publishes in the middle of many records is only how far it is.
    """
    if point == "viewed":
        num_bytes = min(num_bytes, 200)  # what is looked at in place is one record
    p2p, peers = P2p(sender), Peers(spawn, sender, "receiver", faulty_build)
    child = peers.start(point, num_bytes)
    p2p.send(first_message(1), RECEIVER, 1, soon())
    if point == "acknowledged" or (point in PUBLISHED and num_bytes != MANY_RECORDS):
        p2p.send(second_message(num_bytes), RECEIVER, 2, soon())
    with pytest.raises(PeerDied, match=r"rank attention-0, peer expert-0, event 0x2"):
        p2p.send(second_message(num_bytes), RECEIVER, 2, soon())
    assert_died_at(child, point)
    if point == "cell-begun":
        assert _native.load_u64(sender.segment.buf, sender.cell_from(RECEIVER, P2P_ACK_LANE)) == 0
    send_all(p2p, peers, num_bytes)


@NEEDS_READING
@pytest.mark.parametrize("point", INVITER_POINTS)
def test_a_receiver_killed_while_it_shares_a_copy(
    spawn: Spawn, sender: Endpoint, faulty_build: Path, point: str
) -> None:
    """The sender, which may be writing into the memory of the dead one, learns who died."""
    p2p, peers = P2p(sender), Peers(spawn, sender, "receiver", faulty_build)
    child = peers.start(point, READ_WHOLE)
    p2p.send(first_message(1), RECEIVER, 1, soon())
    with pytest.raises(PeerDied, match=r"rank attention-0, peer expert-0, event 0x2"):
        p2p.send(second_message(READ_WHOLE), RECEIVER, 2, soon())
    assert_died_at(child, point)
    send_all(p2p, peers, READ_WHOLE)


@NEEDS_READING
def test_a_receiver_killed_in_the_middle_of_its_lanes(
    spawn: Spawn, sender: Endpoint, faulty_build: Path
) -> None:
    p2p, peers = P2p(sender), Peers(spawn, sender, "receiver", faulty_build)
    for point in LANE_POINTS:
        child = peers.start(point, READ_WHOLE)
        p2p.send(first_message(1), RECEIVER, 1, soon())
        with pytest.raises(PeerDied, match=r"rank attention-0, peer expert-0, event 0x2"):
            p2p.send(second_message(READ_WHOLE), RECEIVER, 2, soon())
        assert_died_at(child, point)
    send_all(p2p, peers, READ_WHOLE)


# ------------------------------------------------------------------ others


def test_a_stopped_sender_has_stalled_not_died_and_may_go_on(spawn: Spawn, receiver: Endpoint) -> None:
    p2p = P2p(receiver)
    child = Peers(spawn, receiver, "sender").start()
    child.process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, child.process.pid, os.WSTOPPED | os.WNOWAIT)
    with pytest.raises(PeerStalled, match="event 0x1"):
        p2p.recv(None, SENDER, 1, Deadline.after_ms(200))
    child.process.send_signal(signal.SIGCONT)
    receive_all(p2p, 1)


def test_a_receiver_without_an_address_or_a_segment_is_dead(receiver: Endpoint) -> None:
    p2p = P2p(receiver)
    with pytest.raises(PeerDied, match="not known"):
        p2p.send(np.zeros(3), SENDER, 1, soon())
    receiver.learn(SENDER, 4, segment_name(receiver.pod, "attention", 0, 4))
    with pytest.raises(PeerDied, match="does not exist"):
        p2p.recv(None, SENDER, 1, soon())


def test_sending_to_a_dead_owner_fails_by_its_lock(spawn: Spawn, receiver: Endpoint) -> None:
    p2p = P2p(receiver)
    child = Peers(spawn, receiver, "sender").start()
    p2p.recv(None, SENDER, 1, soon())
    kill(child)
    with pytest.raises(PeerDied, match="owner lock is free"):
        p2p.send(np.zeros(3), SENDER, 9, soon())


def test_a_segment_lives_as_long_as_its_owner_whoever_else_comes_and_goes(
    spawn: Spawn, segment: Segment, pod: str
) -> None:
    name = segment_name(pod, "expert", 9, 1)
    owner = spawn("owner", name, segment.name)
    assert owner.line() == "ready"
    visitor = spawn("ringer", name, 1)
    assert visitor.wait() == 0
    assert Path("/dev/shm", name[1:]).exists(), "a visitor that exits must not take the segment with it"
    peer = Segment.attach(name)
    assert peer.owner_alive()
    assert sweep(segment_prefix(pod)) == []
    held = total_bytes(segment_prefix(pod))
    kill(owner)
    assert not peer.owner_alive()
    assert sweep(segment_prefix(pod)) == [name]
    assert total_bytes(segment_prefix(pod)) == held - peer.layout.total_bytes
    peer.close()
