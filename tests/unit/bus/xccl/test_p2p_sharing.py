"""Copies that sender and receiver share: the receiver reads the front of an array, the sender writes its back."""

from __future__ import annotations

import contextlib
import struct
import threading
from typing import Any

import numpy as np
import pytest

from bus.clock import Deadline
from bus.errors import XcclError
from bus.memory import _native
from bus.memory.layout import CELL_USED_BYTES, DOORBELL_OFFSET
from bus.memory.ring import RECORD_BYTES, SLOTS_OFFSET, RingLayout
from bus.xccl.endpoint import P2P_ACK_LANE
from bus.xccl.p2p import SHARED_BYTES_MIN, SlowP2p
from tests.harness.p2p_sides import A, B, Side, soon, together

UNIT = 4096
INVITED, TARGET, SHARES, HELPED = 12, 16, 24, 32
DONE, FAILED = 1, 2


def bytes_of(seed: int, num_bytes: int) -> Any:
    return np.random.default_rng(seed).integers(0, 256, num_bytes, np.uint8)


def shared_bytes(side: Side, peer: Any, way: str) -> int:
    return int(side.p2p.stats()[peer, way]["num_shared_bytes"])


def offer_at(b: Side) -> int:
    """Return where the payload of B's second record from A lies."""
    ring = b.endpoint.ring_offset(A)
    assert ring is not None
    return ring + SLOTS_OFFSET + RingLayout(4, 256).slot_stride + RECORD_BYTES


def await_message(b: Side) -> None:
    while b.p2p.probe(A) is None:
        assert b.p2p.receiver(A)._wait(0, soon())


def invite(a: Side, b: Side, target: int, front: int, back: int) -> None:
    """Invite A as B would, and wake it."""
    at, buf = offer_at(b), b.endpoint.segment.buf
    buf[at + TARGET : at + TARGET + 16] = struct.pack("=QII", target, front, back)
    _native.store_u32(buf, at + INVITED, 1)
    _native.ring_doorbell(a.endpoint.segment.buf, DOORBELL_OFFSET)


def await_helped(b: Side) -> int:
    while not (said := _native.load_u32(b.endpoint.segment.buf, offer_at(b) + HELPED)):
        pass
    return said


@pytest.mark.parametrize(
    "num_bytes", [SHARED_BYTES_MIN - 1, SHARED_BYTES_MIN, SHARED_BYTES_MIN + 1, 28_000, 123_457, 4 << 20]
)
def test_shared_or_not_every_byte_arrives(readable: tuple[Side, Side], num_bytes: int) -> None:
    a, b = readable
    for seed in range(20):
        x, out = bytes_of(seed, num_bytes + 40)[seed:][:num_bytes], np.zeros(num_bytes + 9, np.uint8)[9:]
        together(
            lambda x=x, at=seed: a.p2p.send(x, B, at, soon()),
            lambda out=out, at=seed: b.p2p.recv(out, A, at, soon()),
        )
        assert np.array_equal(out, x)
    assert shared_bytes(a, B, "send") == shared_bytes(b, A, "recv")
    assert b.p2p.stats()[A, "recv"]["num_pulled"] == 20


def test_arrays_of_the_app_area_are_shared_too(readable: tuple[Side, Side]) -> None:
    a, b = readable
    a.app[:] = bytes_of(1, a.app.size)
    target = np.zeros(a.app.size, np.uint8)

    def recv() -> None:
        await_message(b)
        invite(a, b, target.ctypes.data, 2, a.app.size // UNIT)
        assert await_helped(b) == DONE
        assert np.array_equal(b.p2p.recv(None, A, 1, soon()), a.app)

    together(lambda: a.p2p.send(a.app, B, 1, soon()), recv)
    assert np.array_equal(target[2 * UNIT :], a.app[2 * UNIT :])
    assert not target[: 2 * UNIT].any()
    together(
        lambda: a.p2p.send(a.app, B, 2, soon()),
        lambda: SlowP2p(b.endpoint).recv(None, A, 2, soon()),
    )


def test_the_sender_writes_what_it_is_invited_to_and_nothing_else(readable: tuple[Side, Side]) -> None:
    a, b = readable
    x, target = bytes_of(1, 40 * UNIT - 5), np.zeros(41 * UNIT, np.uint8)

    def recv() -> None:
        await_message(b)
        invite(a, b, target.ctypes.data, 7, 40)
        assert await_helped(b) == DONE
        assert np.array_equal(b.p2p.recv(None, A, 1, soon()), x), "an invitation stands once: read alone"

    together(lambda: a.p2p.send(x, B, 1, soon()), recv)
    assert np.array_equal(target[7 * UNIT : x.size], x[7 * UNIT :])
    assert not target[: 7 * UNIT].any()
    assert not target[x.size :].any()
    assert shared_bytes(a, B, "send") == x.size - 7 * UNIT
    assert shared_bytes(b, A, "recv") == 0


def test_memory_that_cannot_be_written_is_reported(readable: tuple[Side, Side]) -> None:
    a, b = readable
    x = bytes_of(1, 40 * UNIT)

    def recv() -> None:
        await_message(b)
        invite(a, b, UNIT, 0, 40)  # nobody has the second page
        assert await_helped(b) == FAILED
        assert np.array_equal(b.p2p.recv(None, A, 1, soon()), x)

    together(lambda: a.p2p.send(x, B, 1, soon()), recv)
    assert shared_bytes(a, B, "send") == 0


@pytest.mark.parametrize(("front", "back"), [(5, 4), (0, 41), (0, 2**32 - 1), (40, 40)])
def test_impossible_shares_are_not_written(readable: tuple[Side, Side], front: int, back: int) -> None:
    a, b = readable
    x, target = bytes_of(1, 40 * UNIT), np.zeros(64 * UNIT, np.uint8)

    def recv() -> None:
        await_message(b)
        invite(a, b, target.ctypes.data, front, back)
        assert np.array_equal(b.p2p.recv(None, A, 1, soon()), x)
        assert _native.load_u32(b.endpoint.segment.buf, offer_at(b) + HELPED) == 0

    together(lambda: a.p2p.send(x, B, 1, soon()), recv)
    assert not target.any()


@pytest.mark.parametrize("pid", [0, 1, 2**31 - 1, 2**63])
def test_a_process_that_has_not_the_nonce_is_not_written_to(readable: tuple[Side, Side], pid: int) -> None:
    a, b = readable
    proof = a.endpoint.cell_from(B, P2P_ACK_LANE) + CELL_USED_BYTES
    a.endpoint.segment.buf[proof + 16 : proof + 24] = struct.pack("=Q", pid)
    x, target = bytes_of(1, 40 * UNIT), np.zeros(40 * UNIT, np.uint8)

    def recv() -> None:
        await_message(b)
        invite(a, b, target.ctypes.data, 0, 40)
        assert np.array_equal(b.p2p.recv(None, A, 1, soon()), x)

    together(lambda: a.p2p.send(x, B, 1, soon()), recv)
    assert not target.any()


def test_a_peer_that_scribbles_over_the_shares_does_no_harm(readable: tuple[Side, Side]) -> None:
    """What is raised is an error of the library; the link goes on with the next message or the same one."""
    a, b = readable
    x, buf, at, is_over = bytes_of(1, 2 << 20), b.endpoint.segment.buf, offer_at(b), threading.Event()

    def scribble() -> None:
        rng = np.random.default_rng(0)
        while not is_over.is_set():
            if _native.load_u32(buf, at + INVITED) == 1:
                buf[at + SHARES : at + SHARES + 8] = rng.integers(0, 600, 2, np.uint32).tobytes()
                _native.store_u32(buf, at + HELPED, int(rng.integers(0, 4)))

    thread = threading.Thread(target=scribble)
    thread.start()
    try:
        for _ in range(5):
            with contextlib.suppress(XcclError):
                together(
                    lambda: _send_or_stall(a, x),
                    lambda: b.p2p.recv(np.zeros(x.size, np.uint8), A, 1, Deadline.after_ms(50)),
                )
    finally:
        is_over.set()
        thread.join(30)


def _send_or_stall(a: Side, x: Any) -> None:
    with contextlib.suppress(XcclError):
        a.p2p.send(x, B, 1, Deadline.after_ms(100))
