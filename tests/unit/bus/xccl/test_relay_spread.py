"""A2E/E2A: ranks of a kind that share a core although another one is free: the highest of them goes there.

Peers do not exist here: what they would say about where they poll is written where they would write it.
"""

from __future__ import annotations

import os
import struct

import numpy as np
import pytest

from bus.clock import Deadline
from bus.config import XcclConfig
from bus.errors import PeerStalled
from bus.xccl.endpoint import Rank
from bus.xccl.event import Event
from bus.xccl.relay_layout import RelayShape
from tests.harness.relay_world import RelayWorld, raise_error

SHAPE = RelayShape(num_attention_ranks=3, num_expert_ranks=3, rows_max=1, num_slots=1, hidden=16)
POLLING = XcclConfig(spin_us=200, poll_interval_ms=5)
PLACE, PLACE_AT = struct.Struct("=I"), 32
X = np.ones((1, 16), np.float32)
EXPERT_0 = np.zeros((1, 1), np.int32)
TRIES, FEW = 500, 40

pytestmark = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")


def say(world: RelayWorld, owner: Rank, writer: int, core: int | None) -> None:
    """What `writer`, of the other kind than `owner`, says in the metadata of `owner`."""
    segment = world.segments[owner]
    at = segment.layout.cells_offset + 64 * writer * SHAPE.num_microbatches + PLACE_AT
    PLACE.pack_into(segment.buf, at, 0 if core is None else core + 1)


def said(world: RelayWorld, owner: Rank, writer: int) -> int:
    segment = world.segments[owner]
    return int(PLACE.unpack_from(segment.buf, segment.layout.cells_offset + 64 * writer + PLACE_AT)[0])


def attend(world: RelayWorld, rank: int, step: int) -> int:
    """Wait for an expert that does not answer; return how often this rank has moved."""
    side = world.attention[rank]
    handle = side.a2e_send(X, EXPERT_0, EXPERT_0, Event(step, 0))
    with pytest.raises(PeerStalled):
        side.e2a_recv(handle, np.zeros((1, 1, 16), np.float32), Deadline.after_ms(0.5))
    return side.stats()["moves"]


def serve(world: RelayWorld, rank: int, step: int) -> int:
    """Wait for attention ranks that send nothing more."""
    side = world.experts[rank]
    if step == 1:
        for other in range(SHAPE.num_attention_ranks):
            slot = np.full((1, 1), rank, np.int32)
            world.attention[other].a2e_send(X, slot, slot, Event(1, 0))
        assert len(side.poll(raise_error)) == SHAPE.num_attention_ranks
    side.wait(timeout_ns=500_000)
    return side.stats()["moves"]


def play(world: RelayWorld, rank: Rank, places: dict[Rank, int], *, until_moved: bool) -> int:
    """Let `rank` wait on the first core, while others say that they poll where `places` has it."""
    allowed = os.sched_getaffinity(0)
    cores = sorted(allowed)
    act = attend if rank.service == "attention" else serve
    moves = 0
    for step in range(1, TRIES if until_moved else FEW):
        os.sched_setaffinity(0, {cores[0]})
        os.sched_setaffinity(0, allowed)
        for kind, other_kind in (("attention", "expert"), ("expert", "attention")):
            for owner in range(3):
                for writer in range(3):
                    place = places.get(Rank(other_kind, writer))
                    if Rank(other_kind, writer) != rank:
                        say(world, Rank(kind, owner), writer, None if place is None else cores[place])
        moves = act(world, rank.index, step)
        assert os.sched_getaffinity(0) == allowed
        if until_moved and moves:
            break
    return moves


A, E = [Rank("attention", i) for i in range(3)], [Rank("expert", i) for i in range(3)]


@pytest.mark.parametrize("kind", [A, E], ids=["attention", "expert"])
def test_the_highest_rank_of_its_kind_on_a_full_core_moves(kind: list[Rank]) -> None:
    other_kind = E if kind is A else A
    with RelayWorld(SHAPE, config=POLLING) as world:
        places = {kind[0]: 0, kind[1]: 0, **dict.fromkeys(other_kind, 1)}  # the sum is even
        assert play(world, kind[2], places, until_moved=True) == 1
        assert said(world, other_kind[0], 2) - 1 in os.sched_getaffinity(0)


@pytest.mark.parametrize("kind", [A, E], ids=["attention", "expert"])
def test_a_lower_rank_leaves_that_to_the_highest(kind: list[Rank]) -> None:
    with RelayWorld(SHAPE, config=POLLING) as world:
        assert play(world, kind[1], {kind[0]: 0, kind[2]: 0}, until_moved=False) == 0


@pytest.mark.parametrize(("rank", "moves"), [(A[2], False), (E[2], True)], ids=["attention", "expert"])
def test_expert_ranks_make_up_for_an_odd_attention_rank(rank: Rank, moves: bool) -> None:
    """Two of either kind on one core and one on the other: the own kind alone would leave it so."""
    kind, other = (A, E) if rank.service == "attention" else (E, A)
    places = {kind[0]: 0, kind[1]: 1, other[0]: 0, other[1]: 0, other[2]: 1}
    with RelayWorld(SHAPE, config=POLLING) as world:
        assert play(world, rank, places, until_moved=moves) == int(moves)


def test_who_may_use_one_core_only_stays() -> None:
    allowed = os.sched_getaffinity(0)
    with RelayWorld(SHAPE, config=POLLING) as world:
        os.sched_setaffinity(0, {min(allowed)})
        try:
            assert play(world, A[2], {A[0]: 0, A[1]: 0}, until_moved=False) == 0
        finally:
            os.sched_setaffinity(0, allowed)


def test_impossible_places_are_not_counted() -> None:
    with RelayWorld(SHAPE, config=POLLING) as world:
        assert play(world, A[2], {A[0]: 0, A[1]: 0}, until_moved=True) == 1
        for owner in E:
            for writer in range(3):
                at = world.segments[owner].layout.cells_offset + 64 * writer + PLACE_AT
                PLACE.pack_into(world.segments[owner].buf, at, 0xFFFFFFFF)
        for step in range(TRIES, TRIES + FEW):
            attend(world, 2, step)
        assert world.attention[2].stats()["moves"] == 1
