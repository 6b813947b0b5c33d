"""The plain all-to-all of the same two arrays, again and again."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from bus.clock import Deadline
from bus.errors import PeerStalled, SegmentCorrupt, Truncated
from bus.xccl.alltoall import AllToAllShape, PersistentExchange
from bus.xccl.endpoint import Rank
from bus.xccl.event import STEP, Event
from tests.harness.alltoall_world import AllToAllWorld

SHAPE = AllToAllShape(num_ranks=3, stage_bytes=4096, area_bytes=1 << 14)
FIRST = Event(1, 0).pack()


@pytest.fixture
def world() -> Iterator[AllToAllWorld]:
    with AllToAllWorld(SHAPE) as world:
        yield world


def later() -> int:
    return Deadline.after_ms(20_000).at_ns


@pytest.mark.parametrize("width", [1, 64, 400, 1024], ids=["tiny", "small", "staged", "pulled"])
@pytest.mark.parametrize("in_area", [False, True])
def test_each_call_sends_what_the_array_holds_now(world: AllToAllWorld, width: int, in_area: bool) -> None:
    width = width if in_area or width <= 400 else 400

    def one(rank: int) -> None:
        side, shape = world.ranks[rank], (3, width)
        array = (
            side.area(shape, np.uint32) if in_area and 12 * width <= 1 << 14 else np.empty(shape, np.uint32)
        )
        out = np.zeros(shape, np.uint32)
        exchange = side.persistent(array, out).exchange
        for step in range(20):
            array[:] = 1000 * step + 10 * rank + np.arange(3)[:, None]
            exchange(FIRST + step * STEP, later())
            assert (out == (1000 * step + 10 * np.arange(3) + rank)[:, None]).all()

    world.each(one)


def test_it_may_alternate_with_other_exchanges_and_other_buffers(world: AllToAllWorld) -> None:
    def one(rank: int) -> None:
        side = world.ranks[rank]
        arrays = [np.full((3, 2), 10 * rank + i) for i in range(2)]
        outs = [np.zeros((3, 2), int) for _ in range(2)]
        persistent = [side.persistent(*pair) for pair in zip(arrays, outs, strict=True)]
        for step in range(1, 20, 3):
            persistent[0].exchange(Event(step, 0).pack(), later())
            rows = side.exchange_fixed(
                np.full((3, 1), rank), event=Event(step + 1, 0), deadline=Deadline.after_ms(20_000)
            )
            assert rows[:, 0].tolist() == [0, 1, 2]
            persistent[1].exchange(Event(step + 2, 0).pack(), later())
            assert [out[:, 1].tolist() for out in outs] == [[0, 10, 20], [1, 11, 21]]

    world.each(one)


def test_arrays_of_another_form_are_refused(world: AllToAllWorld) -> None:
    side, good = world.ranks[0], np.zeros((3, 2))
    read_only = np.zeros((3, 2))
    read_only.setflags(write=False)
    wrong = [
        (np.zeros((2, 2)), good),
        (good, np.zeros((2, 2))),
        (good, np.zeros((3, 3))),
        (good, np.zeros((3, 2), np.float32)),
        (good, np.zeros((2, 3)).T),
        (good, read_only),
    ]
    for array, out in wrong:
        with pytest.raises(
            ValueError, match=r"array, out: .* must be C-contiguous rows of one kind for 3 ranks"
        ):
            side.persistent(array, out)
    with pytest.raises(ValueError, match=r"array: .* must be a C-contiguous array of rows of numbers"):
        side.persistent(np.array([object()] * 3), good)


def test_both_arrays_are_held(world: AllToAllWorld) -> None:
    array, out = np.zeros((3, 2)), np.zeros((3, 2))
    persistent = world.ranks[0].persistent(array, out)
    for held in (array, out):
        with pytest.raises(ValueError, match="resize"):
            held.resize((9, 9))
    del persistent
    array.resize((9, 9), refcheck=False)


def persistent_of(world: AllToAllWorld, rank: int, width: int = 2) -> PersistentExchange:
    return world.ranks[rank].persistent(np.zeros((3, width)), np.zeros((3, width)))


def test_who_does_not_come_is_named_and_the_next_exchange_works(world: AllToAllWorld) -> None:
    sides = [persistent_of(world, rank) for rank in range(3)]
    with pytest.raises(PeerStalled, match="expert-1"):
        sides[0].exchange(FIRST, Deadline.after_ms(40).at_ns)
    world.each(lambda rank: sides[rank].exchange(FIRST + STEP, later()))
    assert world.ranks[0].stats()["failures"] == 1


def test_more_than_fits_is_refused_before_anything_is_sent(world: AllToAllWorld) -> None:
    large = persistent_of(world, 0, width=1024)
    with pytest.raises(Truncated, match="exceeds stage_bytes=4096"):
        large.exchange(FIRST, later())
    sides = [persistent_of(world, rank) for rank in range(3)]
    world.each(lambda rank: sides[rank].exchange(FIRST, later()))


def test_a_rank_that_gives_no_row_is_named(world: AllToAllWorld) -> None:
    def one(rank: int) -> None:
        if rank == 1:
            with pytest.raises(SegmentCorrupt, match=r"gave \[0, 1, 1\] parts instead of one each.*expert-0"):
                persistent_of(world, rank).exchange(FIRST, later())
        elif rank == 2:
            persistent_of(world, rank).exchange(FIRST, later())
        else:
            rows, counts, deadline = np.zeros((2, 2)), np.array([1, 0, 1]), Deadline.after_ms(20_000)
            world.ranks[0].exchange(rows, counts, event=Event.unpack(FIRST), deadline=deadline)

    world.each(one)


def test_a_new_incarnation_is_met_before_the_next_exchange(world: AllToAllWorld) -> None:
    sides = [persistent_of(world, rank) for rank in range(3)]
    world.each(lambda rank: sides[rank].exchange(FIRST, later()))
    again = world.create_segment(2, incarnation=2)
    for table in world.tables:
        table.learn(Rank("expert", 2), 2, again.name)
    world.ranks[2].close()
    del sides[2]
    world.segments[2].close()
    world.segments[2].unlink()
    world.segments[2] = again
    world.ranks[2] = world.open(2)
    sides.append(persistent_of(world, 2))
    world.each(lambda rank: sides[rank].exchange(FIRST + STEP, later()))
