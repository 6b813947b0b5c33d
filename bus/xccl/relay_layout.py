"""Where everything lies for A2E/E2A with trampolines: blocks, cells, and which trampoline serves an attention rank.

    source block (of an attention rank, per microbatch; a trampoline's copy of it has the same form)
    +-------------+-----------------+--------------+------------------+---------------------+
    | x [rows_max]| x_scale [f32]   | starts [E+1] | pair_row [pairs] | pair_expert [pairs] |
    +-------------+-----------------+--------------+------------------+---------------------+
    result block (of an expert rank, per attention rank and microbatch; a trampoline's collection has the same form)
    +---------------------+-----------------+
    | y [pairs_max]       | y_scale [f32]   |
    +---------------------+-----------------+

Rows are `hidden` float32, or int8 with the scales used. Pairs are sorted by expert rank; rank r's are starts[r] to
starts[r + 1]. Managed areas: an attention rank has a source block per microbatch. An expert rank has a result block per
(attention rank, microbatch), then per (seat, microbatch) a source block, then per (seat, microbatch) a result block; a
*seat* is a place at a trampoline for an attention rank.

Cells: w0 stamp (incarnation, count of writes), w1 event id. On the way out w2 = first pair << 32 | pairs, w3 = rows; on
the way back w2 = pairs (or FAILED | expert rank), w3 = the stamp that is being answered, so that an answer to
an earlier life or attempt is never taken for the present one.

    in an attention rank's metadata            in an expert rank's metadata
    [expert r, m]  direct answer of r          [attention i, m]       A2E, direct
    [m]            E2A, by the trampoline      [attention i, m]       A2E_FORWARD, by i's trampoline
                                               [seat, m]              A2E, for this rank as trampoline
                                               [expert r, seat, m]    E2A_FORWARD, by r

A cell has 32 bytes. Behind a direct cell of microbatch 0 its writer says, in a u32, on which core it polls.
With several DP domains, the ranks of each domain use the same trampolines at seats of their own.
"""

from __future__ import annotations

import enum
import mmap
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from bus.memory.layout import LINE_BYTES, SegmentLayout, align_up
from bus.memory.segment import Segment

Float32Array = npt.NDArray[np.float32]
Int32Array = npt.NDArray[np.int32]
Int8Array = npt.NDArray[np.int8]

U32 = 0xFFFFFFFF
_BURST_PEERS_MAX = 8


class CellKind(enum.Enum):
    """What a cell in an expert rank's metadata is for."""

    DIRECT = "direct"
    FORWARD = "forward"
    ENTRY = "entry"
    RETURN = "return"


class CellPlace(NamedTuple):
    """What a cell's index means: who it concerns."""

    kind: CellKind
    peer: int  # attention rank; the seat of an ENTRY; the expert rank of a RETURN
    seat: int
    microbatch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RelayShape:
    """Sizes from which all ranks derive the same places."""

    num_attention_ranks: int
    num_expert_ranks: int
    rows_max: int  # largest number of rows of one microbatch
    num_slots: int  # expert slots per row
    hidden: int
    num_microbatches: int = 1
    num_domains: int = 1  # DP domains, equal in number of attention ranks but for the last
    int8: bool = False  # rows and results travel as INT8 with a scale each
    deliver_int8: bool = (
        False  # and are handed to and taken from the experts so; the same bytes in shared memory
    )
    has_trampolines: bool = True  # False saves the memory of the seats

    def __post_init__(self) -> None:
        if self.deliver_int8 and not self.int8:
            raise ValueError("deliver_int8: True needs int8=True")
        for name in ("num_attention_ranks", "num_expert_ranks", "rows_max", "num_slots", "hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} must be at least 1")
        if not 1 <= self.num_domains <= self.num_attention_ranks or self.num_microbatches < 1:
            raise ValueError(
                f"num_domains: {self.num_domains} must be in 1..{self.num_attention_ranks}, "
                f"num_microbatches: {self.num_microbatches} at least 1"
            )

    # ------------------------------------------------------------------ trampolines

    @property
    def domain_ranks(self) -> int:
        """Attention ranks of a DP domain."""
        return -(-self.num_attention_ranks // self.num_domains)

    @property
    def num_seats(self) -> int:
        """Attention ranks that one trampoline may have to serve."""
        return self.num_domains * self._domain_seats if self.has_trampolines else 0

    @property
    def _domain_seats(self) -> int:
        return -(-self.domain_ranks // self.num_expert_ranks)

    def trampoline_of(self, attention: int) -> int:
        """Return the expert rank that takes from attention rank `attention`: its place in its domain, mod E."""
        return attention % self.domain_ranks % self.num_expert_ranks

    def seat_of(self, attention: int) -> int:
        """Return the seat of `attention` at its trampoline."""
        domain, place = divmod(attention, self.domain_ranks)
        return domain * self._domain_seats + place // self.num_expert_ranks

    def guest(self, expert: int, seat: int) -> int:
        """Return the attention rank at `seat` of trampoline `expert`; it may be >= `num_attention_ranks`: nobody."""
        domain, round_ = divmod(seat, self._domain_seats)
        place = round_ * self.num_expert_ranks + expert
        return domain * self.domain_ranks + place if place < self.domain_ranks else self.num_attention_ranks

    # ------------------------------------------------------------------ blocks

    @property
    def pairs_max(self) -> int:
        """Largest number of (row, expert) pairs of a microbatch."""
        return self.rows_max * self.num_slots

    @property
    def row_bytes(self) -> int:
        """Bytes of a row in shared memory."""
        return self.hidden if self.int8 else 4 * self.hidden

    @property
    def _source_parts(self) -> tuple[int, int, int, int, int]:
        scale = 4 * self.rows_max if self.int8 else 0
        pairs = 4 * self.pairs_max
        return self.rows_max * self.row_bytes, scale, 4 * (self.num_expert_ranks + 1), pairs, pairs

    @property
    def _source_places(self) -> list[int]:
        ends = accumulate(align_up(part, LINE_BYTES) for part in self._source_parts)
        return [0, *ends][:-1]

    @property
    def scale_places(self) -> tuple[int, int]:
        """Places of x_scale in a source block and of y_scale in a result block."""
        return self._source_places[1], align_up(self.pairs_max * self.row_bytes, LINE_BYTES)

    @property
    def source_bytes(self) -> int:
        """Bytes of a source block."""
        return sum(align_up(part, LINE_BYTES) for part in self._source_parts)

    @property
    def result_bytes(self) -> int:
        """Bytes of a result block."""
        scale = 4 * self.pairs_max if self.int8 else 0
        return align_up(self.pairs_max * self.row_bytes, LINE_BYTES) + align_up(scale, LINE_BYTES)

    def geometry(self, rank: int) -> tuple[int, ...]:
        """Return the numbers from which bus/memory/_relay.c finds every block and cell; it checks them."""
        _, _, starts, pair_row, pair_expert = self._source_places
        sizes = (self.num_attention_ranks, self.num_expert_ranks, self.rows_max, self.num_slots, self.hidden)
        seats = (self.domain_ranks, self._domain_seats, self.num_seats)
        x_scale, y_scale = self.scale_places
        source = (self.source_bytes, x_scale, starts, pair_row, pair_expert)
        results = (self.result_bytes, y_scale, self.seat_source(0, 0), self.seat_result(0, 0))
        flags = int(self.int8), int(self.deliver_int8)
        return (rank, *sizes, self.num_microbatches, flags[0], *seats, *source, *results, flags[1])

    def attention_source(self, microbatch: int) -> int:
        """Return the place of an attention rank's source block."""
        return microbatch * self.source_bytes

    def expert_result(self, attention: int, microbatch: int) -> int:
        """Return the place of an expert rank's result block for `attention`."""
        return (attention * self.num_microbatches + microbatch) * self.result_bytes

    @property
    def _seats_at(self) -> int:
        return self.num_attention_ranks * self.num_microbatches * self.result_bytes

    def seat_source(self, seat: int, microbatch: int) -> int:
        """Return the place of a trampoline's copy of a source block."""
        return self._seats_at + (seat * self.num_microbatches + microbatch) * self.source_bytes

    def seat_result(self, seat: int, microbatch: int) -> int:
        """Return the place of a trampoline's collected results."""
        sources = self.num_seats * self.num_microbatches * self.source_bytes
        return self._seats_at + sources + (seat * self.num_microbatches + microbatch) * self.result_bytes

    def attention_layout(self) -> SegmentLayout:
        """Return the layout of an attention rank's segment."""
        num_cells = (self.num_expert_ranks + 1) * self.num_microbatches
        return SegmentLayout(num_cells, self.num_microbatches * self.source_bytes, 0)

    def expert_layout(self) -> SegmentLayout:
        """Return the layout of an expert rank's segment."""
        groups = 2 * self.num_attention_ranks + self.num_seats + self.num_expert_ranks * self.num_seats
        end = self.seat_result(self.num_seats, 0)
        return SegmentLayout(groups * self.num_microbatches, end, 0)

    # ------------------------------------------------------------------ cells

    def answer_cell(self, expert: int, microbatch: int) -> int:
        """Return the index of the cell that `expert` writes at an attention rank when it answers directly."""
        return expert * self.num_microbatches + microbatch

    def e2a_cell(self, microbatch: int) -> int:
        """Return the index of the cell that the trampoline writes at an attention rank."""
        return self.num_expert_ranks * self.num_microbatches + microbatch

    def expert_cell(self, place: CellPlace) -> int:
        """Return the index of a cell at an expert rank."""
        ranks, seats = self.num_attention_ranks, self.num_seats
        group = {
            CellKind.DIRECT: place.peer,
            CellKind.FORWARD: ranks + place.peer,
            CellKind.ENTRY: 2 * ranks + place.seat,
            CellKind.RETURN: 2 * ranks + seats + place.peer * seats + place.seat,
        }[place.kind]
        return group * self.num_microbatches + place.microbatch

    def locate(self, index: int) -> CellPlace:
        """Return what the cell `index` of an expert rank means: the inverse of `expert_cell`."""
        group, microbatch = divmod(index, self.num_microbatches)
        ranks, seats = self.num_attention_ranks, self.num_seats
        if group < ranks:
            return CellPlace(CellKind.DIRECT, group, 0, microbatch)
        if group < 2 * ranks:
            return CellPlace(CellKind.FORWARD, group - ranks, 0, microbatch)
        if group < 2 * ranks + seats:
            return CellPlace(CellKind.ENTRY, group - 2 * ranks, group - 2 * ranks, microbatch)
        expert, seat = divmod(group - 2 * ranks - seats, seats)
        return CellPlace(CellKind.RETURN, expert, seat, microbatch)


def burst_ns(spin_us: int, num_peers: int) -> int:
    """Return how long to poll for `num_peers` ranks at least: their work may have to be done on the cores that poll."""
    return spin_us * 1_000 * min(num_peers, _BURST_PEERS_MAX)


def segment_words(segment: Segment) -> tuple[mmap.mmap, int, int, int]:
    """Return what bus/memory/_relay.c needs of a segment: buffer, incarnation, offsets of cells and managed area."""
    layout = segment.layout
    return segment.buf, segment.incarnation, layout.cells_offset, layout.managed_offset
