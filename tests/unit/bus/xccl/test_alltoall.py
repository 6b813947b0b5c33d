"""The plain all-to-all in one process: forms, contracts, late and lost peers, impossible words."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from bus.clock import Deadline
from bus.errors import EventMismatch, PeerDied, PeerStalled, SegmentCorrupt, Truncated
from bus.memory import _native
from bus.xccl.alltoall import AllToAllShape
from bus.xccl.event import Event
from bus.xccl.reference import all_to_all
from tests.harness.alltoall_world import AllToAllWorld

SHAPE = AllToAllShape(num_ranks=3, stage_bytes=4096, area_bytes=8192)


@pytest.fixture
def world() -> Iterator[AllToAllWorld]:
    with AllToAllWorld(SHAPE) as world:
        yield world


def soon() -> Deadline:
    return Deadline.after_ms(40)


def later() -> Deadline:
    return Deadline.after_ms(20_000)


def payload(rank: int, counts: list[int]) -> np.ndarray:
    """Rows that say from whom, to whom, and which."""
    return np.array([(rank, to, i) for to, n in enumerate(counts) for i in range(n)], np.int32).reshape(-1, 3)


COUNTS = [[1, 0, 2], [3, 1, 0], [0, 0, 0]]


def test_every_rank_gets_its_rows_in_order_of_the_giver(world: AllToAllWorld) -> None:
    def one(rank: int) -> tuple[np.ndarray, np.ndarray]:
        counts = np.array(COUNTS[rank], np.int64)
        return world.ranks[rank].exchange(
            payload(rank, COUNTS[rank]), counts, event=Event(1, 0), deadline=later()
        )

    results = world.each(one)
    assert results[0][0].tolist() == [[0, 0, 0], [1, 0, 0], [1, 0, 1], [1, 0, 2]]
    assert results[1][0].tolist() == [[1, 1, 0]]
    assert results[2][0].tolist() == [[0, 2, 0], [0, 2, 1]]
    assert [counts.tolist() for _, counts in results] == [[1, 3, 0], [0, 1, 0], [2, 0, 0]]


def test_nothing_for_anybody_is_normal(world: AllToAllWorld) -> None:
    for step in range(1, 4):
        none = np.zeros((0, 5), np.float32)
        event = Event(step, 0)
        for rows, counts in world.each(
            lambda r: world.ranks[r].exchange(none, np.zeros(3, np.int64), event=event, deadline=later())  # noqa: B023
        ):
            assert rows.shape == (0, 5) and counts.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("in_area", "width", "staged"),
    [(False, 4, 5 * 2 * 8), (True, 4, 5 * 2 * 8), (True, 256, 5 * 2 * 512), (True, 257, 0)],
    ids=["outside", "small", "just small", "large"],
)
def test_the_fixed_form_transposes(in_area: bool, width: int, staged: int) -> None:
    with AllToAllWorld(AllToAllShape(num_ranks=3, stage_bytes=0, area_bytes=1 << 14)) as world:  # 4 KiB

        def one(rank: int, event: Event) -> np.ndarray:
            shape, side = (3, width), world.ranks[rank]
            array = side.area(shape, np.uint16) if in_area else np.empty(shape, np.uint16)
            array[:] = 1000 * event.step + 100 * rank + 10 * np.arange(3)[:, None] + np.arange(width)
            result = side.exchange_fixed(array, event=event, deadline=later())
            array[:] = 0xFFFF  # may be reused after return
            return result

        for step in range(1, 6):
            event = Event(step, 0)
            for rank, result in enumerate(world.each(lambda r: one(r, event))):  # noqa: B023
                expected = 1000 * step + 100 * np.arange(3)[:, None] + 10 * rank + np.arange(width)
                assert np.array_equal(result, expected)
        assert [side.stats()["bytes_staged"] for side in world.ranks] == [staged] * 3


@pytest.mark.parametrize("in_area", [False, True])
def test_large_results_go_past_the_caches_whole(in_area: bool) -> None:
    """Pieces of odd sizes at odd places, some of them short: each byte arrives, and nothing else is written."""
    counts = [[200_001, 77, 300_007], [4_095, 200_003, 13], [350_001, 400_009, 4_097]]

    def one(rank: int) -> np.ndarray:
        side, total = world.ranks[rank], sum(counts[rank])
        array = side.area((total,), np.uint8, offset=rank) if in_area else np.empty(total, np.uint8)
        array[:] = np.random.default_rng(rank).integers(0, 256, total)
        out = np.full(1_000_000, 7, np.uint8)[rank + 1 :]
        deadline = later()
        rows, _ = side.exchange(array, np.array(counts[rank]), event=Event(1, 0), deadline=deadline, out=out)
        assert (out[len(rows) :] == 7).all()
        return rows

    with AllToAllWorld(AllToAllShape(num_ranks=3, stage_bytes=1 << 20, area_bytes=1 << 20)) as world:
        results = world.each(one)
        arrays = [np.random.default_rng(rank).integers(0, 256, sum(counts[rank])) for rank in range(3)]
        expected = all_to_all([a.astype(np.uint8) for a in arrays], [np.array(c) for c in counts])
        for rows, (twin, _) in zip(results, expected, strict=True):
            assert rows.tobytes() == twin.tobytes()
        del results, rows


def test_small_pieces_of_the_area_take_no_room_from_others() -> None:
    def one(rank: int) -> list[np.ndarray]:
        side, left = world.ranks[rank], (rank + 2) % 3
        near = side.area((512, 1), np.uint8)
        near[:] = 100 + rank
        parts = [np.full((4096 if to == left else 0, 1), rank, np.uint8) for to in range(3)]
        parts[(rank + 1) % 3] = near
        return side.exchange_parts(parts, event=Event(1, 0), deadline=later())

    with AllToAllWorld(AllToAllShape(num_ranks=3, stage_bytes=0, area_bytes=4096)) as world:
        for rank, parts in enumerate(world.each(one)):
            left, right = (rank + 2) % 3, (rank + 1) % 3
            sizes = {rank: 0, left: 512, right: 4096}
            assert [len(part) for part in parts] == [sizes[giver] for giver in range(3)]
            assert (parts[left] == 100 + left).all() and (parts[right] == right).all()
        assert [side.stats()["bytes_staged"] for side in world.ranks] == [4096] * 3


def test_parts_may_lie_anywhere(world: AllToAllWorld) -> None:
    def one(rank: int) -> list[np.ndarray]:
        side = world.ranks[rank]
        parts = [np.full((to, 2), 10 * rank + to, np.complex64) for to in range(3)]
        parts[2] = side.area((2, 2), np.complex64, offset=64)
        parts[2][:] = 10 * rank + 2
        return side.exchange_parts(parts, event=Event(1, 0), deadline=later())

    for rank, parts in enumerate(world.each(one)):
        assert [p.shape for p in parts] == [(rank, 2)] * 3
        assert all((part == 10 * giver + rank).all() for giver, part in enumerate(parts))


def test_out_is_filled_and_may_be_larger(world: AllToAllWorld) -> None:
    outs = [np.full((9, 3), -1, np.int32) for _ in range(3)]

    def one(rank: int) -> np.ndarray:
        array, counts = payload(rank, COUNTS[rank]), np.array(COUNTS[rank], np.int64)
        return world.ranks[rank].exchange(array, counts, event=Event(1, 0), deadline=later(), out=outs[rank])[
            0
        ]

    expected = all_to_all([payload(r, c) for r, c in enumerate(COUNTS)], [np.array(c) for c in COUNTS])
    for rows, out, (twin, _) in zip(world.each(one), outs, expected, strict=True):
        assert np.array_equal(rows, twin) and np.shares_memory(rows, out)
        assert (out[len(rows) :] == -1).all()


def test_out_that_is_too_small_is_refused_and_the_next_exchange_works(world: AllToAllWorld) -> None:
    def one(rank: int, step: int) -> np.ndarray:
        small = np.empty((1, 3), np.int32) if rank == 0 and step == 1 else None
        array, counts = payload(rank, COUNTS[rank]), np.array(COUNTS[rank], np.int64)
        event = Event(step, 0)
        return world.ranks[rank].exchange(array, counts, event=event, deadline=later(), out=small)[0]

    futures = [world.pool.submit(one, rank, 1) for rank in range(3)]
    with pytest.raises(Truncated, match="4 rows come, out has 1"):
        futures[0].result(30)
    for future in futures[1:]:  # they may have had their rows, or not
        assert isinstance(future.exception(30), EventMismatch | None)
    assert len(world.each(lambda rank: one(rank, 2))[0]) == 4


@pytest.mark.parametrize(
    ("array", "counts", "error", "text"),
    [
        (np.zeros((3, 2)), np.array([1, 1, 2]), ValueError, "add up"),
        (np.zeros((3, 2)), np.array([4, -1, 0]), ValueError, "must not be negative"),
        (np.zeros((3, 2)), np.array([1, 1, 0]), ValueError, "add up"),
        (np.zeros((3, 2)), np.array([2**62, 2**62, 3]), ValueError, "add up"),
        (np.zeros((3, 2)), np.array([1, 2]), ValueError, r"must be int64\[3\]"),
        (np.zeros((3, 2)), np.array([1, 1, 1], np.int32), ValueError, r"must be int64\[3\]"),
        (np.zeros((3, 0)), np.array([1, 1, 1]), ValueError, "have no bytes"),
        (np.zeros((3, 4))[:, ::2], np.array([1, 1, 1]), ValueError, "C-contiguous"),
        (np.array([object()] * 3), np.array([1, 1, 1]), ValueError, "rows of numbers"),
        (np.zeros((9, 1024)), np.array([3, 3, 3]), Truncated, "exceeds stage_bytes=4096"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_sent(
    world: AllToAllWorld, array: np.ndarray, counts: np.ndarray, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        world.ranks[0].exchange(array, counts, event=Event(1, 0), deadline=soon())
    assert world.ranks[0].stats()["cell_writes"] == 0


def test_the_area_has_an_end(world: AllToAllWorld) -> None:
    with pytest.raises(IndexError, match="leaves 8192 bytes"):
        world.ranks[0].area((1025,), np.float64)


def test_the_silent_and_the_dead_are_named(world: AllToAllWorld) -> None:
    array = np.zeros((3, 1))
    with pytest.raises(PeerStalled, match="peer expert-1,expert-2,"):
        world.ranks[0].exchange_fixed(array, event=Event(1, 0), deadline=soon())
    world.segments[1].close()
    with pytest.raises(PeerDied, match="peer expert-1,"):
        world.ranks[0].exchange_fixed(array, event=Event(2, 0), deadline=later())
    assert world.ranks[0].stats()["failures"] == 2


def test_a_rank_that_gave_up_is_not_waited_for(world: AllToAllWorld) -> None:
    array = np.zeros((3, 1))
    for step in (1, 2):
        with pytest.raises(PeerStalled):
            world.ranks[1].exchange_fixed(array, event=Event(step, 0), deadline=soon())
    # What it had announced is withdrawn, so nobody pulls what it may overwrite.
    announce(world, 2, Event(2, 0), 0, 8)
    with pytest.raises(EventMismatch, match="peer expert-1,"):
        world.ranks[0].exchange_fixed(array, event=Event(2, 0), deadline=later())


def test_an_answer_that_will_not_come_is_not_waited_for(world: AllToAllWorld) -> None:
    """Rank 0 gives up before it has pulled what lies in the others' areas; they wait for its answer."""

    def one(rank: int) -> np.ndarray:
        array, counts = world.ranks[rank].area((6, 200), np.float32), np.array([2, 2, 2], np.int64)
        out = np.empty((1 if rank == 0 else 6, 200), np.float32)
        return world.ranks[rank].exchange(array, counts, event=Event(1, 0), deadline=later(), out=out)[0]

    futures = [world.pool.submit(one, rank) for rank in range(3)]
    assert [type(future.exception(30)) for future in futures] == [Truncated, EventMismatch, EventMismatch]


def announce(world: AllToAllWorld, rank: int, event: Event, place: int, size: int) -> None:
    """What `rank` says to rank 0."""
    own = world.segments[0]
    _native.write_cell(own.buf, own.cell_offset(3 * rank), 1 << 40 | 99, event.pack(), place, size)


HALVES = 2 * SHAPE.half_bytes


@pytest.mark.parametrize(
    ("place", "size"),
    [
        (0, 4),
        (HALVES + 8192, 8),
        (HALVES + 8185, 8),
        (2**63 - 8, 16),
        (0, 2**64 - 8),
        (0, 2**63),
        (2**61, 2**62),
    ],
)
def test_an_impossible_piece_raises(world: AllToAllWorld, place: int, size: int) -> None:
    announce(world, 1, Event(1, 0), place, size)
    announce(world, 2, Event(1, 0), 0, 8)
    with pytest.raises(SegmentCorrupt, match="expert-1"):
        world.ranks[0].exchange_fixed(np.zeros((3, 1)), event=Event(1, 0), deadline=soon())


def test_another_number_of_parts_raises(world: AllToAllWorld) -> None:
    announce(world, 1, Event(1, 0), 0, 16)
    announce(world, 2, Event(1, 0), 0, 8)
    with pytest.raises(SegmentCorrupt, match=r"expert-1.*|gave \[1, 2, 1\]"):
        world.ranks[0].exchange_fixed(np.zeros((3, 1)), event=Event(1, 0), deadline=soon())


# ---------------------------------------------------------------- the common form, one call of C


@pytest.mark.parametrize(
    ("array", "counts", "error", "text"),
    [
        (np.zeros((3, 2)), np.array([1, 1, 2]), ValueError, "add up"),
        (np.zeros((3, 2)), np.array([4, -1, 0]), ValueError, "must not be negative"),
        (np.zeros((3, 2)), np.array([2**62, 2**62, 3]), ValueError, "add up"),
        (np.zeros((3, 2)), np.array([1, 1, 1], np.uint64), ValueError, r"must be int64\[3\]"),
        (np.zeros((3, 2)), np.array([1, 0, 1, 0, 1, 0])[::2], ValueError, r"must be int64\[3\]"),
        (np.zeros((3, 3)), np.array([1, 1, 1]), ValueError, "out: .* must have writable rows"),
        (np.zeros((3, 2), np.int64), np.array([1, 1, 1]), ValueError, "out: .* must have writable rows"),
        (np.zeros((3, 4))[:, ::2], np.array([1, 1, 1]), ValueError, "array: .* C-contiguous"),
        (np.zeros((9, 1024)), np.array([3, 3, 3]), ValueError, "out: "),
    ],
)
def test_bad_arguments_are_refused_with_out_too(
    world: AllToAllWorld, array: np.ndarray, counts: np.ndarray, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        world.ranks[0].exchange(array, counts, event=Event(1, 0), deadline=soon(), out=np.zeros((9, 2)))
    assert world.ranks[0].stats()["cell_writes"] == 0


@pytest.mark.parametrize("event", [Event(1, 4096), Event(1, -1), Event(1, 0, 16), Event(1, 0, 0, 0)])
def test_an_event_that_does_not_fit_is_refused(world: AllToAllWorld, event: Event) -> None:
    with pytest.raises(ValueError, match="must be"):
        world.ranks[0].exchange_fixed(np.zeros((3, 1)), event=event, deadline=soon(), out=np.zeros((3, 1)))
    assert world.ranks[0].stats()["cell_writes"] == 0


@pytest.mark.parametrize(
    ("dtype", "other"),
    [
        (np.int64, np.longlong),
        (">f4", ">f4"),
        (np.complex128, np.complex128),
        (bool, bool),
        (np.float16, "e"),
    ],
)
def test_both_ways_take_the_same_rows(world: AllToAllWorld, dtype: str, other: str) -> None:
    """Types that are equal although the buffer protocol names them otherwise go the longer way."""

    def one(rank: int, event: Event, out: np.ndarray) -> np.ndarray:
        array = np.array([[[event.step + rank + to] * 2] * 3 for to in range(3)]).astype(dtype)
        deadline = later()
        return world.ranks[rank].exchange_fixed(array, event=event, deadline=deadline, out=out)

    outs = [np.zeros((3, 3, 2), other) for _ in range(3)]
    for step in (1, 7):
        results = world.each(lambda r: one(r, Event(step, 0), outs[r]))  # noqa: B023
        for rank, result in enumerate(results):
            wanted = [np.full((3, 2), step + giver + rank).astype(dtype) for giver in range(3)]
            assert np.array_equal(result, wanted) and np.shares_memory(result, outs[rank])


def test_events_are_packed_as_python_packs_them(world: AllToAllWorld) -> None:
    for event in (Event(2**31 - 1, 4095, 15, 65535), Event(3, 1, 2), Event(2**32 + 5, 0)):
        with pytest.raises(PeerStalled, match=f"{event.pack():#x}|{event.pack()}"):
            world.ranks[0].exchange_fixed(
                np.zeros((3, 1)), event=event, deadline=Deadline.after_ms(0), out=np.zeros((3, 1))
            )
        own = world.segments[1]
        assert _native.read_cell(own.buf, own.cell_offset(0))[1] in (event.pack(), 0) or (
            _native.read_cell(own.buf, own.cell_offset(1))[1] == event.pack()
        )


def test_the_longer_way_takes_over_what_did_not_end_at_once(world: AllToAllWorld) -> None:
    """`out` is too small, and another number of parts: both seen only when all have announced."""
    announce(world, 1, Event(1, 0), 0, 16)
    announce(world, 2, Event(1, 0), 0, 8)
    with pytest.raises(SegmentCorrupt, match=r"gave \[1, 2, 1\]"):
        world.ranks[0].exchange_fixed(
            np.zeros((3, 1)), event=Event(1, 0), deadline=later(), out=np.zeros((4, 1))
        )
    announce(world, 1, Event(2, 0), 0, 16)
    announce(world, 2, Event(2, 0), 0, 8)
    with pytest.raises(Truncated, match="4 rows come, out has 3"):
        counts = np.array([1, 1, 1])
        world.ranks[0].exchange(
            np.zeros((3, 1)), counts, event=Event(2, 0), deadline=later(), out=np.zeros((3, 1))
        )
    assert not world.ranks[0]._native.is_open


def test_the_rows_are_the_beginning_of_out(world: AllToAllWorld) -> None:
    out = np.full((9, 1), -1.0)
    announce(world, 1, Event(1, 0), 0, 16)
    announce(world, 2, Event(1, 0), 0, 0)
    rows, counts = world.ranks[0].exchange(
        np.ones((3, 1)), np.array([1, 1, 1]), event=Event(1, 0), deadline=later(), out=out
    )
    assert rows.shape == (3, 1) and np.shares_memory(rows, out) and counts.tolist() == [1, 2, 0]
    assert (out[3:] == -1).all()
