"""Messages of several parts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bus.clock import Deadline
from bus.errors import PeerStalled
from tests.harness.p2p_sides import A, B, Side, soon, together


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
