"""The data plane in an event loop."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from bus.clock import Deadline
from bus.errors import PeerDied, PeerStalled
from bus.xccl.aio import AsyncP2p
from tests.harness.p2p_sides import A, B, Side, soon


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
