"""Ranks that share a core although another one is free: the highest of them goes there."""

from __future__ import annotations

import os
import struct

import numpy as np
import pytest

from bus.clock import Deadline
from bus.config import XcclConfig
from bus.errors import PeerStalled
from bus.xccl.alltoall import AllToAllShape
from bus.xccl.event import Event
from tests.harness.alltoall_world import AllToAllWorld

SHAPE = AllToAllShape(num_ranks=3)
POLLING = XcclConfig(spin_us=200, poll_interval_ms=5)
PLACE = struct.Struct("=I")
PLACE_OFFSET = 264
TRIES = 500

pytestmark = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")


def wait_in_vain(world: AllToAllWorld, rank: int, step: int) -> None:
    """Poll for ranks that do not come."""
    with pytest.raises(PeerStalled):
        world.ranks[rank].exchange_fixed(
            np.zeros((3, 1)), event=Event(step, 0), deadline=Deadline.after_ms(0.5), out=np.zeros((3, 1))
        )


def say(world: AllToAllWorld, rank: int, core: int) -> None:
    """What `rank` says about where it polls."""
    PLACE.pack_into(world.segments[rank].buf, PLACE_OFFSET, core + 1)


def play(world: AllToAllWorld, rank: int, others: list[int], *, until_moved: bool) -> int:
    """Let `rank` wait on a core that all others name; return how often it moved. The kernel may move it first."""
    allowed = os.sched_getaffinity(0)
    core = min(allowed)
    for step in range(1, TRIES if until_moved else 40):
        os.sched_setaffinity(0, {core})
        os.sched_setaffinity(0, allowed)
        for other in others:
            say(world, other, core)
        wait_in_vain(world, rank, step)
        assert os.sched_getaffinity(0) == allowed
        if until_moved and world.ranks[rank].stats()["moves"]:
            break
    return world.ranks[rank].stats()["moves"]


def test_the_highest_rank_of_a_full_core_moves_and_its_affinity_stays() -> None:
    with AllToAllWorld(SHAPE, config=POLLING) as world:
        assert play(world, 2, [0, 1], until_moved=True) == 1
        assert PLACE.unpack_from(world.segments[2].buf, PLACE_OFFSET)[0] - 1 in os.sched_getaffinity(0)


def test_a_lower_rank_leaves_that_to_the_highest() -> None:
    with AllToAllWorld(SHAPE, config=POLLING) as world:
        assert play(world, 1, [0, 2], until_moved=False) == 0


def test_two_ranks_on_two_cores_stay() -> None:
    with AllToAllWorld(SHAPE, config=POLLING) as world:
        say(world, 0, max(os.sched_getaffinity(0)))
        assert play(world, 2, [1], until_moved=False) == 0


def test_who_may_use_one_core_only_stays() -> None:
    allowed = os.sched_getaffinity(0)
    with AllToAllWorld(SHAPE, config=POLLING) as world:
        os.sched_setaffinity(0, {min(allowed)})
        try:
            assert play(world, 2, [0, 1], until_moved=False) == 0
        finally:
            os.sched_setaffinity(0, allowed)
