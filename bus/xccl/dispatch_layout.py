"""Where everything lies for dispatch/combine: the block of a microbatch, the cells; and what a call returns.

Managed area: one block per microbatch; every part is sized by the largest batch, so nothing is allocated or
negotiated later:

    +-----------------------------+ x          [max_tokens, hidden] float32, or int8
    | staged by dispatch, step 1  | x_scale    [max_tokens] float32, used by INT8
    |                             | starts     [num_experts + 1] int32: pairs of expert e are starts[e]..starts[e+1]
    |                             | pair_row   [max_tokens * top_k] int32: the token of a pair
    +-----------------------------+
    | written by dispatch, step 4 | y_start    [num_ranks, num_local_experts] int32: row of y where a source's begin
    | written by the caller, or 5 | y_scale    [num_ranks * max_tokens * top_k] float32, used by INT8
    |                             | y          [num_ranks * max_tokens * top_k, hidden] float32, or int8
    +-----------------------------+

Cells: three lanes per (peer, microbatch): dispatch counts alternate between lanes 0 and 1, answers use lane 2. w0 is a
stamp (incarnation, count of writes), w1 the event id, w2 = first pair << 32 | pairs (or 1 << 62: withdrawn), w3 =
tokens. Two lanes, because a rank that had nothing for us may finish the exchange and begin the next of that microbatch
before we have looked; it cannot get further, since its next dispatch waits for our count.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bus.memory.layout import LINE_BYTES, PAGE_BYTES, SegmentLayout, align_up
from bus.xccl.event import Event

Float32Array = npt.NDArray[np.float32]
Int32Array = npt.NDArray[np.int32]
Int8Array = npt.NDArray[np.int8]

NUM_LANES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatchShape:
    """Sizes from which all ranks derive the same offsets.

    Experts are physical: rank r holds the ids r * num_local_experts onward. Which logical expert an id stands
    for is the caller's business, so replicas and moved experts need no word here.
    """

    num_ranks: int
    max_tokens: int  # largest batch of a rank, per microbatch
    top_k: int
    hidden: int
    num_local_experts: int
    num_microbatches: int = 1
    int8: bool = False  # rows and results travel as INT8 with a scale each
    deliver_int8: bool = (
        False  # and are handed to and taken from the experts so; the same bytes in shared memory
    )
    in_place: bool = False  # results take the place of the rows that came; a rank's own business

    def __post_init__(self) -> None:
        if self.deliver_int8 and not self.int8:
            raise ValueError("deliver_int8: True needs int8=True")

    @property
    def num_experts(self) -> int:
        """Physical experts of the group."""
        return self.num_ranks * self.num_local_experts

    @property
    def pairs_max(self) -> int:
        """Largest number of rows that one rank can receive in one microbatch: everything."""
        return self.num_ranks * self.max_tokens * self.top_k

    @property
    def row_bytes(self) -> int:
        """Bytes of a row in shared memory."""
        return self.hidden if self.int8 else 4 * self.hidden

    def offsets(self) -> tuple[int, int, int, int, int, int, int, int]:
        """Return (block bytes, then the offset of x, x_scale, starts, pair_row, y_start, y_scale, y in a block)."""
        parts = (
            self.max_tokens * self.row_bytes,
            self.max_tokens * 4,
            (self.num_experts + 1) * 4,
            self.max_tokens * self.top_k * 4,
            self.num_experts * 4,
            self.pairs_max * 4,
            self.pairs_max * self.row_bytes,
        )
        places, at = [], 0
        for num_bytes in parts[:-1]:
            places.append(at)
            at += align_up(num_bytes, LINE_BYTES)
        y = align_up(at, PAGE_BYTES)
        block = align_up(y + parts[-1], PAGE_BYTES)
        x, x_scale, starts, pair_row, y_start, y_scale = places
        return block, x, x_scale, starts, pair_row, y_start, y_scale, y

    def layout(self) -> SegmentLayout:
        """Return the layout of the segment that each rank needs."""
        num_cells = self.num_ranks * self.num_microbatches * NUM_LANES
        return SegmentLayout(num_cells, self.num_microbatches * self.offsets()[0], 0)


@dataclass(slots=True)
class DispatchResult:
    """What reached a rank.

    x: [num_pairs, hidden] float32, own memory, valid until the next dispatch of this microbatch. Rows are grouped by
    local expert; within one they keep the order (source rank, token, slot).
    expert_counts: [num_local_experts] int32, rows of each local expert.
    y: [num_pairs, hidden] float32 to be filled, row by row; handing just this array to `combine` saves a copy. The
    same array as x where the shape says `in_place`.
    """

    x: Float32Array
    expert_counts: Int32Array
    y: Float32Array


@dataclass(slots=True)
class Int8DispatchResult:
    """What reached a rank, INT8 as it came: a value is float32(x) * x_scale of its row.

    x: [num_pairs, hidden] int8, x_scale: [num_pairs] float32, own memory, valid and ordered as in `DispatchResult`. A
    row whose scale is NaN was not finite at its source. expert_counts: [num_local_experts] int32.
    y: [num_pairs, hidden] int8, y_scale: [num_pairs] float32: to be filled, row by row. They lie in shared memory and
    are what the others add, without another rounding; after `combine` they may not be touched until the next dispatch
    of this microbatch has returned. The same arrays as x and x_scale where the shape says `in_place`.
    """

    x: Int8Array
    x_scale: Float32Array
    expert_counts: Int32Array
    y: Int8Array
    y_scale: Float32Array


@dataclass(slots=True)
class DispatchHandle:
    """What `dispatch` returns and exactly one `combine` needs: the name and size of an open exchange."""

    event: Event
    event_id: int
    num_tokens: int
    num_pairs: int
