"""Groups of which some ranks are the library's, in threads of the test, and the others processes of the second one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Generic, Protocol, TypeVar

from bus.memory.segment import Segment, segment_name
from bus.xccl.endpoint import Rank
from bus.xccl.group import AddressTable
from tests.harness.group_world import Closable, GroupShape
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


@contextmanager
def closing(group: MixedGroup[Side]) -> Iterator[MixedGroup[Side]]:
    """Close the group in the end."""
    try:
        yield group
    finally:
        group.close()
