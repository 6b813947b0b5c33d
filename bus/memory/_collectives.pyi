"""Rows of the all-to-all collectives: routing, staging, counts, waiting, pulling, weighted addition.

Errors of every call, with nothing done: ValueError (a buffer is too short or not aligned, a value breaks its rule),
IndexError (microbatch, rank or row outside its range), LookupError (a rank is not connected), RuntimeError (another
thread is inside the same Exchange). Calls that touch rows or wait release the GIL. Arrays are C-contiguous.
"""

from typing import Any, TypeAlias

from bus.clock import Deadline

Buffer: TypeAlias = Any

class Exchange:
    """One rank's end of dispatch/combine over mapped segments; protocol in bus/xccl/dispatch.py.

    Calls that return `int` give a number of rows (>= 0) or a status: -1 an argument was refused, nothing was done;
    -2 the poll interval or the deadline is over; -3 `culprit` has moved on to a later event; -4 what `culprit` wrote is
    impossible.
    """

    def __init__(
        self,
        shape: tuple[int, int, int, int, int, int, int, bool, bool],
        offsets: tuple[int, int, int, int, int, int, int, int],
        yield_ns: int,
        poll_ns: int,
        /,
    ) -> None: ...
    @property
    def culprit(self) -> int: ...
    def set_peer(
        self, rank: int, buf: Buffer, incarnation: int, cells_offset: int, managed_offset: int, /
    ) -> None: ...
    def drop_peer(self, rank: int, /) -> None: ...
    def bind(self, microbatch: int, rows: Buffer, scales: Buffer | None, /) -> None: ...
    def dispatch(self, event: tuple[int, ...], x: Buffer, topk_idx: Buffer, deadline_ns: int, /) -> int: ...
    def stage(self, event: tuple[int, ...], x: Buffer, topk_idx: Buffer, /) -> int: ...
    def announce(self, microbatch: int, /) -> None: ...
    def receive(self, microbatch: int, deadline_ns: int, /) -> int: ...
    def combine(
        self,
        microbatch: int,
        event_id: int,
        y: Buffer | None,
        weights: Buffer,
        out: Buffer,
        deadline_ns: int,
        /,
    ) -> int: ...
    def states(self, microbatch: int, /) -> bytes: ...
    def expert_counts(self, microbatch: int, out: Buffer, /) -> None: ...
    def event_id(self, microbatch: int, /) -> int: ...
    def stats(self) -> dict[str, int]: ...

class PersistentSwap:
    """Made by `AllToAll.persistent`; holds both arrays."""

    def exchange(self, event_id: int, deadline_ns: int, /) -> int | None:
        """One row to and from every rank: None, or a status as of `AllToAll.swap`."""

class AllToAll:
    """One rank's end of the plain all-to-all; protocol in bus/xccl/alltoall.py. Statuses as in `Exchange`; -5: no room.

    `exchange` takes one array cut by counts (int64 rows for each rank), or a list of one array for each rank.
    """

    def __init__(
        self,
        rank: int,
        num_ranks: int,
        stage_bytes: int,
        app_at: int,
        shared_bytes: int,
        yield_ns: int,
        poll_ns: int,
        /,
    ) -> None: ...
    @property
    def culprit(self) -> int: ...
    @property
    def is_open(self) -> bool: ...
    @property
    def total(self) -> int: ...
    def set_peer(
        self, rank: int, buf: Buffer, incarnation: int, cells_offset: int, managed_offset: int, /
    ) -> None: ...
    def drop_peer(self, rank: int, /) -> None: ...
    def exchange(
        self,
        event_id: int,
        array: Buffer | list[Any],
        counts: Buffer | None,
        row_bytes: int,
        out: Buffer | None,
        deadline_ns: int,
        /,
    ) -> int: ...
    def swap(
        self,
        event: tuple[int, int, int, int],
        array: Buffer,
        counts: Buffer | None,
        out: Buffer,
        came: Buffer | None,
        deadline: Deadline,
        /,
    ) -> Any:
        """`exchange` in its common form: the rows, as `out` or its beginning, and in `came` how many came from each.

        Without `counts` every rank gives one row. Otherwise a status; -6: not the common form, nothing was done. A
        status >= 0, bytes received: they are there, but no row from each.
        """
    def persistent(self, array: Buffer, out: Buffer, /) -> PersistentSwap | None:
        """The same of the same arrays, without counts, again and again; None: not the common form."""
    def resume(self, out: Buffer | None, deadline_ns: int, /) -> int: ...
    def abandon(self) -> None: ...
    def counts(self, out: Buffer, /) -> None: ...
    def states(self) -> bytes: ...
    def stats(self) -> dict[str, int]: ...

def partition(group: Buffer, num_groups: int, order: Buffer, starts: Buffer, /) -> int: ...
def route(
    topk_idx: Buffer, top_k: int, num_experts: int, position: Buffer, starts: Buffer, pair_row: Buffer, /
) -> int: ...
def scan_cells(
    buf: Buffer, offset: int, num_cells: int, seen: Buffer, /
) -> list[tuple[int, int, int, int, int]]: ...
def scatter_rows(dst: Buffer, index: Buffer, src: Buffer, row_bytes: int, /) -> None: ...
def gather_rows(dst: Buffer, index: Buffer, src: Buffer, row_bytes: int, /) -> None: ...
def weighted_sum(
    out: Buffer, src: Buffer, index: Buffer, weights: Buffer, num_rows: int, top_k: int, hidden: int, /
) -> None: ...
def weighted_sum_int8(
    out: Buffer, src: Buffer, index: Buffer, weights: Buffer, num_rows: int, top_k: int, hidden: int, /
) -> None:
    """Do the same with rows of `hidden` int8 and their float32 scale, without gaps."""

def quantise(dst: Buffer, scale: Buffer, src: Buffer, num_rows: int, hidden: int, /) -> None: ...
def dequantise(dst: Buffer, src: Buffer, scale: Buffer, num_rows: int, hidden: int, /) -> None: ...
