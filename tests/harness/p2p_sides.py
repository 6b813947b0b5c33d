"""Two ranks of point-to-point in one process, each with what its process would have."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from bus.clock import Deadline
from bus.config import XcclConfig
from bus.memory.ring import RingLayout
from bus.memory.wait import WaitStrategy
from bus.xccl.endpoint import Endpoint, Rank, World
from bus.xccl.p2p import P2p

WORLD = World.of(attention=1, expert=1)
A, B = WORLD.ranks
APP_BYTES = 64 * 1024


def soon() -> Deadline:
    return Deadline.after_ms(20_000)


class Side:
    """One rank and its transport; `config` and what else differs from the default may be named."""

    def __init__(self, pod: str, me: Rank, *, pull_bytes_min: int = 1024, **changes: Any) -> None:
        arguments: dict[str, Any] = {
            "incarnation": 1,
            "config": XcclConfig(),
            "p2p_ring": RingLayout(num_slots=4, slot_bytes=256),
            "app_bytes": APP_BYTES,
        }
        self.endpoint = Endpoint(
            pod=pod, world=WORLD, me=me, p2p_peers=[B if me == A else A], **arguments | changes
        )
        self.p2p = P2p(self.endpoint, pull_bytes_min=pull_bytes_min)
        segment = self.endpoint.segment
        self.app = segment.array(segment.layout.app_offset, (segment.layout.app_bytes,), np.uint8)

    def learn(self, other: Side) -> None:
        self.endpoint.learn(other.endpoint.me, other.endpoint.incarnation, other.endpoint.segment.name)

    def close(self) -> None:
        self.p2p.close()
        self.endpoint.close()


def two_sides(pod: str, strategy: WaitStrategy | None = None, **changes: Any) -> tuple[Side, Side]:
    """A and B, who know each other."""
    a, b = (Side(pod, rank, strategy=strategy, **changes) for rank in (A, B))
    a.learn(b)
    b.learn(a)
    return a, b


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
