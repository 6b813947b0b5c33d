"""The two ends of A2E/E2A over mapped segments; wrapped by bus/xccl/trampoline.py and bus/xccl/relay.py.

`Geometry` is `RelayShape.geometry(rank)`, `SegmentWords` is (buf, incarnation, cells_offset, managed_offset).
Errors of every call, with nothing done: ValueError (an array has another dtype, shape or memory order, a value breaks
its rule), IndexError (rank, microbatch or cell outside its range), RuntimeError (closed, or another thread is inside).
Waiting, and copying many bytes, release the GIL.
"""

from typing import Any, TypeAlias

Buffer: TypeAlias = Any
Geometry: TypeAlias = tuple[int, ...]
SegmentWords: TypeAlias = tuple[Buffer, int, int, int]

class AttentionEnd:
    """The attention rank's end: stages rows, tells the experts, waits, takes results."""

    def __init__(self, geometry: Geometry, segment: SegmentWords, spin_ns: int, /) -> None: ...
    def set_peer(
        self, expert: int, buf: Buffer, incarnation: int, cells_offset: int, managed_offset: int, /
    ) -> None: ...
    def drop_peer(self, expert: int, /) -> None: ...
    def close(self) -> None: ...
    def send(
        self,
        x: Buffer,
        slot_rank: Buffer,
        slot_expert: Buffer,
        event: tuple[int, int, int, int],
        route: int,
        /,
    ) -> int:
        """Return the exchange's token, or -1 - expert rank that is needed and not connected; then nothing was sent."""

    def count(self, slot_rank: Buffer, /) -> tuple[int, int]:
        """Return (expert ranks that are needed, pairs)."""

    def recv(
        self, token: int, microbatch: int, weights: Buffer | None, out: Buffer, timeout_ns: int, /
    ) -> bool | tuple[int, int, int]:
        """Tell whether all have answered and `out` is filled, or what went wrong: (code, expert rank, value)."""

    def pending(self, token: int, microbatch: int, /) -> list[tuple[int, int]]:
        """Return (expert rank, its incarnation when asked) of those that have not answered."""

    def counters(self) -> dict[str, int]: ...

class ExpertEnd:
    """The expert rank's end: finds and answers arrivals, forwards and collects for its guests."""

    def __init__(self, geometry: Geometry, segment: SegmentWords, spin_ns: int, /) -> None: ...
    @property
    def num_relays(self) -> int: ...
    def set_attention(
        self, rank: int, buf: Buffer, incarnation: int, cells_offset: int, managed_offset: int, /
    ) -> None: ...
    def set_expert(
        self, rank: int, buf: Buffer, incarnation: int, cells_offset: int, managed_offset: int, /
    ) -> None: ...
    def drop_peer(self, is_attention: bool, rank: int, absent: bool, /) -> None: ...
    def set_slot(self, index: int, memory: Buffer, rows: int, pairs: int, /) -> None: ...
    def look_again(self, index: int, /) -> None: ...
    def poll(
        self,
    ) -> (
        tuple[
            list[tuple[int, int, int, int, int]] | None,
            list[tuple[int, int, int, int, int, int]] | None,
        ]
        | None
    ):
        """Return arrivals (cell, stamp, event id, rows, pairs) and problems (code, cell, stamp, event id, a, b)."""

    def commit(self, index: int, word: int, /) -> bool: ...
    def wait(self, timeout_ns: int, /) -> bool: ...
    def awaited(self) -> list[tuple[int, int, int, int]]: ...
    def fail(self, seat: int, microbatch: int, owner: int, /) -> None: ...
    def counters(self) -> dict[str, int]: ...
    def close(self) -> None: ...
