"""A sender that dies at any point, a receiver that dies, a peer that is stopped: what the survivor sees."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bus.clock import NS_PER_S, Deadline, now_ns
from bus.config import XcclConfig
from bus.errors import PeerDied, PeerStalled
from bus.memory.ring import RingLayout
from bus.memory.segment import Segment, segment_name, segment_prefix, sweep, total_bytes
from bus.xccl.endpoint import Endpoint, World
from bus.xccl.p2p import P2p

WORLD = World.of(attention=1, expert=1)
SENDER, RECEIVER = WORLD.ranks
Spawn = Callable[..., Any]


@pytest.fixture
def receiver(pod: str) -> Iterator[Endpoint]:
    endpoint = Endpoint(
        pod=pod,
        world=WORLD,
        me=RECEIVER,
        incarnation=1,
        config=XcclConfig(),
        p2p_peers=[SENDER],
        p2p_ring=RingLayout(num_slots=4, slot_bytes=256),
    )
    yield endpoint
    endpoint.close()


def start_sender(spawn: Spawn, endpoint: Endpoint, incarnation: int, fault_point: str) -> Any:
    child = spawn("sender", endpoint.pod, incarnation, endpoint.segment.name, fault_point)
    ready, name = child.line().split()
    assert ready == "ready"
    endpoint.learn(SENDER, incarnation, name)
    return child


def await_message(p2p: P2p) -> None:
    """Wait until a message has begun to arrive; consumes nothing."""
    while p2p.probe(SENDER) is None:
        assert p2p.receiver(SENDER)._wait(0, soon())


def soon() -> Deadline:
    return Deadline.after_ms(20_000)


@pytest.mark.parametrize("fault_point", ["claimed", "recorded", "published"])
def test_a_message_whose_sender_died_is_never_received(
    spawn: Spawn, receiver: Endpoint, fault_point: str
) -> None:
    p2p = P2p(receiver)
    child = start_sender(spawn, receiver, 1, fault_point)
    assert (p2p.recv(None, SENDER, 1, soon()) == 1).all()
    start_ns = now_ns()
    with pytest.raises(PeerDied, match=r"rank expert-0, peer attention-0, event 0x2"):
        p2p.recv(None, SENDER, 2, soon())
    assert now_ns() - start_ns < 10 * NS_PER_S, "death is noticed by the lock, not by the deadline"
    assert child.wait() == -signal.SIGKILL
    if fault_point != "published":
        assert p2p.probe(SENDER) is None, "nothing of it is visible"
    orphan = segment_name(receiver.pod, "attention", 0, 1)
    assert sweep(segment_prefix(receiver.pod)) == [orphan]
    assert receiver.segment.owner_alive()


def test_the_next_incarnation_of_a_dead_sender_starts_afresh(spawn: Spawn, receiver: Endpoint) -> None:
    p2p = P2p(receiver)
    for incarnation, fault_point in ((1, "published"), (2, "claimed"), (3, "none")):
        child = start_sender(spawn, receiver, incarnation, fault_point)
        first = p2p.recv(None, SENDER, 1, soon())
        assert (first == incarnation).all(), "a message of an older incarnation came through"
        if fault_point != "none":
            with pytest.raises(PeerDied):
                p2p.recv(None, SENDER, 2, soon())
    assert np.array_equal(p2p.recv(None, SENDER, 2, soon()), np.arange(2000))
    assert np.array_equal(p2p.recv(None, SENDER, 3, soon()), np.arange(3))
    assert child.line() == "sent"
    assert child.wait() == 0


def test_a_sender_killed_while_its_message_is_half_through(spawn: Spawn, receiver: Endpoint) -> None:
    p2p = P2p(receiver)
    child = start_sender(spawn, receiver, 1, "none")
    p2p.recv(None, SENDER, 1, soon())
    await_message(p2p)
    child.process.send_signal(signal.SIGKILL)
    child.process.wait(10)
    with pytest.raises(PeerDied):
        p2p.recv(None, SENDER, 2, soon())


def test_a_whole_message_of_a_dead_sender_is_received_first(spawn: Spawn, receiver: Endpoint) -> None:
    p2p = P2p(receiver)
    child = start_sender(spawn, receiver, 1, "none")
    p2p.recv(None, SENDER, 1, soon())
    p2p.recv(None, SENDER, 2, soon())
    await_message(p2p)
    child.process.send_signal(signal.SIGKILL)
    child.process.wait(10)
    assert np.array_equal(p2p.recv(None, SENDER, 3, soon()), np.arange(3))
    with pytest.raises(PeerDied):
        p2p.recv(None, SENDER, 4, soon())


def test_a_stopped_sender_has_stalled_not_died_and_may_go_on(spawn: Spawn, receiver: Endpoint) -> None:
    p2p = P2p(receiver)
    child = start_sender(spawn, receiver, 1, "none")
    child.process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, child.process.pid, os.WSTOPPED | os.WNOWAIT)
    with pytest.raises(PeerStalled, match="event 0x1"):
        p2p.recv(None, SENDER, 1, Deadline.after_ms(200))
    child.process.send_signal(signal.SIGCONT)
    assert (p2p.recv(None, SENDER, 1, soon()) == 1).all()
    assert np.array_equal(p2p.recv(None, SENDER, 2, soon()), np.arange(2000))


def test_a_receiver_without_an_address_or_a_segment_is_dead(receiver: Endpoint) -> None:
    p2p = P2p(receiver)
    with pytest.raises(PeerDied, match="not known"):
        p2p.send(np.zeros(3), SENDER, 1, soon())
    receiver.learn(SENDER, 4, segment_name(receiver.pod, "attention", 0, 4))
    with pytest.raises(PeerDied, match="does not exist"):
        p2p.recv(None, SENDER, 1, soon())


def test_sending_to_a_dead_owner_fails_by_its_lock(spawn: Spawn, receiver: Endpoint) -> None:
    p2p = P2p(receiver)
    child = start_sender(spawn, receiver, 1, "none")
    p2p.recv(None, SENDER, 1, soon())
    child.process.send_signal(signal.SIGKILL)
    child.process.wait(10)
    start_ns = now_ns()
    with pytest.raises(PeerDied, match="owner lock is free"):
        p2p.send(np.zeros(3), SENDER, 9, soon())
    assert now_ns() - start_ns < 10 * NS_PER_S


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
    owner.process.send_signal(signal.SIGKILL)
    owner.process.wait(10)
    assert not peer.owner_alive()
    assert sweep(segment_prefix(pod)) == [name]
    assert total_bytes(segment_prefix(pod)) == held - peer.layout.total_bytes
    peer.close()


@pytest.mark.parametrize("num_bytes", [64, 2000], ids=["one-record", "many-records"])
@pytest.mark.parametrize(
    "fault_point", [1, 2, 3, 4, 5], ids=["claimed", "copied", "recorded", "published", "rung"]
)
def test_a_sender_killed_inside_c(
    spawn: Spawn, receiver: Endpoint, faulty_extension: Path, fault_point: int, num_bytes: int
) -> None:
    """Before the tail is published nothing of the message is visible; afterwards a whole one is received first."""
    p2p = P2p(receiver)
    args = (receiver.pod, receiver.segment.name, fault_point, num_bytes)
    child = spawn("fast-sender", *args, extension=faulty_extension)
    receiver.learn(SENDER, 1, child.line().split()[1])
    assert np.array_equal(p2p.recv(None, SENDER, 1, soon()), np.arange(100))
    start_ns = now_ns()
    if fault_point >= 4 and num_bytes == 64:
        assert (p2p.recv(None, SENDER, 2, soon()) == 7).all()
    with pytest.raises(PeerDied):
        p2p.recv(None, SENDER, 2, soon())
    assert now_ns() - start_ns < 10 * NS_PER_S
    assert child.wait() == -signal.SIGKILL
    if fault_point < 4:
        assert p2p.probe(SENDER) is None, "nothing of it is visible"
    p2p.close()


def test_messages_that_testify(spawn: Spawn, receiver: Endpoint, cpus: list[set[int]]) -> None:
    """Every message has the size and content that follow from its number, on one core and on two."""
    seed, count = 5, 10_000
    child = spawn("streamer", receiver.pod, receiver.segment.name, seed, count, cpus=cpus[1])
    receiver.learn(SENDER, 1, child.line().split()[1])
    p2p = P2p(receiver)
    link, deadline = p2p.receiver(SENDER), Deadline.after_ms(60_000)
    for i, size in enumerate(np.random.default_rng(seed).integers(0, 200, count)):
        got = link.recv(None, i, deadline)
        assert got.shape == (size,)
        assert (got == i).all()
    assert child.wait() == 0
    p2p.close()
