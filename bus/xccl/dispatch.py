"""Dispatch and combine: rows to the ranks of their experts and back, when every rank holds both (colocated EP).

Pull-based, counts before data, as in the paper (v6 section 3.2). A rank writes into its **own** managed area only, and
pushes one 32-byte cell with a count to every other rank, zero too, because everybody waits for all counts:

    dispatch   1. stage x, and the pairs (token, slot) sorted by expert, so partitioned by destination
               2. write a cell (event, first pair, number of pairs, number of tokens) at every other rank; ring
               3. wait until all ranks' counts of this event are there
               4. pull: rows come out grouped by local expert, so that y = x[begin:end] @ W needs no further sorting
    (the caller fills y, row by row)
    combine    5. write a cell (event, number of pairs) at every rank that has rows in y; ring
               6. wait for the ranks that have rows of ours
               7. out[token] = sum of weight * y over the slots 0..top_k-1, in this order, read straight from their y

With INT8, 1 quantises, 4 dequantises, 5 quantises y. `dispatch_int8` leaves out the last two: for experts that work on
INT8 rows and return such. One copy on the way there, none on the way back. With `in_place` the rows are pulled to where
y is: for experts that have read a row when they write its result. Blocks, cells: dispatch_layout.py.

Who may overwrite what: a rank stages anew in a microbatch after its combine, hence after every rank that had rows of it
answered, hence pulled; a rank that announced nothing to us is not read. It writes y anew after all counts of
the next dispatch came, hence after every peer's combine. After an error the exchange is abandoned: the next one (a
higher attempt or step) uses the other lane, and withdraws this one before it stages. EventMismatch is what a peer
raises that awaits a count or an answer of a rank that withdrew or shows a later event, or that finds the count
withdrawn after it has pulled. Twin: `bus.xccl.reference.dispatch_combine`.
"""

from __future__ import annotations

import contextlib
import mmap
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from bus.clock import NS_PER_MS, Deadline
from bus.config import XcclConfig
from bus.errors import Truncated
from bus.memory import _collectives
from bus.memory.segment import Segment
from bus.xccl.dispatch_layout import DispatchHandle, DispatchResult, DispatchShape, Int8DispatchResult
from bus.xccl.endpoint import Rank
from bus.xccl.event import Event
from bus.xccl.group import AddressTable
from bus.xccl.int8 import check_rows
from bus.xccl.members import REFUSED, Members

Float32Array = npt.NDArray[np.float32]
Int32Array = npt.NDArray[np.int32]
Int8Array = npt.NDArray[np.int8]

_FLOAT32, _INT32, _INT8 = np.dtype(np.float32), np.dtype(np.int32), np.dtype(np.int8)
_HUGE_PAGE_BYTES = 2 << 20


@dataclass(slots=True)
class _Microbatch:
    """A microbatch's rows: what dispatch brings, and what combine takes away. Scales where INT8 is delivered."""

    x: npt.NDArray[Any]
    y: npt.NDArray[Any]
    x_scale: Float32Array | None = None
    y_scale: Float32Array | None = None


class Dispatcher:
    """One rank's end of dispatch/combine.

    Args:
        segment: own segment, made with `shape.layout()`; stays the caller's.
        shape: the same on all ranks.
        rank: own index in the group, below `shape.num_ranks`.
        table: addresses of all ranks as `Rank(service, index)`; mapped at the first dispatch.
        config: how long to poll before sleeping (`spin_us` for each rank of the group, because ranks that share a core
        take turns), how often to look at owner locks.
        service: first part of the ranks' names.

    Threads: one. Blocks only in `dispatch` and `combine`, both up to their deadline.
    """

    def __init__(
        self,
        segment: Segment,
        shape: DispatchShape,
        rank: int,
        table: AddressTable,
        *,
        config: XcclConfig | None = None,
        service: str = "expert",
    ) -> None:
        settings = config or XcclConfig()
        self._segment, self._shape = segment, shape
        sizes = (rank, shape.num_ranks, shape.max_tokens, shape.top_k, shape.hidden, shape.num_local_experts)
        self._native = _collectives.Exchange(
            (*sizes, shape.num_microbatches, shape.int8, shape.deliver_int8),
            shape.offsets(),
            settings.spin_us * 1_000 * shape.num_ranks,
            settings.poll_interval_ms * NS_PER_MS,
        )
        ranks = [Rank(service, index) for index in range(shape.num_ranks)]
        self._members = Members(self._native, segment, rank, ranks, table)
        self._batches = [self._make_batch(m) for m in range(shape.num_microbatches)]
        self._num_failures = 0

    def _make_batch(self, microbatch: int) -> _Microbatch:
        shape = self._shape
        block, *_, y_scale_at, y_at = shape.offsets()
        size, at = (shape.pairs_max, shape.hidden), self._segment.layout.managed_offset + microbatch * block
        y_scale = None
        if shape.deliver_int8:
            y: npt.NDArray[Any] = self._segment.array(at + y_at, size, np.int8)
            y_scale = self._segment.array(at + y_scale_at, (shape.pairs_max,), np.float32)
        elif shape.int8:
            y = _page_aligned(size, _FLOAT32)
        else:
            y = self._segment.array(at + y_at, size, np.float32)
        if shape.in_place:
            batch = _Microbatch(x=y, y=y, x_scale=y_scale, y_scale=y_scale)
        else:
            x_scale = None if y_scale is None else np.zeros(shape.pairs_max, np.float32)
            batch = _Microbatch(x=_page_aligned(size, y.dtype), y=y, x_scale=x_scale, y_scale=y_scale)
        self._native.bind(microbatch, batch.x, batch.x_scale)
        return batch

    def input_rows(self, microbatch: int) -> Float32Array:
        """Return [max_tokens, hidden] float32 in the own managed area: rows written here need no copy to be staged.

        Write only between a combine and the next dispatch of this microbatch, and hand `rows[:num_tokens]` to
        `dispatch`. Raises ValueError with INT8 transport, where staging is the quantising.
        """
        shape = self._shape
        if shape.int8:
            raise ValueError("input_rows: INT8 transport has no float32 rows in shared memory")
        offset = self._segment.layout.managed_offset + microbatch * shape.offsets()[0] + shape.offsets()[1]
        return self._segment.array(offset, (shape.max_tokens, shape.hidden), np.float32)

    # ------------------------------------------------------------------ dispatch

    def dispatch(
        self, x: Float32Array, topk_idx: Int32Array, *, event: Event, deadline: Deadline
    ) -> tuple[DispatchResult, DispatchHandle]:
        """Send every row of `x` to the ranks of its experts, and receive what the others sent here.

        Args:
            x: [num_tokens, hidden] float32, C-contiguous; may be reused after return. num_tokens may be 0.
            topk_idx: [num_tokens, top_k] int32 physical expert ids; -1 = no expert for this slot.
            event: names the exchange, the same on all ranks, later than the one before; its microbatch picks
            the buffers.
            deadline: by then every rank must have announced its counts.

        Returns:
            (result, handle); the handle goes to exactly one `combine`.

        Raises:
            Truncated: more tokens than `max_tokens`. ValueError: shape, dtype or an expert id. Nothing was sent.
            PeerDied, PeerStalled: name the ranks. EventMismatch: a rank has moved on to a later event.
            SegmentCorrupt: a rank's counts or rows are impossible. In these four cases the exchange is abandoned; all
            ranks go on with a later event.

        Order: rows keep (source rank, token, slot) order per local expert. Blocks: yes; releases the GIL.
        Source: paper section 3. Twin: `bus.xccl.reference.dispatch_combine`.
        """
        if self._shape.deliver_int8:
            raise ValueError("dispatch: the shape says deliver_int8, which dispatch_int8 does")
        num, counts, handle = self._dispatch(x, topk_idx, event, deadline)
        batch = self._batches[event.microbatch]
        return DispatchResult(batch.x[:num], counts, batch.y[:num]), handle

    def dispatch_int8(
        self, x: Float32Array, topk_idx: Int32Array, *, event: Event, deadline: Deadline
    ) -> tuple[Int8DispatchResult, DispatchHandle]:
        """Do what `dispatch` does, and hand out the INT8 rows and their scales as they came.

        For shapes that say `deliver_int8`; else ValueError. The experts fill `y` and `y_scale` of the result, and
        `combine` takes that `y`: rows are rounded where they are sent and by the experts, nowhere else.
        Twin: `bus.xccl.reference.dispatch_combine_int8`.
        """
        batch = self._batches[event.microbatch] if event.microbatch < len(self._batches) else self._batches[0]
        if batch.x_scale is None or batch.y_scale is None:
            raise ValueError("dispatch_int8: the shape does not say deliver_int8")
        num, counts, handle = self._dispatch(x, topk_idx, event, deadline)
        rows = (batch.x[:num], batch.x_scale[:num], counts, batch.y[:num], batch.y_scale[:num])
        return Int8DispatchResult(*rows), handle

    def _dispatch(
        self, x: Float32Array, topk_idx: Int32Array, event: Event, deadline: Deadline
    ) -> tuple[int, Int32Array, DispatchHandle]:
        """Return the number of rows that came, how many of each local expert, and the handle."""
        if not self._members.is_current:
            self._check_input(x, topk_idx, event)
            self._members.connect(event.pack())
        num_pairs = self._native.dispatch(event, x, topk_idx, deadline.at_ns)
        if num_pairs < 0:
            num_pairs = self._dispatch_slowly(num_pairs, x, topk_idx, event, deadline)
        counts = np.empty(self._shape.num_local_experts, np.int32)
        self._native.expert_counts(event.microbatch, counts)
        event_id = self._native.event_id(event.microbatch)
        return num_pairs, counts, DispatchHandle(event, event_id, len(x), num_pairs)

    def _dispatch_slowly(
        self, status: int, x: Float32Array, topk_idx: Int32Array, event: Event, deadline: Deadline
    ) -> int:
        """Go on after a dispatch that did not end at once: raise what is wrong, or wait longer."""
        if status == REFUSED:
            self._refuse_input(x, topk_idx, event)
        return self._finish(status, event, deadline)

    def _finish(self, status: int, event: Event, deadline: Deadline) -> int:
        try:
            while status < 0:
                until = self._judge(status, event.microbatch, event.pack(), deadline)
                status = self._native.receive(event.microbatch, until)
        except Exception:
            self._num_failures += 1
            raise
        return status

    def _stage(self, x: Float32Array, topk_idx: Int32Array, event: Event) -> None:
        """Step 1 of a dispatch alone; tests stop here."""
        self._check_input(x, topk_idx, event)
        self._members.connect(event.pack())
        if self._native.stage(event, x, topk_idx) < 0:
            self._refuse_input(x, topk_idx, event)

    def _announce(self, event: Event) -> None:
        """Step 2 alone."""
        self._native.announce(event.microbatch)

    def _refuse_input(self, x: Float32Array, topk_idx: Int32Array, event: Event) -> None:
        self._check_input(x, topk_idx, event)
        last = self._shape.num_experts - 1
        if topk_idx.size and not (topk_idx.min() >= -1 and topk_idx.max() <= last):
            raise ValueError(f"topk_idx: an expert id is outside -1..{last}")
        raise ValueError("x, topk_idx: their memory must be aligned to 4 bytes and not change meanwhile")

    def _check_input(self, x: Float32Array, topk_idx: Int32Array, event: Event) -> None:
        shape = self._shape
        check_rows("x", x, _FLOAT32)
        check_rows("topk_idx", topk_idx, _INT32)
        event_id, num_tokens = event.pack(), x.shape[0]
        if num_tokens > shape.max_tokens:
            text = f"{num_tokens} tokens exceed max_tokens={shape.max_tokens}"
            raise Truncated(text, rank=self._members.name, peer="group", event_id=event_id)
        if x.shape[1] != shape.hidden or topk_idx.shape != (num_tokens, shape.top_k):
            raise ValueError(
                f"x{list(x.shape)}, topk_idx{list(topk_idx.shape)} must be [n, {shape.hidden}] and [n, {shape.top_k}]"
            )
        if event.microbatch >= shape.num_microbatches:
            raise ValueError(f"event.microbatch: {event.microbatch} must be below {shape.num_microbatches}")

    # ------------------------------------------------------------------ combine

    def combine(
        self,
        y: Float32Array | Int8Array,
        topk_weights: Float32Array,
        handle: DispatchHandle,
        *,
        deadline: Deadline,
        out: Float32Array | None = None,
    ) -> Float32Array:
        """Return every own token's weighted sum over its slots, after giving the others their rows.

        Args:
            y: [num_pairs, hidden] float32, one row per row of the result's x; its own `y` saves a copy. After
            `dispatch_int8` the result's own `y`, int8, filled in place like its `y_scale`.
            topk_weights: [num_tokens, top_k] float32; those of slots without expert are not read.
            handle: of the dispatch; used up.
            deadline: by then every rank that holds rows of ours must have answered.
            out: [num_tokens, hidden] float32 to fill, or None for a new array.

        Returns:
            out: 0 + weight * y for slots 0..top_k-1 in this order, in float32.

        Raises:
            ValueError: shapes or dtypes; the handle was used or is not of the microbatch's last dispatch.
            Nothing was sent. PeerDied, PeerStalled, EventMismatch, SegmentCorrupt: as in `dispatch`; the
            exchange is abandoned.

        Blocks: yes; releases the GIL. Source: paper section 3. Twin: `bus.xccl.reference.dispatch_combine`.
        """
        if out is None:
            out = np.empty((handle.num_tokens, self._shape.hidden), np.float32)
        microbatch, event_id = handle.event.microbatch, handle.event_id
        status = self._native.combine(microbatch, event_id, y, topk_weights, out, deadline.at_ns)
        if status == REFUSED:
            self._refuse_answer(y, topk_weights, handle, out)
        try:
            while status < 0:
                until = self._judge(status, microbatch, event_id, deadline)
                status = self._native.combine(microbatch, event_id, None, topk_weights, out, until)
        except Exception:
            self._num_failures += 1
            raise
        return out

    def _refuse_answer(
        self,
        y: Float32Array | Int8Array,
        topk_weights: Float32Array,
        handle: DispatchHandle,
        out: Float32Array,
    ) -> None:
        shape = self._shape
        rows: tuple[tuple[str, npt.NDArray[Any], tuple[int, int], np.dtype[Any]], ...] = (
            ("y", y, (handle.num_pairs, shape.hidden), _INT8 if shape.deliver_int8 else _FLOAT32),
            ("topk_weights", topk_weights, (handle.num_tokens, shape.top_k), _FLOAT32),
            ("out", out, (handle.num_tokens, shape.hidden), _FLOAT32),
        )
        for name, array, wanted, dtype in rows:
            check_rows(name, array, dtype)
            if array.shape != wanted:
                raise ValueError(f"{name}: {list(array.shape)} must be {list(wanted)}")
        if not out.flags.writeable:
            raise ValueError("out: must be writable")
        own = self._batches[handle.event.microbatch].y
        if shape.deliver_int8 and y.size and y.ctypes.data != own.ctypes.data:
            raise ValueError("y: INT8 rows must be those of the dispatch's result, filled in place")
        raise ValueError(f"handle: event {handle.event_id:#x} is not the open exchange of its microbatch")

    def _judge(self, status: int, microbatch: int, event_id: int, deadline: Deadline) -> int:
        return self._members.judge(status, self._native.states(microbatch), event_id, deadline)

    # ------------------------------------------------------------------ the rest

    def stats(self) -> dict[str, int]:
        """Return counters by name.

        cell_writes: metadata writes at peers. waits: how often something was missing; of these, relax_wins and
        yield_wins ended while polling and sleeps reached the kernel. moves: how
        often this rank went to another core (see bus/README.md, "Waiting for n ranks").
        """
        return {**self._native.stats(), "failures": self._num_failures}

    def close(self) -> None:
        """Let go of all mappings. The segment and the table stay the caller's."""
        self._batches = []
        self._members.close()


def _page_aligned(size: tuple[int, int], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Return zeroed private memory from a page's start on: copies between pages of equal phase are fast."""
    num_bytes = size[0] * size[1] * dtype.itemsize
    memory = mmap.mmap(-1, num_bytes)
    if num_bytes >= _HUGE_PAGE_BYTES:
        with contextlib.suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, dtype).reshape(size)
