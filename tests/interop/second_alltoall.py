"""The plain all-to-all of the second implementation, after bus/README.md. Pieces are bytes."""

from __future__ import annotations

from collections.abc import Sequence

from tests.interop.second import PAGE, Areas, Cell, Segment, SegmentCorrupt, round_up
from tests.interop.second_group import ANSWERS, LANES, WITHDRAWN, Group

LINE = 64
SMALL_BYTES = 512
ANSWER_ME = 1 << 63


class OutOfRoomError(Exception):
    """The pieces outside the app area exceed the half."""


def areas(num_ranks: int, half_bytes: int, app_bytes: int) -> Areas:
    """Return the areas of a rank's segment."""
    return Areas.of(num_ranks * LANES, 2 * round_up(half_bytes, PAGE), app_bytes)


class AllToAll:
    """One rank's end."""

    def __init__(self, segments: Sequence[Segment], rank: int) -> None:
        self._group, self._rank = Group(segments, rank), rank
        self._half = self._group.own.areas.managed_bytes // 2
        self._num_sent = 0
        self._open: int | None = None

    def area(self, offset: int, size: int) -> memoryview:
        """Return bytes of the own app area."""
        own = self._group.own
        return own.bytes[own.areas.app_offset + offset : own.areas.app_offset + offset + size]

    def exchange(
        self, pieces: Sequence[bytes | tuple[int, int]], row_bytes: int, event: int, deadline_s: float
    ) -> list[bytes]:
        """Give rank r the piece r and return what each rank gave. A piece is bytes, or (offset, size) in the app area.

        Errors leave the exchange open: `give_up` before the pieces are written again.
        """
        self.send(pieces, event)
        cells = self._group.collect(
            list(self._group.others()), lambda rank: self._group.count_of(rank, 0, event), deadline_s
        )
        found = [self._own_piece(pieces[r]) if r == self._rank else b"" for r in range(len(pieces))]
        for rank, cell in cells.items():
            found[rank] = self._pull(rank, cell, row_bytes)
        for rank, cell in cells.items():
            self._group.look_again(rank, 0, cell)
        self._answer(cells, event)
        takers = [r for r, place in self._places.items() if place & ANSWER_ME and self._size(pieces[r]) > 0]
        self._group.collect(takers, lambda rank: self._group.answer_of(rank, 0, event), deadline_s)
        self._open = None
        return found

    def send(self, pieces: Sequence[bytes | tuple[int, int]], event: int) -> None:
        """Steps 1 and 2."""
        lane = self._num_sent % 2
        self._places = self._place(pieces, lane * self._half)
        for rank in self._group.others():
            self._group.take_back(rank, lane)
        base = self._group.own.areas.managed_offset
        for rank, place in self._places.items():
            piece = pieces[rank]
            if not place & ANSWER_ME:
                data = self._own_piece(piece)
                self._group.own.bytes[base + place : base + place + len(data)] = data
        for rank in self._group.others():
            self._group.tell(rank, lane, event, self._places[rank], self._size(pieces[rank]))
        self._group.ring()
        self._num_sent += 1
        self._open = event

    def _place(self, pieces: Sequence[bytes | tuple[int, int]], half_at: int) -> dict[int, int]:
        """Return w2 for each other rank: bytes first, then what is small in the app area, as long as there is room."""
        own, at = self._group.own.areas, half_at
        places: dict[int, int] = {}
        outside = [r for r in self._group.others() if isinstance(pieces[r], bytes)]
        inside = [r for r in self._group.others() if not isinstance(pieces[r], bytes)]
        for rank in [*outside, *inside]:
            piece = pieces[rank]
            has_room = at + self._size(piece) <= half_at + self._half
            if not isinstance(piece, bytes) and (piece[1] > SMALL_BYTES or not has_room):
                places[rank] = own.app_offset - own.managed_offset + piece[0] | ANSWER_ME
                continue
            if not has_room:
                raise OutOfRoomError(f"{self._size(piece)} bytes for rank {rank}")
            places[rank] = at
            at = round_up(at + self._size(piece), LINE)
        return places

    def _size(self, piece: bytes | tuple[int, int]) -> int:
        return len(piece) if isinstance(piece, bytes) else piece[1]

    def _own_piece(self, piece: bytes | tuple[int, int]) -> bytes:
        return piece if isinstance(piece, bytes) else bytes(self.area(*piece))

    def _pull(self, rank: int, cell: Cell, row_bytes: int) -> bytes:
        """Return a rank's piece. SegmentCorrupt: it lies outside, or is no whole rows."""
        peer, place, size = self._group.segments[rank], cell.w2 & ~ANSWER_ME, cell.w3
        shared = peer.areas.app_offset + peer.areas.app_bytes - peer.areas.managed_offset
        if place + size > shared or size % row_bytes != 0:
            raise SegmentCorrupt(f"rank {rank}: {size} bytes at {place} of {shared}, rows of {row_bytes}")
        at = peer.areas.managed_offset + place
        return bytes(peer.bytes[at : at + size])

    def _answer(self, cells: dict[int, Cell], event: int) -> None:
        for rank, cell in cells.items():
            if cell.w2 & ANSWER_ME:
                self._group.tell(rank, ANSWERS, event, 0, 0)
        self._group.ring()

    def give_up(self) -> None:
        """Withdraw the open exchange: nobody takes what is written from now on for it."""
        if self._open is not None:
            lane = (self._num_sent - 1) % 2
            for rank in self._group.others():
                self._group.tell(rank, lane, self._open, WITHDRAWN, 0)
            self._group.ring()
            self._open = None
