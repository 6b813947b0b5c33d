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

One copy on the way there, none on the way back. Blocks and cells: bus/xccl/dispatch_layout.py.

Who may overwrite what: a rank stages anew in a microbatch after its combine, hence after every rank that had rows of it
answered, hence pulled; a rank that announced nothing to us is not read. It writes y anew after all counts of
the next dispatch came, hence after every peer's combine. After an error the exchange is abandoned: the next
one (a higher attempt or step) uses the other lane; who sees a later event than the awaited one raises
EventMismatch. What a late peer pulls then is checked like everything else, and its answer carries the old
event. Twin: `bus.xccl.reference.dispatch_combine`.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bus.clock import NS_PER_MS, Deadline
from bus.config import XcclConfig
from bus.errors import EventMismatch, PeerDied, PeerStalled, SegmentCorrupt, Truncated
from bus.memory import _collectives
from bus.memory.segment import Segment
from bus.xccl.dispatch_layout import DispatchHandle, DispatchResult, DispatchShape
from bus.xccl.endpoint import Rank
from bus.xccl.event import Event
from bus.xccl.group import AddressTable
from bus.xccl.int8 import check_rows

Float32Array = npt.NDArray[np.float32]
Int32Array = npt.NDArray[np.int32]

_AWAITED, _MOVED_ON = 1, 2
_FLOAT32, _INT32 = np.dtype(np.float32), np.dtype(np.int32)


@dataclass(slots=True)
class _Microbatch:
    """A microbatch's private memory: result rows, the plan of its open exchange, and how many it has had."""

    x: Float32Array
    y: Float32Array
    topk_idx: Int32Array
    position: Int32Array
    starts: Int32Array
    found: npt.NDArray[np.uint64]
    sent: int = 0
    open_event: int = 0


class Dispatcher:
    """One rank's end of dispatch/combine.

    Args:
        segment: own segment, made with `shape.layout()`; stays the caller's.
        shape: the same on all ranks.
        rank: own index in the group, below `shape.num_ranks`.
        table: addresses of all ranks as `Rank(service, index)`; mapped at the first dispatch.
        config: how long to spin, how often to look at owner locks.
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
        self._segment, self._shape, self._rank, self._table = segment, shape, rank, table
        self._ranks = [Rank(service, index) for index in range(shape.num_ranks)]
        self._name = str(self._ranks[rank])
        self._poll_ns = settings.poll_interval_ms * NS_PER_MS
        sizes = (rank, shape.num_ranks, shape.max_tokens, shape.top_k, shape.hidden, shape.num_local_experts)
        self._native = _collectives.Exchange(
            (*sizes, shape.num_microbatches, shape.int8), shape.offsets(), settings.spin_us * 1_000
        )
        self._native.set_peer(rank, segment.buf, segment.incarnation, *self._areas(segment))
        self._version = -1  # of the table, when all ranks were connected
        self._connected = [segment.incarnation if r == rank else 0 for r in range(shape.num_ranks)]
        self._batches = [self._make_batch(m) for m in range(shape.num_microbatches)]
        self._everyone = bytes(_AWAITED * (r != rank) for r in range(shape.num_ranks))
        self._counts = dict.fromkeys(("dispatches", "combines", "rows_sent", "rows_received", "failures"), 0)

    @staticmethod
    def _areas(segment: Segment) -> tuple[int, int]:
        return segment.layout.cells_offset, segment.layout.managed_offset

    def _make_batch(self, microbatch: int) -> _Microbatch:
        shape = self._shape
        block, y_at = shape.offsets()[0], shape.offsets()[-1]
        size = (shape.pairs_max, shape.hidden)
        if shape.int8:
            y = _page_aligned(size)
        else:
            offset = self._segment.layout.managed_offset + microbatch * block + y_at
            y = self._segment.array(offset, size, np.float32)
        return _Microbatch(
            x=_page_aligned(size),
            y=y,
            topk_idx=np.empty((shape.max_tokens, shape.top_k), np.int32),
            position=np.empty((shape.max_tokens, shape.top_k), np.int32),
            starts=np.empty(shape.num_experts + 1, np.int32),
            found=np.zeros((shape.num_ranks, 2), np.uint64),
        )

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
        handle = self._publish(x, topk_idx, event)
        try:
            state = bytearray(self._everyone)
            self._await(handle, state, handle.found, deadline, combine=False)
            result = self._pull(handle)
        except Exception:
            self._counts["failures"] += 1
            raise
        self._counts["dispatches"] += 1
        self._counts["rows_sent"] += handle.starts.item(-1)
        self._counts["rows_received"] += handle.num_pairs
        return result, handle

    def _publish(self, x: Float32Array, topk_idx: Int32Array, event: Event) -> DispatchHandle:
        handle = self._stage(x, topk_idx, event)
        self._notify(handle)
        return handle

    def _stage(self, x: Float32Array, topk_idx: Int32Array, event: Event) -> DispatchHandle:
        event_id = event.pack()
        self._check_input(x, topk_idx, event)
        self._connect(event_id)
        batch, num_tokens = self._batches[event.microbatch], x.shape[0]
        handle = DispatchHandle(
            event, event_id, num_tokens, 0, batch.topk_idx, batch.position, batch.starts, batch.found
        )
        self._native.stage(
            event.microbatch, num_tokens, x, topk_idx, handle.position, handle.starts, handle.topk_idx
        )
        return handle

    def _check_input(self, x: Float32Array, topk_idx: Int32Array, event: Event) -> None:
        shape = self._shape
        check_rows("x", x, _FLOAT32)
        check_rows("topk_idx", topk_idx, _INT32)
        num_tokens = x.shape[0]
        if num_tokens > shape.max_tokens:
            text = f"{num_tokens} tokens exceed max_tokens={shape.max_tokens}"
            raise Truncated(text, rank=self._name, peer="group", event_id=event.pack())
        if x.shape[1] != shape.hidden or topk_idx.shape != (num_tokens, shape.top_k):
            raise ValueError(
                f"x{list(x.shape)}, topk_idx{list(topk_idx.shape)} must be [n, {shape.hidden}] and [n, {shape.top_k}]"
            )
        if event.microbatch >= shape.num_microbatches:
            raise ValueError(f"event.microbatch: {event.microbatch} must be below {shape.num_microbatches}")

    def _connect(self, event_id: int) -> None:
        version = self._table.version
        if version == self._version:
            return
        for index, rank in enumerate(self._ranks):
            known = self._connected[index]
            if index == self._rank or (known and known == self._table.incarnation(rank)):
                continue
            segment = self._table.segment(rank, asker=self._name, event_id=event_id)
            try:
                self._native.set_peer(index, segment.buf, segment.incarnation, *self._areas(segment))
            except ValueError as error:
                raise self._corrupt(str(error), index, event_id) from error
            self._connected[index] = segment.incarnation
        self._version = version

    def _notify(self, handle: DispatchHandle) -> None:
        batch, microbatch = self._batches[handle.event.microbatch], handle.event.microbatch
        lane = batch.sent & 1
        batch.sent += 1
        batch.open_event = handle.event_id
        self._native.notify(microbatch, lane, handle.event_id, handle.num_tokens, handle.starts, handle.found)

    def _pull(self, handle: DispatchHandle) -> DispatchResult:
        batch, microbatch = self._batches[handle.event.microbatch], handle.event.microbatch
        counts = np.empty(self._shape.num_local_experts, np.int32)
        pairs = self._native.pull(microbatch, handle.found, batch.x, counts)
        if pairs < 0:
            text = "counts or row numbers are outside the agreed shape"
            raise self._corrupt(text, -1 - pairs, handle.event_id)
        handle.num_pairs = pairs
        return DispatchResult(batch.x[:pairs], counts, batch.y[:pairs])

    # ------------------------------------------------------------------ combine

    def combine(
        self,
        y: Float32Array,
        topk_weights: Float32Array,
        handle: DispatchHandle,
        *,
        deadline: Deadline,
        out: Float32Array | None = None,
    ) -> Float32Array:
        """Return every own token's weighted sum over its slots, after giving the others their rows.

        Args:
            y: [num_pairs, hidden] float32, one row per row of the result's x; its own `y` saves a copy.
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
        out, shape = self._check_answer(y, topk_weights, handle, out), self._shape
        handle.done = True
        try:
            state, answered = bytearray(shape.num_ranks), bytearray(16 * shape.num_ranks)
            self._native.answer(
                handle.event.microbatch,
                handle.event_id,
                handle.num_pairs,
                y,
                handle.found,
                handle.starts,
                state,
            )
            self._await(handle, state, answered, deadline, combine=True)
            return self._reduce(handle, answered, topk_weights, out)
        except Exception:
            self._counts["failures"] += 1
            raise

    def _check_answer(
        self, y: Float32Array, topk_weights: Float32Array, handle: DispatchHandle, out: Float32Array | None
    ) -> Float32Array:
        shape = self._shape
        if handle.done or self._batches[handle.event.microbatch].open_event != handle.event_id:
            raise ValueError(f"handle: event {handle.event_id:#x} is not the open exchange of its microbatch")
        out = np.empty((handle.num_tokens, shape.hidden), np.float32) if out is None else out
        for name, array, wanted in (
            ("y", y, (handle.num_pairs, shape.hidden)),
            ("topk_weights", topk_weights, (handle.num_tokens, shape.top_k)),
            ("out", out, (handle.num_tokens, shape.hidden)),
        ):
            check_rows(name, array, _FLOAT32)
            if array.shape != wanted:
                raise ValueError(f"{name}: {list(array.shape)} must be {list(wanted)}")
        return out

    def _reduce(
        self, handle: DispatchHandle, answered: bytearray, weights: Float32Array, out: Float32Array
    ) -> Float32Array:
        corrupt = self._native.reduce(
            handle.event.microbatch,
            handle.num_tokens,
            handle.topk_idx,
            handle.position,
            handle.starts,
            answered,
            weights,
            out,
        )
        if corrupt >= 0:
            text = "its answer has another number of rows, or lies outside its block"
            raise self._corrupt(text, corrupt, handle.event_id)
        self._counts["combines"] += 1
        return out

    # ------------------------------------------------------------------ waiting

    def _await(
        self,
        handle: DispatchHandle,
        state: bytearray,
        found: npt.NDArray[np.uint64] | bytearray,
        deadline: Deadline,
        *,
        combine: bool,
    ) -> None:
        microbatch, event_id = handle.event.microbatch, handle.event_id
        while True:
            patience = min(self._poll_ns, deadline.remaining_ns())
            left = self._native.wait(microbatch, combine, event_id, state, found, patience)
            if left == 0:
                return
            if left < 0:
                names = self._names([r for r, s in enumerate(state) if s == _MOVED_ON])
                raise EventMismatch(
                    "moved on to a later event", rank=self._name, peer=names, event_id=event_id
                )
            self._check_peers([r for r, s in enumerate(state) if s == _AWAITED], event_id, deadline)

    def _check_peers(self, awaited: list[int], event_id: int, deadline: Deadline) -> None:
        dead = [r for r in awaited if not self._alive(r)]
        if dead:
            raise PeerDied("process has ended", rank=self._name, peer=self._names(dead), event_id=event_id)
        if deadline.expired():
            silent = self._names(awaited)
            raise PeerStalled("silent until the deadline", rank=self._name, peer=silent, event_id=event_id)

    def _alive(self, index: int) -> bool:
        rank = self._ranks[index]
        return self._table.incarnation(rank) == self._connected[index] and self._table.alive(rank)

    def _names(self, indices: list[int]) -> str:
        return ",".join(str(self._ranks[r]) for r in indices)

    def _corrupt(self, text: str, peer: int, event_id: int) -> SegmentCorrupt:
        return SegmentCorrupt(text, rank=self._name, peer=str(self._ranks[peer]), event_id=event_id)

    # ------------------------------------------------------------------ the rest

    def stats(self) -> dict[str, int]:
        """Return counters by name; `cell_writes`: metadata writes at peers, `sleeps`: waits that reached the kernel."""
        native = self._native
        return {**self._counts, "cell_writes": native.num_cell_writes, "sleeps": native.num_sleeps}

    def close(self) -> None:
        """Let go of all mappings. The segment and the table stay the caller's."""
        self._batches = []
        for index in range(self._shape.num_ranks):
            self._native.drop_peer(index)


def _page_aligned(size: tuple[int, int]) -> Float32Array:
    """Return zeroed private float32 memory from a page's start on: copies between pages of equal phase are fast."""
    num_bytes = size[0] * size[1] * 4
    return np.frombuffer(mmap.mmap(-1, num_bytes), np.float32).reshape(size)
