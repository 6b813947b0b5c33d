"""The ends of a link: strategies to wait, threads, closing and opening."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from bus.clock import Deadline
from bus.errors import PeerStalled
from bus.memory import _native
from bus.memory.ring import RingLayout
from bus.memory.wait import Adaptive, Blocking, Spin, Yielding
from bus.xccl.p2p import P2p
from tests.harness.p2p_sides import A, B, Side, soon, together, two_sides


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


@pytest.mark.parametrize("strategy", [None, Blocking()])
def test_a_sleeping_waiter_uses_no_cpu(sides: tuple[Side, Side]) -> None:
    """Of its own thread's CPU time, since others of this process may work meanwhile."""
    wait_s = 1.5
    before = time.thread_time()
    with pytest.raises(PeerStalled):
        sides[1].p2p.recv(None, A, 1, Deadline.after_ms(1000 * wait_s))
    assert time.thread_time() - before < wait_s / 20


def test_chunks_so_long_that_the_interpreter_goes_on_meanwhile(pod: str) -> None:
    a, b = two_sides(pod, p2p_ring=RingLayout(num_slots=2, slot_bytes=64 * 1024))
    x = np.random.default_rng(3).integers(0, 256, 300_001, np.uint8)
    b.p2p.accept(A)
    handle = a.p2p.isend(x, B, 1)
    got = together(lambda: handle.wait(soon()), lambda: b.p2p.recv(None, A, 1, soon()))
    assert np.array_equal(got, x)
    assert b.p2p.stats()[A, "recv"]["num_pulled"] == 0
    a.close()
    b.close()


def test_a_second_thread_is_refused(sides: tuple[Side, Side]) -> None:
    a, b = sides

    def busy() -> None:
        receiver = b.p2p.receiver(A)
        deadline = soon()
        while True:
            try:
                receiver._look(0, deadline)
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
        "shared_bytes_min": 1,
        "pause_rounds": 1,
        "yield_ns": 1,
        "may_sleep": True,
        "own_place": 512,
        "peer_place": 516,
        "is_first": True,
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
        "own_place": 514,
        "peer_place": 8192,
        "own_app": (0, 8193),
        "peer_app": (5, 4),
        "poll_ns": 0,
        "message_bytes_max": 2**63,
    }.items():
        with pytest.raises(ValueError, match=r"link|outside"):
            end._open(buffer, buffer, **good | {field: bad})
    end._close()
    buffer.extend(b"x")
