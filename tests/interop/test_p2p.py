"""The library and a second implementation, written from bus/README.md, talk to each other in real processes."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from bus.clock import Deadline
from bus.config import XcclConfig
from bus.errors import EventMismatch, PeerDied, SegmentCorrupt
from bus.memory.ring import RingLayout
from bus.memory.segment import Segment, segment_name
from bus.xccl.endpoint import Endpoint, World
from bus.xccl.p2p import P2p, SlowP2p
from tests.harness.reading import can_read_processes
from tests.interop import second, second_reach
from tests.interop.conftest import Peer

WORLD = World.of(attention=1, expert=1)
US, THEM = WORLD.ranks
SHAPES: list[tuple[str, tuple[int, ...]]] = [
    ("<f4", (3,)),
    ("<f8", ()),
    ("<i8", (0, 5)),
    ("|b1", (7,)),
    ("<c16", (2, 3)),
    ("<f4", (2, 1, 3, 1, 2)),
    ("<u2", (1, 2, 1, 2, 1, 2, 1, 29)),
    ("<f4", (4, 16)),
    ("<f4", (1000,)),
    ("|u1", (128,)),
    ("|u1", (129,)),
    (">i4", (40, 40)),
]


@pytest.fixture(params=[(2, 128), (3, 192), (8, 1000)], ids=str)
def ring(request: pytest.FixtureRequest) -> RingLayout:
    return RingLayout(*request.param)


@pytest.fixture
def endpoint(pod: str, ring: RingLayout) -> Iterator[Endpoint]:
    own = Endpoint(
        pod=pod,
        world=WORLD,
        me=US,
        incarnation=5,
        config=XcclConfig(),
        p2p_peers=[THEM],
        p2p_ring=ring,
        app_bytes=1 << 20,
    )
    yield own
    own.close()


@pytest.fixture
def start(pod: str, endpoint: Endpoint, launch: Callable[..., Peer]) -> Callable[..., Peer]:
    """Start a peer with a ring of the same geometry, and learn its address."""

    def run(role: str, incarnation: int = 9, **config: object) -> Peer:
        name = segment_name(pod, THEM.service, THEM.index, incarnation)
        geometry = {"num_slots": endpoint.p2p_ring.num_slots, "slot_bytes": endpoint.p2p_ring.slot_bytes}
        own = {"name": name, "incarnation": incarnation, "peer": endpoint.segment.name}
        peer = launch("second_child", role, {**own, **geometry, **config})
        endpoint.learn(THEM, incarnation, name)
        return peer

    return run


def soon() -> Deadline:
    return Deadline.after_ms(20_000)


def sample(dtype: str, shape: tuple[int, ...], seed: int) -> npt.NDArray[Any]:
    values = np.random.default_rng(seed).integers(0, 2 if dtype == "|b1" else 100, shape)
    return np.ascontiguousarray(values.astype(np.dtype(dtype))).reshape(shape)


@pytest.mark.parametrize("form", [P2p, SlowP2p])
def test_every_array_comes_back_bit_for_bit(
    endpoint: Endpoint, start: Callable[..., Peer], form: type[P2p] | type[SlowP2p]
) -> None:
    """Both directions, every shape twice, over rings of 2 to 8 slots that wrap; both ends open again in
    between."""
    arrays = [sample(*case, seed=i) for i, case in enumerate(SHAPES * 2)]
    peer = start("echo", count=len(arrays))
    p2p = form(endpoint)
    for i, array in enumerate(arrays):
        p2p.send(array, THEM, 1000 + i, soon())
        back = p2p.recv(None, THEM, 2000 + i, soon())
        assert (back.dtype.str, back.shape) == (array.dtype.str, array.shape)
        assert back.tobytes() == array.tobytes()
    assert peer.line() == {"done": True}
    peer.finish()


def test_parts_come_back_in_order(endpoint: Endpoint, start: Callable[..., Peer]) -> None:
    peer = start("echo", count=1)
    parts = [sample(*case, seed=i) for i, case in enumerate(SHAPES)]
    p2p = P2p(endpoint)
    p2p.send_parts(parts, THEM, 1000, soon())
    back = p2p.recv_parts(THEM, 2000, soon())
    assert [(b.dtype.str, b.shape, b.tobytes()) for b in back] == [
        (a.dtype.str, a.shape, a.tobytes()) for a in parts
    ]
    assert peer.line() == {"done": True}
    peer.finish()


def test_large_arrays_are_pulled_both_ways(endpoint: Endpoint, start: Callable[..., Peer]) -> None:
    peer = start("echo-pulled", count=3)
    p2p = P2p(endpoint, pull_bytes_min=1024)
    shapes: list[tuple[int, ...]] = [(512,), (16, 32), (1, 2, 2, 2, 2, 32)]
    for i, shape in enumerate(shapes):
        array = endpoint.segment.array(endpoint.segment.layout.app_offset + 8192 * i, shape, np.float32)
        array[...] = sample("<f4", shape, seed=i)
        p2p.send(array, THEM, 1000 + i, soon())
        assert p2p.recv(None, THEM, 2000 + i, soon()).tobytes() == array.tobytes()
    assert [counters["num_pulled"] for counters in p2p.stats().values()] == [3, 3]
    assert peer.line() == {"done": True}
    peer.finish()


@pytest.mark.skipif(
    not (second_reach.is_possible() and can_read_processes()), reason="needs libatomic and process_vm_readv"
)
def test_arrays_are_read_in_the_sender_s_memory_both_ways(
    endpoint: Endpoint, start: Callable[..., Peer]
) -> None:
    """Small and large, with more dimensions than the tag has room for; large ones are perhaps copied by both."""
    peer = start("echo-read", count=8)
    p2p = P2p(endpoint, read_bytes_min=1024)
    shapes: list[tuple[int, ...]] = [(512,), (2, 1, 3, 1, 100), (1 << 18,), (1 << 20,)]
    for i, shape in enumerate(shapes * 2):
        array = sample("<f4", shape, seed=i)
        p2p.send(array, THEM, 1000 + i, soon())
        back = p2p.recv(None, THEM, 2000 + i, soon())
        assert back.shape == array.shape and back.tobytes() == array.tobytes()
    found = peer.line()
    assert (found["received"], found["sent"]) == (7, 7)  # the first of each way proves that it can be done
    counters = p2p.stats()
    assert [one["num_pulled"] for one in counters.values()] == [7, 7]
    assert (counters[THEM, "recv"]["num_shared_bytes"] > 0) == (found["helped"] > 0)
    assert peer.line() == {"done": True}
    peer.finish()


def test_what_was_put_is_found(endpoint: Endpoint, start: Callable[..., Peer]) -> None:
    peer = start("receive", count=1)
    P2p(endpoint).put(np.arange(300, dtype=np.uint8).astype(np.uint8), THEM, 640, 1000, soon())
    assert peer.line()["bytes"] == bytes(i % 256 for i in range(300)).hex()


def test_the_library_s_death_is_noticed(endpoint: Endpoint, start: Callable[..., Peer]) -> None:
    """The owner lock is free as soon as the endpoint is closed; what it had sent before is delivered first."""
    peer = start("receive", count=1)
    P2p(endpoint).send(np.full(5, 7, np.uint8), THEM, 1000, soon())
    endpoint.close()
    assert peer.line() == {"event": 1000, "bytes": "0707070707"}
    assert peer.line()["error"] == "PeerDied"
    peer.finish()


def test_its_death_is_noticed_and_the_next_incarnation_begins_at_zero(
    endpoint: Endpoint, start: Callable[..., Peer]
) -> None:
    """The first life is killed in the middle of its message; nothing of it reaches the second life's
    messages."""
    p2p = P2p(endpoint)
    for incarnation in (9, 10):
        peer = start("send", incarnation, count=3)
        for i in range(3):
            words = p2p.recv(None, THEM, 1000 + i, soon())
            assert set(words.tolist()) == {incarnation << 16 | i}
        peer.process.kill()
        with pytest.raises(PeerDied):
            while True:  # the message with event id 1 may have got there whole
                p2p.recv(None, THEM, 1, soon())


def test_another_event_id_leaves_the_message(endpoint: Endpoint, start: Callable[..., Peer]) -> None:
    peer = start("send", count=1)
    p2p = P2p(endpoint)
    with pytest.raises(EventMismatch):
        p2p.recv(None, THEM, 77, soon())
    assert p2p.recv(None, THEM, 1000, soon()).size == 300
    assert p2p.discard(THEM, soon()) == 1
    assert peer.line() == {"done": True}
    peer.finish()


def test_either_refuses_a_header_that_is_wrong(endpoint: Endpoint) -> None:
    """Each word of the header that the page names, spoiled in a copy of the file: both refuse it."""
    good = bytes(endpoint.segment.buf[:4096])
    size = endpoint.segment.layout.total_bytes
    second.check_header("good", good, size)
    words = [(0, 1), (8, 1), (12, 1), *((offset, 4096) for offset in range(64, 120, 8))]
    for offset, amount in words:
        bad = bytearray(good)
        struct.pack_into("=Q", bad, offset, struct.unpack_from("=Q", good, offset)[0] + amount)
        with pytest.raises(second.SegmentCorrupt):
            second.check_header("bad", bytes(bad), size)
        with pytest.raises(SegmentCorrupt):
            _attach_copy(endpoint.segment.name + "x", bytes(bad), size)


def _attach_copy(name: str, head: bytes, size: int) -> None:
    path = Path(f"/dev/shm{name}")
    try:
        with path.open("wb") as file:
            file.truncate(size)
            file.write(head)
        Segment.attach(name).close()
    finally:
        path.unlink()
