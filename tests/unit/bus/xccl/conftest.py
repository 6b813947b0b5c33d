"""Two sides of a link."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from bus.memory.wait import WaitStrategy
from tests.harness.p2p_sides import A, B, Side, soon, together, two_sides
from tests.harness.reading import NO_READING, can_read_processes


@pytest.fixture
def strategy() -> WaitStrategy | None:
    """How both sides wait; None = as configured."""
    return None


@pytest.fixture
def sides(pod: str, strategy: WaitStrategy | None) -> Iterator[tuple[Side, Side]]:
    """A and B; B accepts what A sends."""
    a, b = two_sides(pod, strategy)
    b.p2p.accept(A)
    yield a, b
    a.close()
    b.close()


@pytest.fixture
def readable(sides: tuple[Side, Side]) -> tuple[Side, Side]:
    """Sides whose first message is over: B has shown that it reads A's memory."""
    if not can_read_processes():
        pytest.skip(NO_READING)
    a, b = sides
    together(lambda: a.p2p.send(np.ones(3), B, 0, soon()), lambda: b.p2p.recv(None, A, 0, soon()))
    return a, b
