"""Groups of which some ranks are the library's and others the second one's: in threads of the test and processes of
their own, or, for two, all in one thread."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Generic, Protocol, TypeVar

from bus.memory.segment import Segment, segment_name
from bus.xccl.endpoint import Rank
from bus.xccl.group import AddressTable
from tests.harness.group_world import Closable, GroupShape
from tests.interop import second
from tests.interop.conftest import Peer

OUR_INCARNATION, THEIR_INCARNATION = 5, 9
SECONDS = 20

Side = TypeVar("Side", bound=Closable)


class Open(Protocol[Side]):
    """Open the end of a rank of the library."""

    def __call__(self, segment: Segment, rank: int, table: AddressTable) -> Side: ...


class MixedGroup(Generic[Side]):
    """`ours[rank]` are ends of the library, `theirs[rank]` processes that obey."""

    def __init__(self, pod: str, shape: GroupShape, their_ranks: Iterable[int]) -> None:
        self.num_ranks = shape.num_ranks
        self._pod, self._shape = pod, shape
        self.our_ranks = [rank for rank in range(shape.num_ranks) if rank not in set(their_ranks)]
        self.their_ranks = sorted(their_ranks)
        self.ours: dict[int, Side] = {}
        self.theirs: dict[int, Peer] = {}
        self._closing: list[Callable[[], object]] = []
        self._pool = ThreadPoolExecutor(max(1, len(self.our_ranks)))

    def name(self, rank: int) -> str:
        """Return the name of a rank's segment."""
        return segment_name(self._pod, "expert", rank, self.incarnation(rank))

    def incarnation(self, rank: int) -> int:
        """Return the incarnation of a rank: it shows whose it is."""
        return OUR_INCARNATION if rank in self.our_ranks else THEIR_INCARNATION

    def launch(self, start: Callable[..., Peer], role: str, config: Callable[[int], dict[str, Any]]) -> None:
        """Start their processes."""
        for rank in self.their_ranks:
            own = {"name": self.name(rank), "incarnation": self.incarnation(rank), "rank": rank}
            self.theirs[rank] = start("second_group_child", role, {**own, **config(rank)})

    def open(self, make: Open[Side]) -> None:
        """Open our ends, and let all ranks meet."""
        for rank in self.our_ranks:
            segment = Segment.create(
                self.name(rank),
                self._shape.layout(),
                service="expert",
                index=rank,
                incarnation=self.incarnation(rank),
            )
            table = AddressTable()
            for peer in range(self.num_ranks):
                table.learn(Rank("expert", peer), self.incarnation(peer), self.name(peer))
            self.ours[rank] = make(segment, rank, table)
            self._closing += [self.ours[rank].close, table.close, segment.unlink, segment.close]
        for peer_process in self.theirs.values():
            peer_process.tell("meet", segments=[self.name(rank) for rank in range(self.num_ranks)])

    def begin(self, work: Callable[[int], Any], ranks: Sequence[int] | None = None) -> dict[int, Future[Any]]:
        """Start `work(rank)` for our ranks, each in a thread."""
        return {rank: self._pool.submit(work, rank) for rank in (self.our_ranks if ranks is None else ranks)}

    def order(
        self, what: str, fields: Callable[[int], dict[str, Any]], ranks: Sequence[int] | None = None
    ) -> None:
        """Tell their ranks what to do; `seconds` unless given is the deadline."""
        for rank in self.their_ranks if ranks is None else ranks:
            self.theirs[rank].tell(what, **{"seconds": SECONDS, **fields(rank)})

    def finish(self) -> None:
        """End their processes in order."""
        for peer in self.theirs.values():
            peer.go_on()
        for peer in self.theirs.values():
            peer.finish()

    def close(self) -> None:
        """Let go of our ends."""
        self._pool.shutdown()
        for close in self._closing:
            close()


class FacingEnds(Generic[Side]):
    """A rank of each kind in this process: rank 0 is ours, rank 1 theirs. Whoever derives from it opens both.

    `segment` and `our_segment` are rank 0's, as the library and as the second implementation see it.
    """

    ours: Side

    def __init__(self, pod: str, shape: GroupShape, their_areas: second.Areas) -> None:
        incarnations = OUR_INCARNATION, THEIR_INCARNATION
        names = [segment_name(pod, "expert", rank, number) for rank, number in enumerate(incarnations)]
        self.segment = Segment.create(
            names[0], shape.layout(), service="expert", index=0, incarnation=OUR_INCARNATION
        )
        self.their_segment = second.Segment.create(
            names[1], their_areas, service="expert", index=1, incarnation=THEIR_INCARNATION, num_lanes=1
        )
        self.table = AddressTable()
        for rank, (name, number) in enumerate(zip(names, incarnations, strict=True)):
            self.table.learn(Rank("expert", rank), number, name)
        self.our_segment = second.Segment.attach(names[0])

    def close(self) -> None:
        """Let go of everything."""
        self.ours.close()
        self.table.close()
        for segment in (self.our_segment, self.their_segment):
            segment.close()
        self.segment.unlink()
        self.segment.close()


@contextmanager
def closing(group: MixedGroup[Side]) -> Iterator[MixedGroup[Side]]:
    """Close the group in the end."""
    try:
        yield group
    finally:
        group.close()
