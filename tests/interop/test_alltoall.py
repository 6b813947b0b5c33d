"""The plain all-to-all between the library and a second implementation, written from bus/README.md: real processes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from bus.clock import Deadline
from bus.config import XcclConfig
from bus.errors import EventMismatch, PeerDied, PeerStalled, SegmentCorrupt, XcclError
from bus.memory.segment import Segment
from bus.xccl.alltoall import AllToAll, AllToAllShape
from bus.xccl.event import Event
from bus.xccl.group import AddressTable
from tests.interop import second, second_alltoall
from tests.interop.conftest import Peer
from tests.interop.groups import SECONDS, FacingEnds, MixedGroup, closing

Pieces = list[npt.NDArray[np.uint16]]  # of a rank, for each rank
Group = MixedGroup[AllToAll]
CONFIG = XcclConfig(spin_us=0, poll_interval_ms=5)
WIDTH, AREA_BYTES = 3, 1 << 16  # numbers in a row
ROW_BYTES = 2 * WIDTH
FIRST, NEXT = Event(1, 0), Event(2, 0)


@pytest.fixture
def mixed(pod: str, launch: Callable[..., Peer]) -> Callable[..., Any]:
    @contextmanager
    def run(their_ranks: Sequence[int], num_ranks: int) -> Iterator[Group]:
        shape = AllToAllShape(num_ranks=num_ranks, stage_bytes=8000, area_bytes=AREA_BYTES)
        config = {"num_ranks": num_ranks, "half_bytes": shape.half_bytes, "app_bytes": AREA_BYTES}

        def make(segment: Segment, rank: int, table: AddressTable) -> AllToAll:
            return AllToAll(segment, shape, rank, table, config=CONFIG)

        group = Group(pod, shape, their_ranks)
        with closing(group):
            group.launch(launch, "alltoall", lambda _: config)
            group.open(make)
            yield group

    return run


def given(rng: np.random.Generator, num_ranks: int, rows_max: int = 200) -> list[Pieces]:
    """Pieces from nothing to over the size that is copied twice, of each rank for each rank."""
    sizes = rng.integers(0, rows_max, (num_ranks, num_ranks)) * (rng.random((num_ranks, num_ranks)) < 0.7)
    return [[rng.integers(0, 1 << 16, (n, WIDTH)).astype(np.uint16) for n in row] for row in sizes]


def exchange(
    side: AllToAll, pieces: Pieces, event: Event, seconds: float = SECONDS, *, in_area: bool
) -> list[bytes]:
    """Our rank's part; return what each rank gave."""
    deadline, num = Deadline.after_ms(int(seconds * 1000)), sum(map(len, pieces))
    rows = side.area((num, WIDTH), np.uint16) if in_area else np.empty((num, WIDTH), np.uint16)
    rows[...] = np.concatenate(pieces)
    counts = np.array([len(piece) for piece in pieces], np.int64)
    came, sizes = side.exchange(rows, counts, event=event, deadline=deadline)
    return [part.tobytes() for part in np.split(came, np.cumsum(sizes)[:-1])]


def words(pieces: Pieces, event: Event, *, in_area: Callable[[int], bool]) -> dict[str, Any]:
    """Their rank's part, for a process; `in_area(r)` says whether what is for r lies in the app area."""
    parts: list[Any] = []
    offset = 0
    for r, piece in enumerate(pieces):
        data = piece.tobytes()
        parts.append([offset, data.hex()] if in_area(r) else data.hex())
        offset += len(data)
    return {"event": event.pack(), "row_bytes": ROW_BYTES, "pieces": parts}


def check_all(group: Group, ours: dict[int, Any], table: Sequence[Pieces]) -> None:
    for rank, future in ours.items():
        assert future.result(SECONDS + 10) == [row[rank].tobytes() for row in table]
    for rank, peer in group.theirs.items():
        assert peer.line() == {"pieces": [row[rank].tobytes().hex() for row in table]}


def exchange_all(group: Group, table: Sequence[Pieces], event: Event, in_area: Callable[[int], bool]) -> None:
    group.order("exchange", lambda rank: words(table[rank], event, in_area=in_area))
    ours = group.begin(
        lambda rank: exchange(group.ours[rank], table[rank], event, in_area=in_area(event.step + rank))
    )
    check_all(group, ours, table)


@pytest.mark.parametrize(
    ("their_ranks", "num_ranks"), [([1], 2), ([0, 2], 3), ([3], 4), ([0, 1, 3], 4)], ids=str
)
@pytest.mark.parametrize("where", ["staged", "in the area", "in turn"])
def test_every_rank_has_what_each_gave(
    mixed: Callable[..., Any], their_ranks: Sequence[int], num_ranks: int, where: str
) -> None:
    rng = np.random.default_rng(num_ranks)
    in_area = {"staged": lambda _: False, "in the area": lambda _: True, "in turn": lambda r: r % 2 == 0}[
        where
    ]
    with mixed(their_ranks, num_ranks) as group:
        for step in range(10):
            exchange_all(group, given(rng, num_ranks), Event(step, 0), in_area)
        group.finish()


def test_small_pieces_of_an_area_stay_there_when_the_half_is_full(mixed: Callable[..., Any]) -> None:
    """Rank 0's piece for rank 1 fills its half; those for itself and rank 2, though small, lie in the area."""
    table = given(np.random.default_rng(1), 3, rows_max=1)
    for row in table:
        row[:] = [np.full((n, WIDTH), 7, np.uint16) for n in (20, 1360, 20)]
    with mixed([0, 1], 3) as group:
        exchange_all(group, table, FIRST, lambda r: r != 1)
        group.finish()


def failure(work: Callable[[], object]) -> type[XcclError]:
    with pytest.raises(XcclError) as caught:
        work()
    return caught.type


def test_our_piece_that_is_withdrawn_is_not_taken(mixed: Callable[..., Any]) -> None:
    table = given(np.random.default_rng(2), 3)
    with mixed([0, 2], 3) as group:
        ours = group.ours[1]
        for step, in_area in ((1, True), (3, False)):
            event = Event(step, 0)
            assert (
                failure(lambda e=event, a=in_area: exchange(ours, table[1], e, 0.03, in_area=a))
                is PeerStalled
            )
            group.order("exchange", lambda rank, e=event: words(table[rank], e, in_area=lambda _: False))
            assert [peer.line()["error"] for peer in group.theirs.values()] == ["EventMismatch"] * 2
            group.order("give_up", lambda _: {})
            assert [peer.line() for peer in group.theirs.values()] == [{}, {}]
            exchange_all(group, table, Event(step + 1, 0), lambda _: True)
        group.finish()


def test_their_piece_that_is_withdrawn_is_not_taken(mixed: Callable[..., Any]) -> None:
    table = given(np.random.default_rng(3), 3)
    with mixed([1], 3) as group:
        group.order("exchange", lambda r: {**words(table[r], FIRST, in_area=lambda _: True), "seconds": 0.03})
        assert group.theirs[1].line()["error"] == "PeerStalled"
        group.order("give_up", lambda _: {})
        assert group.theirs[1].line() == {}
        late = group.begin(lambda r: failure(lambda: exchange(group.ours[r], table[r], FIRST, in_area=False)))
        assert [late[rank].result(SECONDS + 10) for rank in (0, 2)] == [EventMismatch] * 2
        exchange_all(group, table, NEXT, lambda _: True)
        group.finish()


def test_either_notices_that_the_other_has_ended(mixed: Callable[..., Any]) -> None:
    table = given(np.random.default_rng(4), 3)
    with mixed([1, 2], 3) as group:
        group.theirs[1].end()
        group.order("exchange", lambda rank: words(table[rank], FIRST, in_area=lambda _: True), [2])
        assert failure(lambda: exchange(group.ours[0], table[0], FIRST, in_area=True)) is PeerDied
        answer = group.theirs[2].line()
        assert answer["error"] in ("PeerDied", "EventMismatch")  # or that rank 0 gave up for that


# ---------------------------------------------------------------- words that cannot be

HALF = 4096
END = 2 * HALF + 4096  # of what is shared, from the managed area on


class Pair(FacingEnds[AllToAll]):
    """Both ends of a group of two."""

    def __init__(self, pod: str) -> None:
        shape = AllToAllShape(num_ranks=2, stage_bytes=HALF - 128, area_bytes=4096)
        super().__init__(pod, shape, second_alltoall.areas(2, HALF, 4096))
        self.ours = AllToAll(self.segment, shape, 0, self.table, config=CONFIG)
        self.theirs = second_alltoall.AllToAll([self.our_segment, self.their_segment], 1)


@pytest.fixture
def both(pod: str) -> Iterator[Pair]:
    pair = Pair(pod)
    yield pair
    pair.close()


LIES = [
    (2, END - 10),  # 12 bytes do not fit there
    (2, 1 << 63 | END),
    (2, 1 << 61),
    (3, 7),  # no whole rows
    (3, END + 12),
    (3, 2**64 - 12),
]


@pytest.mark.parametrize(("word", "value"), LIES)
def test_we_refuse_a_piece_that_cannot_be(both: Pair, word: int, value: int) -> None:
    both.theirs.send([b"x" * 12, b""], FIRST.pack())
    both.our_segment.u64[both.our_segment.areas.cells_offset // 8 + 3 * 8 + word] = value
    pieces = [np.zeros((2, WIDTH), np.uint16)] * 2
    with pytest.raises(SegmentCorrupt, match="expert-1"):
        exchange(both.ours, pieces, FIRST, 5, in_area=False)


@pytest.mark.parametrize(("word", "value"), LIES)
def test_they_refuse_a_piece_that_cannot_be(both: Pair, word: int, value: int) -> None:
    """Ours waits for theirs, which does not come; what it had said is written again with another word."""
    pieces = [np.zeros((2, WIDTH), np.uint16)] * 2
    assert failure(lambda: exchange(both.ours, pieces, FIRST, 0.001, in_area=False)) is PeerStalled
    at = both.their_segment.areas.cells_offset // 8
    said = [both.their_segment.u64[at], FIRST.pack(), 0, 12]
    said[word] = value
    both.their_segment.write_cell(8 * at, said[0], *said[1:])
    with pytest.raises(second.SegmentCorrupt):
        both.theirs.exchange([b"x" * 12, b""], ROW_BYTES, FIRST.pack(), time.monotonic() + 5)
