"""A rank that waits for others polls for as long as such waits take in general, and then sleeps."""

from __future__ import annotations

import struct
import threading

import numpy as np

from bus.clock import Deadline
from bus.config import XcclConfig
from bus.memory.segment import Segment
from bus.xccl.alltoall import AllToAllShape
from bus.xccl.event import Event
from tests.harness.alltoall_world import AllToAllWorld
from tests.harness.poll import eventually

SHAPE = AllToAllShape(num_ranks=2)
SLEEPERS = struct.Struct("=I")
SLEEPERS_OFFSET = 132


def is_asleep(segment: Segment) -> bool:
    return bool(SLEEPERS.unpack_from(segment.buf, SLEEPERS_OFFSET)[0])


def exchange(world: AllToAllWorld, rank: int, step: int) -> None:
    rows = np.full((2, 1), 10 * step + rank)
    found = world.ranks[rank].exchange_fixed(
        rows, event=Event(step, 0), deadline=Deadline.after_ms(20_000), out=np.zeros((2, 1), rows.dtype)
    )
    assert found[:, 0].tolist() == [10 * step, 10 * step + 1]


def test_who_is_late_finds_the_others_asleep_whatever_they_have_learned() -> None:
    with AllToAllWorld(SHAPE, config=XcclConfig(spin_us=200, poll_interval_ms=60_000)) as world:
        for step in range(1, 200):  # short waits first, so that polling has paid
            world.each(lambda rank: exchange(world, rank, step))  # noqa: B023
        for step in range(200, 230):
            before = world.ranks[0].stats()["sleeps"]
            early = threading.Thread(target=exchange, args=(world, 0, step))
            early.start()
            eventually(lambda: is_asleep(world.segments[0]), timeout_s=20, interval_s=0.001)
            exchange(world, 1, step)
            early.join(20)
            assert world.ranks[0].stats()["sleeps"] > before
