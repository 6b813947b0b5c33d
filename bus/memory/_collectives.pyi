"""Rows of the all-to-all collectives: routing, staging, counts, waiting, pulling, weighted addition.

Errors of every call, with nothing done: ValueError (a buffer is too short or not aligned, a value breaks its rule),
IndexError (microbatch, rank or row outside its range), LookupError (a rank is not connected), RuntimeError (another
thread is inside the same Exchange). Calls that touch rows or wait release the GIL. Arrays are C-contiguous.
"""

from typing import Any, TypeAlias

Buffer: TypeAlias = Any

class Exchange:
    """One rank's end of dispatch/combine over mapped segments; layout and protocol in bus/xccl/dispatch.py."""

    def __init__(
        self,
        shape: tuple[int, int, int, int, int, int, int, bool],
        offsets: tuple[int, int, int, int, int, int, int, int],
        spin_ns_max: int,
        /,
    ) -> None: ...
    @property
    def num_sleeps(self) -> int: ...
    @property
    def num_cell_writes(self) -> int: ...
    def set_peer(
        self, rank: int, buf: Buffer, incarnation: int, cells_offset: int, managed_offset: int, /
    ) -> None: ...
    def drop_peer(self, rank: int, /) -> None: ...
    def stage(
        self,
        microbatch: int,
        num_tokens: int,
        x: Buffer,
        topk_idx: Buffer,
        position: Buffer,
        starts: Buffer,
        topk_kept: Buffer,
        /,
    ) -> None: ...
    def notify(
        self,
        microbatch: int,
        lane: int,
        event_id: int,
        num_tokens: int,
        starts: Buffer,
        found: Buffer,
        /,
    ) -> None: ...
    def wait(
        self, microbatch: int, combine: bool, event_id: int, state: Buffer, found: Buffer, timeout_ns: int, /
    ) -> int: ...
    def pull(self, microbatch: int, found: Buffer, x_out: Buffer, expert_counts: Buffer, /) -> int: ...
    def answer(
        self,
        microbatch: int,
        event_id: int,
        num_pairs: int,
        y: Buffer,
        found: Buffer,
        starts: Buffer,
        state: Buffer,
        /,
    ) -> None: ...
    def reduce(
        self,
        microbatch: int,
        num_tokens: int,
        topk_idx: Buffer,
        position: Buffer,
        starts: Buffer,
        answered: Buffer,
        weights: Buffer,
        out: Buffer,
        /,
    ) -> int: ...

def partition(group: Buffer, num_groups: int, order: Buffer, starts: Buffer, /) -> int: ...
def scan_cells(
    buf: Buffer, offset: int, num_cells: int, seen: Buffer, /
) -> list[tuple[int, int, int, int, int]]: ...
def scatter_rows(dst: Buffer, index: Buffer, src: Buffer, row_bytes: int, /) -> None: ...
def gather_rows(dst: Buffer, index: Buffer, src: Buffer, row_bytes: int, /) -> None: ...
def weighted_sum(
    out: Buffer, src: Buffer, index: Buffer, weights: Buffer, num_rows: int, top_k: int, hidden: int, /
) -> None: ...
def quantise(dst: Buffer, scale: Buffer, src: Buffer, num_rows: int, hidden: int, /) -> None: ...
def dequantise(dst: Buffer, src: Buffer, scale: Buffer, num_rows: int, hidden: int, /) -> None: ...
