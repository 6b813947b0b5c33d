"""The other ranks of a collective: connecting to them, and what it means when they do not answer.

Shared by `bus.xccl.dispatch` and `bus.xccl.alltoall`. The hot path never comes here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

from bus.clock import Deadline
from bus.errors import EventMismatch, PeerDied, PeerStalled, SegmentCorrupt
from bus.memory import _collectives
from bus.memory.segment import Segment
from bus.xccl.endpoint import Rank
from bus.xccl.group import AddressTable

REFUSED, WAITING, MOVED_ON, CORRUPT, NO_ROOM, UNCOMMON = range(-1, -7, -1)  # statuses of the extension
_RANK_AWAITED, _RANK_MOVED_ON = 1, 2


Native: TypeAlias = _collectives.Exchange | _collectives.AllToAll


class Members:
    """The ranks of a group as one of them sees them. `native` is its end in the extension."""

    def __init__(self, native: Native, segment: Segment, rank: int, ranks: list[Rank], table: AddressTable):
        self._native, self._rank, self._ranks, self._table = native, rank, ranks, table
        self.name = str(ranks[rank])
        self.version = -1  # of the table, when all ranks were connected
        self._connected = [segment.incarnation if r == rank else 0 for r in range(len(ranks))]
        self._found_dead: tuple[int, set[int]] = (0, set())  # event, ranks that get a last look
        self._set_peer(rank, segment)

    def _set_peer(self, index: int, segment: Segment) -> None:
        layout = segment.layout
        self._native.set_peer(
            index, segment.buf, segment.incarnation, layout.cells_offset, layout.managed_offset
        )

    @property
    def is_current(self) -> bool:
        """Whether nothing was learned since all ranks were connected."""
        return self.version == self._table.version

    def connect(self, event_id: int) -> None:
        """Map whoever is new. Raises PeerDied, SegmentCorrupt."""
        version = self._table.version
        for index, rank in enumerate(self._ranks):
            known = self._connected[index]
            if index == self._rank or (known and known == self._table.incarnation(rank)):
                continue
            segment = self._table.segment(rank, asker=self.name, event_id=event_id)
            try:
                self._set_peer(index, segment)
            except ValueError as error:
                raise self.corrupt(str(error), index, event_id) from error
            self._connected[index] = segment.incarnation
        self.version = version

    def judge(self, status: int, states: bytes, event_id: int, deadline: Deadline) -> int:
        """Raise what a status means, or return until when to wait on (monotonic ns; 0 = just look again).

        A rank whose lock is free may have published whole before it died, after the cells were last looked at. So its
        death is raised only if a look after the lock was found free still misses it.
        """
        if status == WAITING:
            awaited = [r for r, s in enumerate(states) if s == _RANK_AWAITED]
            return self._check_peers(awaited, event_id, deadline)
        if status == MOVED_ON:
            names = self._names(r for r, s in enumerate(states) if s == _RANK_MOVED_ON)
            raise EventMismatch("moved on to a later event", rank=self.name, peer=names, event_id=event_id)
        text = "its counts, row numbers or places are outside the agreed shape"
        raise self.corrupt(text, self._native.culprit, event_id)

    def _check_peers(self, awaited: list[int], event_id: int, deadline: Deadline) -> int:
        before, self._found_dead = self._found_dead, (event_id, {r for r in awaited if not self._alive(r)})
        found = self._found_dead[1]
        if found and before[0] == event_id and (dead := sorted(found & before[1])):
            raise PeerDied("process has ended", rank=self.name, peer=self._names(dead), event_id=event_id)
        if found:
            return 0
        if deadline.expired():
            silent = self._names(awaited)
            raise PeerStalled("silent until the deadline", rank=self.name, peer=silent, event_id=event_id)
        return deadline.at_ns

    def _alive(self, index: int) -> bool:
        rank = self._ranks[index]
        return self._table.incarnation(rank) == self._connected[index] and self._table.alive(rank)

    def _names(self, indices: Iterable[int]) -> str:
        return ",".join(str(self._ranks[r]) for r in indices)

    def corrupt(self, text: str, peer: int, event_id: int) -> SegmentCorrupt:
        """Return the error that names who wrote nonsense."""
        return SegmentCorrupt(text, rank=self.name, peer=str(self._ranks[peer]), event_id=event_id)

    def close(self) -> None:
        """Let go of all mappings."""
        for index in range(len(self._ranks)):
            self._native.drop_peer(index)
