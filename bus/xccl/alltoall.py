"""The plain all-to-all: every rank gives every rank some rows of an array, of any dtype.

Counts before data, and pulled like dispatch: a rank writes into its own segment, tells every other rank with one cell
where its rows lie and how many bytes they are (zero too, because everybody waits for all), waits for all cells, and
copies what is for it straight from the other segments.

    1. take back the cells of the exchange before the last one, whose half of the staging area is used again
    2. stage what does not lie in the own app area; write a cell (event, place, bytes) at every other rank; ring
    3. wait until all ranks' cells of this event are there
    4. copy every piece to its place in the result, in order of rank; look at the cells again
    5. tell the ranks whose piece came straight from their app area; wait for those that pull from ours

Pieces of more than 512 bytes in arrays made with `area` travel with one copy, all others with two. When a call
returns, the arrays that were sent may be written again. With `out`, a call of `exchange` or `exchange_fixed` is one
call of C. `persistent` keeps what does not change from one exchange of the same two arrays to the next. Twin:
`bus.xccl.reference.all_to_all`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from bus.clock import NS_PER_MS, Deadline
from bus.config import XcclConfig
from bus.errors import Truncated
from bus.memory import _collectives
from bus.memory.layout import PAGE_BYTES, SegmentLayout, align_up
from bus.memory.segment import Segment
from bus.xccl.endpoint import Rank
from bus.xccl.event import Event
from bus.xccl.group import AddressTable
from bus.xccl.members import NO_ROOM, REFUSED, UNCOMMON, Members

Array = npt.NDArray[Any]
Counts = npt.NDArray[np.int64]
Row = tuple[np.dtype[Any], tuple[int, ...]]  # what the rows of an array are

NUM_LANES = 3  # pieces twice, in turn; done once
_INT64 = np.dtype(np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class AllToAllShape:
    """Sizes from which all ranks derive the same layout.

    stage_bytes: what one rank can send in one exchange from arrays outside its app area; small pieces of the app area
    use what is left. area_bytes: the app area.
    """

    num_ranks: int
    stage_bytes: int = 1 << 20
    area_bytes: int = 0

    @property
    def half_bytes(self) -> int:
        """Bytes of each half of the staging area: every piece begins on a cache line of its own."""
        return align_up(self.stage_bytes + 64 * self.num_ranks, PAGE_BYTES)

    def layout(self) -> SegmentLayout:
        """Return the layout of the segment that each rank needs."""
        return SegmentLayout(self.num_ranks * NUM_LANES, 2 * self.half_bytes, self.area_bytes)


class AllToAll:
    """One rank's end of the plain all-to-all.

    Args:
        segment: own segment, made with `shape.layout()`; stays the caller's.
        shape: the same on all ranks.
        rank: own index in the group, below `shape.num_ranks`.
        table: addresses of all ranks as `Rank(service, index)`; mapped at the first exchange.
        config: how long to poll before sleeping (`spin_us` for each rank), how often to look at owner locks.
        service: first part of the ranks' names.

    Threads: one. Blocks only in the exchanges, up to their deadline.
    """

    def __init__(
        self,
        segment: Segment,
        shape: AllToAllShape,
        rank: int,
        table: AddressTable,
        *,
        config: XcclConfig | None = None,
        service: str = "expert",
    ) -> None:
        settings, layout = config or XcclConfig(), segment.layout
        app_at = layout.app_offset - layout.managed_offset
        self._segment, self._shape, self._rank, self._table = segment, shape, rank, table
        self._num_ranks = shape.num_ranks
        self._native = _collectives.AllToAll(
            rank,
            shape.num_ranks,
            shape.half_bytes,
            app_at,
            app_at + shape.area_bytes,
            settings.spin_us * 1_000 * shape.num_ranks,
            settings.poll_interval_ms * NS_PER_MS,
        )
        ranks = [Rank(service, index) for index in range(shape.num_ranks)]
        self._members = Members(self._native, segment, rank, ranks, table)
        self._num_failures = 0

    def area(self, shape: tuple[int, ...], dtype: npt.DTypeLike, offset: int = 0) -> Array:
        """Return an array in the own app area, `offset` bytes from its start: what is sent from it is copied once.

        Raises IndexError when it would leave the segment, ValueError for a dtype with objects or a bad offset.
        """
        kind = np.dtype(dtype)
        if offset < 0 or offset + math.prod(shape) * kind.itemsize > self._shape.area_bytes:
            raise IndexError(f"area: {shape} of {kind} at {offset} leaves {self._shape.area_bytes} bytes")
        return self._segment.array(self._segment.layout.app_offset + offset, shape, kind)

    def exchange(
        self, array: Array, counts: Counts, *, event: Event, deadline: Deadline, out: Array | None = None
    ) -> tuple[Array, Counts]:
        """Give rank r the next `counts[r]` rows of `array`, and return what all ranks gave.

        Args:
            array: [num_rows, ...] any dtype without objects, C-contiguous; read only, may be reused after return.
            counts: [num_ranks] int64, adding up to num_rows. Zero is normal.
            event: names the exchange, the same on all ranks, later than the one before.
            deadline: by then every rank must have come.
            out: at least as many rows as come, of the dtype and row shape of `array`; None = a new array (slower).

        Returns:
            (rows, counts): rows [sum(counts), ...] in order of the giving rank, the beginning of `out` if given; counts
            [num_ranks] int64, how many came from each.

        Raises:
            ValueError, IndexError: arguments; nothing was sent. Truncated: the rows exceed `stage_bytes`, nothing was
            sent; or `out` is too small, and the exchange is abandoned. PeerDied, PeerStalled: name the ranks.
            EventMismatch: a rank has moved on to a later event. SegmentCorrupt: a rank's cell is impossible, or its
            rows have another size. In these four cases the exchange is abandoned; all ranks go on with a later event.

        Order: all ranks exchange the same events in the same order. Blocks: yes; releases the GIL.
        Twin: `bus.xccl.reference.all_to_all`.
        """
        if self._members.version == self._table.version and out is not None:
            came = np.empty(self._num_ranks, _INT64)
            found = self._native.swap(event, array, counts, out, came, deadline)
            if not isinstance(found, int):
                return found, came
            if found != UNCOMMON:
                return self._complete(found, self._check_array("array", array), event.pack(), deadline, out)
        row = self._check_array("array", array)
        if (
            counts.dtype != _INT64
            or counts.shape != (self._shape.num_ranks,)
            or not counts.flags.c_contiguous
        ):
            raise ValueError(
                f"counts: {counts.dtype}{list(counts.shape)} must be int64[{self._shape.num_ranks}]"
            )
        return self._run(array, counts, row, event, deadline, out)

    def exchange_parts(
        self, parts: Sequence[Array], *, event: Event, deadline: Deadline, out: Array | None = None
    ) -> list[Array]:
        """Give rank r the array `parts[r]`, and return what each rank gave, in order of rank.

        Parts are [num_rows, ...] of one dtype and one row shape, each C-contiguous, in the app area or not. The
        result's arrays are parts of one block, or of `out`. Otherwise as `exchange`.
        """
        if len(parts) != self._shape.num_ranks:
            raise ValueError(f"parts: {len(parts)} arrays must be {self._shape.num_ranks}")
        row = self._check_array("parts[0]", parts[0])
        for index, part in enumerate(parts):
            if self._check_array(f"parts[{index}]", part) != row:
                raise ValueError(
                    f"parts[{index}]: rows of {part.dtype}{list(part.shape[1:])} differ from parts[0]'s"
                )
        rows, counts = self._run(list(parts), None, row, event, deadline, out)
        return np.split(rows, np.cumsum(counts)[:-1])

    def exchange_fixed(
        self, array: Array, *, event: Event, deadline: Deadline, out: Array | None = None
    ) -> Array:
        """Give rank r the part `array[r]`; part r of the result is what rank r gave.

        array: [num_ranks, ...], and so is the result. All ranks give parts of one size. Otherwise as `exchange`.
        """
        status = UNCOMMON
        if self._members.version == self._table.version and out is not None:
            found: Array | int = self._native.swap(event, array, None, out, None, deadline)
            if not isinstance(found, int):
                return found
            status = found
        row = self._check_array("array", array)
        if status != UNCOMMON:
            rows, counts = self._complete(status, row, event.pack(), deadline, out)
        elif array.shape[0] == self._shape.num_ranks:
            ones = np.ones(self._shape.num_ranks, np.int64)
            rows, counts = self._run(array, ones, row, event, deadline, out)
        else:
            raise ValueError(f"array: {list(array.shape)} must have {self._shape.num_ranks} parts")
        self._check_one_each(counts, event.pack())
        return rows

    def persistent(self, array: Array, out: Array) -> PersistentExchange:
        """Return `exchange_fixed` of these two arrays, to be repeated in a hot loop.

        Both are held until the result is dropped. Raises ValueError as `exchange_fixed` does.
        """
        row = self._check_array("array", array)
        native = self._native.persistent(array, out)
        if native is None:
            raise ValueError(
                f"array, out: {array.dtype}{list(array.shape)} and {out.dtype}{list(out.shape)} must be "
                f"C-contiguous rows of one kind for {self._num_ranks} ranks, `out` writable"
            )
        return PersistentExchange(self, native, row, out)

    def _check_one_each(self, counts: Counts, event_id: int) -> None:
        if (counts != 1).any():
            text = f"gave {counts.tolist()} parts instead of one each"
            raise self._members.corrupt(text, int(np.argmax(counts != 1)), event_id)

    def _check_array(self, name: str, array: Array) -> Row:
        """Return what the rows are."""
        if array.ndim == 0 or not array.flags.c_contiguous or array.dtype.kind not in "biufc":
            text = f"{name}: {array.dtype}{list(array.shape)}"
            raise ValueError(f"{text} must be a C-contiguous array of rows of numbers")
        return array.dtype, array.shape[1:]

    def _run(
        self,
        array: Array | list[Array],
        counts: Counts | None,
        row: Row,
        event: Event,
        deadline: Deadline,
        out: Array | None,
    ) -> tuple[Array, Counts]:
        event_id, row_bytes = event.pack(), _row_bytes(row)
        if row_bytes == 0:
            raise ValueError(f"array: rows of {row[0]}{list(row[1])} have no bytes")
        if out is not None and (self._check_array("out", out) != row or not out.flags.writeable):
            raise ValueError(
                f"out: {out.dtype}{list(out.shape)} must have writable rows of {row[0]}{list(row[1])}"
            )
        if not self._members.is_current:
            self._members.connect(event_id)
        status = self._native.exchange(event_id, array, counts, row_bytes, out, deadline.at_ns)
        if status < 0:
            self._refuse(status, counts, event_id)
        return self._complete(status, row, event_id, deadline, out)

    def _complete(
        self, status: int, row: Row, event_id: int, deadline: Deadline, out: Array | None
    ) -> tuple[Array, Counts]:
        """Go on with an exchange that was begun and did not end at once, or return what it brought."""
        row_bytes = _row_bytes(row)
        if status < 0:
            out = self._finish(status, row, row_bytes, event_id, deadline, out)
            status = self._native.total
        elif out is None:
            out = np.empty((0, *row[1]), row[0])
        assert out is not None
        came = np.empty(self._shape.num_ranks, np.int64)
        self._native.counts(came)
        num_rows = status // row_bytes
        return (out if num_rows == len(out) else out[:num_rows]), came

    def _refuse(self, status: int, counts: Counts | None, event_id: int) -> None:
        """Raise what an exchange that did not begin means."""
        if status == REFUSED:
            given = "" if counts is None else f" {counts.tolist()}"
            raise ValueError(f"counts:{given} must not be negative and must add up to the rows of the array")
        if status == NO_ROOM and not self._native.is_open:
            text = f"what lies outside the app area exceeds stage_bytes={self._shape.stage_bytes}"
            raise Truncated(text, rank=self._members.name, peer="group", event_id=event_id)

    def _finish(
        self,
        status: int,
        row: Row,
        row_bytes: int,
        event_id: int,
        deadline: Deadline,
        out: Array | None,
    ) -> Array:
        """Go on with an exchange that did not end at once."""
        try:
            while status < 0:
                until = deadline.at_ns
                if status != NO_ROOM:
                    until = self._members.judge(status, self._native.states(), event_id, deadline)
                elif out is None:
                    out = np.empty((self._native.total // row_bytes, *row[1]), row[0])
                else:
                    text = f"{self._native.total // row_bytes} rows come, out has {len(out)}"
                    raise Truncated(text, rank=self._members.name, peer="group", event_id=event_id)
                status = self._native.resume(out, until)
        except BaseException:
            self._native.abandon()
            self._num_failures += 1
            raise
        return np.empty((0, *row[1]), row[0]) if out is None else out

    def stats(self) -> dict[str, int]:
        """Return counters by name; `bytes_staged`: what was copied twice, else as `Dispatcher.stats`."""
        return {**self._native.stats(), "failures": self._num_failures}

    def close(self) -> None:
        """Let go of all mappings. The segment and the table stay the caller's."""
        self._members.close()


class PersistentExchange:
    """Made by `AllToAll.persistent`. May alternate with that end's other exchanges; one at a time."""

    __slots__ = ("_members", "_out", "_row", "_side", "_swap", "_table")

    def __init__(self, side: AllToAll, native: _collectives.PersistentSwap, row: Row, out: Array) -> None:
        self._side, self._swap, self._row, self._out = side, native.exchange, row, out
        self._members, self._table = side._members, side._table

    def exchange(self, event_id: int, at_ns: int) -> None:
        """Do what `AllToAll.exchange_fixed` does, with the packed id of an event and a deadline as `Deadline.at_ns`.

        `event_id + event.STEP` is the same exchange of the next step. The rows are in `out` afterwards.
        """
        if self._members.version != self._table.version:
            self._members.connect(event_id)
        status = self._swap(event_id, at_ns)
        if status is not None:
            self._go_on(status, event_id, at_ns)

    def _go_on(self, status: int, event_id: int, at_ns: int) -> None:
        side = self._side
        side._refuse(status, None, event_id)
        _, counts = side._complete(status, self._row, event_id, Deadline(at_ns), self._out)
        side._check_one_each(counts, event_id)


def _row_bytes(row: Row) -> int:
    return row[0].itemsize * (math.prod(row[1]) if row[1] else 1)
