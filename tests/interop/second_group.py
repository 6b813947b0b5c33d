"""Groups of the second implementation: what dispatch/combine and the plain all-to-all share, after bus/README.md.

Cells at all other ranks, quiet rings, and waiting for several ranks at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

from tests.interop.second import (
    COUNTER_BITS,
    POLL_S,
    BusError,
    Cell,
    EventMismatch,
    PeerDied,
    PeerStalled,
    Segment,
    stamp,
)

LANES = 3  # of a writer, per microbatch: counts on two in turn, answers on the third
ANSWERS = 2
WITHDRAWN = 1 << 62  # in w2 of a count: its writer has given the event up


def is_later(event: int, than: int) -> bool:
    """Compare event ids, whose difference counts as i64."""
    return 0 < (event - than) % 2**64 < 2**63


class Group:
    """The ranks' segments, the own one among them, as rank `rank` sees them."""

    def __init__(self, segments: Sequence[Segment], rank: int, num_microbatches: int = 1) -> None:
        self.segments, self.rank, self.own = segments, rank, segments[rank]
        self._lanes = LANES * num_microbatches
        self._count = 0
        self._told: set[int] = set()

    def others(self) -> Iterator[int]:
        """Yield the other ranks, beginning with the right neighbour."""
        num = len(self.segments)
        yield from ((self.rank + i) % num for i in range(1, num))

    def cell_offset(self, owner: int, writer: int, lane: int) -> int:
        """Return where the cell that `writer` writes lies in `owner`'s segment."""
        return self.segments[owner].areas.cells_offset + (writer * self._lanes + lane) * 64

    def tell(self, rank: int, lane: int, w1: int, w2: int, w3: int) -> None:
        """Write the own cell of `lane` at `rank`."""
        self._count += 1
        word = stamp(self.own.incarnation, self._count)
        self.segments[rank].write_cell(self.cell_offset(rank, self.rank, lane), word, w1, w2, w3)
        self._told.add(rank)

    def take_back(self, rank: int, lane: int) -> None:
        """Store w0 = 0 in the own cell of `lane` at `rank`."""
        self.segments[rank].u64[self.cell_offset(rank, self.rank, lane) // 8] = 0

    def ring(self) -> None:
        """Ring quietly at all ranks that were told something."""
        self.own.fence()
        for rank in self._told:
            self.segments[rank].ring_sleepers()
        self._told.clear()

    def read(self, rank: int, lane: int) -> Cell | None:
        """Return what the known incarnation of `rank` shows here on `lane`."""
        cell = self.own.read_cell(self.cell_offset(self.rank, rank, lane))
        incarnation = self.segments[rank].incarnation % 2**24
        return cell if cell is not None and cell.w0 >> COUNTER_BITS == incarnation else None

    def count_of(self, rank: int, lane: int, event: int) -> Cell | None:
        """Return the cell of `event` on `lane` or the next one. EventMismatch: the rank has given it up.

        Two looks at both: it may have published this event and the next since its lane was looked at.
        """
        is_ahead = False
        for at in (lane, lane + 1, lane, lane + 1):
            cell = self.read(rank, at)
            if cell is not None and (cell.w1, cell.w2) == (event, WITHDRAWN):
                raise EventMismatch(f"rank {rank} has given event {event:#x} up")
            if cell is not None and cell.w1 == event:
                return cell
            is_ahead |= cell is not None and is_later(cell.w1, event)
        if is_ahead:
            raise EventMismatch(f"rank {rank} has moved on from event {event:#x}")
        return None

    def look_again(self, rank: int, lane: int, cell: Cell) -> None:
        """Raise EventMismatch if `cell` was taken back since it was read."""
        now = self.count_of(rank, lane, cell.w1)
        if now is None or now[1:] != cell[1:]:
            raise EventMismatch(f"rank {rank} has given event {cell.w1:#x} up")

    def answer_of(self, rank: int, lane: int, event: int) -> Cell | None:
        """Return the answer of `event`; `lane` is that of the counts. EventMismatch: there will be none."""
        for is_last in (False, True):
            cell = self.read(rank, lane + ANSWERS)
            if cell is not None and cell.w1 == event:
                return cell
            if not is_last and not self._has_left(rank, lane, event):
                return None
        raise EventMismatch(f"rank {rank} has given event {event:#x} up")

    def _has_left(self, rank: int, lane: int, event: int) -> bool:
        for at in (lane, lane + 1):
            cell = self.read(rank, at)
            if cell is None:
                continue
            if is_later(cell.w1, event) or (cell.w1, cell.w2) == (event, WITHDRAWN):
                return True
        return False

    def collect(
        self, ranks: Sequence[int], look: Callable[[int], Cell | None], deadline_s: float
    ) -> dict[int, Cell]:
        """Wait until `look` has found something for each of `ranks`. PeerDied and PeerStalled name who is missing."""
        found: dict[int, Cell] = {}

        def num_missing() -> int:
            for rank in ranks:
                cell = look(rank) if rank not in found else None
                if cell is not None:
                    found[rank] = cell
            return len(ranks) - len(found)

        while num_missing():
            self.own.beat()
            if self.own.sleep_for(num_missing, POLL_S):
                continue
            missing = [rank for rank in ranks if rank not in found]
            dead = [rank for rank in missing if not self.segments[rank].owner_alive()]
            num_missing()  # what they published before they died counts
            self._judge(
                [rank for rank in dead if rank not in found],
                [rank for rank in missing if rank not in found],
                deadline_s,
            )
        return found

    @staticmethod
    def _judge(dead: list[int], missing: list[int], deadline_s: float) -> None:
        error: BusError | None = None
        if dead:
            error = PeerDied(f"ranks {dead} have ended")
        elif missing and time.monotonic() > deadline_s:
            error = PeerStalled(f"ranks {missing} are silent")
        if error is not None:
            raise error
