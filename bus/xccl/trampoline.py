"""The attention rank's end of A2E/E2A, with a trampoline or without: `a2e_send`, then `e2a_recv`.

The rows and the pairs, sorted by expert rank, are staged once in the own managed area, whichever way they go. Directly,
every expert rank with pairs gets a cell and answers with one. Through the trampoline only expert rank
`trampoline_of(rank)` gets a cell, and answers when it has collected everything (bus/xccl/relay.py). `cost`
picks the way per exchange.

Results come back per pair, so that the caller adds them in top-k order: both ways and the twin
(`bus.xccl.reference.exchange`) yield the same bits. Source: paper section 3.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from bus.clock import NS_PER_MS, Deadline, now_ns
from bus.config import XcclConfig
from bus.errors import PeerDied, PeerStalled, SegmentCorrupt, Truncated
from bus.memory import _collectives
from bus.memory.layout import CELLS_OFFSET
from bus.memory.segment import Segment
from bus.xccl.cost import UNMEASURED, CostRule, Route
from bus.xccl.endpoint import Rank
from bus.xccl.event import Event
from bus.xccl.group import AddressTable
from bus.xccl.int8 import check_rows
from bus.xccl.relay import CellWriter
from bus.xccl.relay_layout import (
    FAILED,
    U32,
    BlockViews,
    CellKind,
    CellPlace,
    Float32Array,
    Int32Array,
    RelayShape,
    ResultBlock,
    Stage,
)


@dataclass(slots=True)
class RoutedHandle:
    """What `a2e_send` returns and exactly one `e2a_recv` needs.

    order: [num_pairs] int32, flat (row * num_slots + slot) places sorted by expert rank. starts: [num_expert_ranks + 1]
    int32, first pair of each rank. pending: expert rank that must answer -> (stamp of the cell it got, its
    incarnation).
    """

    event: Event
    event_id: int
    route: Route
    num_rows: int
    order: Int32Array
    starts: Int32Array
    pending: dict[int, tuple[int, int]] = field(default_factory=dict)
    arrived: dict[int, int] = field(default_factory=dict)


class RoutedAttention:
    """The attention rank's end. Used by one thread.

    Args:
        segment: own segment, made with `shape.attention_layout()`; stays the caller's.
        shape: the same at all ranks. rank: own attention rank.
        table: addresses of expert ranks; mapped as they are needed.
        config: how long to spin, how often to look at owner locks. rule: picks the way.
    """

    def __init__(
        self,
        segment: Segment,
        shape: RelayShape,
        rank: int,
        table: AddressTable,
        *,
        config: XcclConfig | None = None,
        rule: CostRule = UNMEASURED,
    ) -> None:
        settings = config or XcclConfig()
        self._segment, self._shape, self._rank, self._table = segment, shape, rank, table
        self._name = f"attention-{rank}"
        self._trampoline = shape.trampoline_of(rank)
        self._spin_ns = settings.spin_us * 1_000
        self._poll_ns = settings.poll_interval_ms * NS_PER_MS
        self._writer = CellWriter(segment.incarnation)
        self._views = BlockViews(shape)
        self._seen = np.zeros(segment.layout.num_cells, np.uint64)
        self._open: dict[int, RoutedHandle] = {}
        self._exchanges = dict.fromkeys(Route, 0)
        self._bytes_sent = 0
        self._dropped = 0
        self.rule = rule

    # ------------------------------------------------------------------ sending

    def a2e_send(
        self,
        x: Float32Array,
        slot_rank: Int32Array,
        slot_expert: Int32Array,
        event: Event,
        route: Route | None = None,
    ) -> RoutedHandle:
        """Publish every row to the expert ranks of its slots.

        Args:
            x: [num_rows, hidden] float32, C-contiguous; may be reused after return.
            slot_rank: [num_rows, num_slots] int32 expert rank of each slot, -1 = no expert for this slot.
            slot_expert: [num_rows, num_slots] int32 expert id of each slot.
            event: names the exchange; a retry uses a higher attempt. route: overrides the cost rule.

        Raises:
            Truncated: more rows than the block holds. ValueError: shapes, dtypes, ranks. PeerDied: a needed rank has no
            address. Nothing was announced to the others then, or it will be dropped.

        Blocks: no. Order: pairs keep (row, slot) order within a rank. Source: paper section 3.
        """
        event_id = event.pack()
        self._views.expire(self._table.version)
        self._check_input(x, slot_rank, slot_expert, event)
        order, starts = self._partition(slot_rank)
        targets = np.flatnonzero(np.diff(starts))
        if route is None:
            num_bytes = (x.shape[0] + order.shape[0]) * self._shape.row_bytes
            route = self.rule.choose(len(targets), num_bytes)
        self._stage(x, slot_expert, order, starts, event.microbatch)
        handle = RoutedHandle(event, event_id, route, x.shape[0], order, starts)
        self._open[event.microbatch] = handle
        if route is Route.DIRECT:
            for target in targets.tolist():
                self._tell_owner(handle, target)
        elif targets.size:
            self._tell_trampoline(handle)
        self._exchanges[route] += 1
        return handle

    def _check_input(
        self, x: Float32Array, slot_rank: Int32Array, slot_expert: Int32Array, event: Event
    ) -> None:
        shape = self._shape
        check_rows("x", x, np.dtype(np.float32))
        check_rows("slot_rank", slot_rank, np.dtype(np.int32))
        check_rows("slot_expert", slot_expert, np.dtype(np.int32))
        if x.shape[0] > shape.rows_max:
            raise Truncated(
                f"{x.shape[0]} rows exceed rows_max={shape.rows_max}",
                rank=self._name,
                peer="experts",
                event_id=event.pack(),
            )
        slots = (x.shape[0], shape.num_slots)
        if x.shape[1] != shape.hidden or slot_rank.shape != slots or slot_expert.shape != slots:
            raise ValueError(
                f"x{list(x.shape)}, slot_rank{list(slot_rank.shape)}, slot_expert{list(slot_expert.shape)} "
                f"must be [n, {shape.hidden}], [n, {shape.num_slots}], [n, {shape.num_slots}]"
            )
        if event.microbatch >= shape.num_microbatches:
            raise ValueError(f"event.microbatch: {event.microbatch} must be below {shape.num_microbatches}")

    def _partition(self, slot_rank: Int32Array) -> tuple[Int32Array, Int32Array]:
        order = np.empty(slot_rank.size, np.int32)
        starts = np.empty(self._shape.num_expert_ranks + 1, np.int32)
        num = _collectives.partition(slot_rank, self._shape.num_expert_ranks, order, starts)
        return order[:num], starts

    def _stage(
        self, x: Float32Array, slot_expert: Int32Array, order: Int32Array, starts: Int32Array, microbatch: int
    ) -> None:
        shape, num_pairs, num_rows = self._shape, order.shape[0], x.shape[0]
        block = self._views.source(self._segment, shape.attention_source(microbatch))
        if shape.int8:
            _collectives.quantise(block.x, block.x_scale, x, num_rows, shape.hidden)
        else:
            block.x[:num_rows] = x
        block.starts[:] = starts
        np.floor_divide(order, shape.num_slots, out=block.pair_row[:num_pairs])
        np.take(slot_expert.reshape(-1), order, out=block.pair_expert[:num_pairs])
        self._bytes_sent += num_rows * shape.row_bytes + 8 * num_pairs

    def _tell_owner(self, handle: RoutedHandle, owner: int) -> None:
        first, end = int(handle.starts[owner]), int(handle.starts[owner + 1])
        place = CellPlace(CellKind.DIRECT, self._rank, 0, handle.event.microbatch)
        self._tell(handle, owner, place, first << 32 | end - first)

    def _tell_trampoline(self, handle: RoutedHandle) -> None:
        seat = self._shape.seat_of(self._rank)
        place = CellPlace(CellKind.ENTRY, seat, seat, handle.event.microbatch)
        self._tell(handle, self._trampoline, place, handle.order.shape[0])

    def _tell(self, handle: RoutedHandle, expert: int, place: CellPlace, extent: int) -> None:
        rank = Rank("expert", expert)
        peer = self._table.segment(rank, asker=self._name, event_id=handle.event_id)
        cell = self._shape.expert_cell(place)
        word = self._writer.push(peer, cell, Stage.A2E, handle.event_id, extent, handle.num_rows)
        handle.pending[expert] = (word, peer.incarnation)

    # ------------------------------------------------------------------ receiving

    def e2a_recv(self, handle: RoutedHandle, out: Float32Array, deadline: Deadline) -> None:
        """Wait for all answers and put each pair's row at its (row, slot) place.

        Args:
            out: [num_rows, num_slots, hidden] float32, C-contiguous; places of slots with rank -1 are left as they are.
            deadline: a living rank that has not answered by then has stalled.

        Raises:
            PeerDied: an awaited rank's process has ended, or a trampoline says so of an owner. PeerStalled:
            the deadline passed. SegmentCorrupt: an answer contradicts the request. `out` may be partly filled;
            send again under a higher attempt. ValueError: `out`.
        Blocks: yes; spins at most `spin_us`, then sleeps in the kernel and looks at owner locks meanwhile.
        """
        check_at_ns = now_ns() + self._poll_ns
        while True:
            seen = self._segment.doorbell_seq()
            if self.try_recv(handle, out):
                return
            now = now_ns()
            if now >= min(check_at_ns, deadline.at_ns):
                self._check_peers(handle, deadline)
                check_at_ns = now + self._poll_ns
            patience = max(0, min(check_at_ns, deadline.at_ns) - now)
            self._segment.wait_doorbell(seen, self._spin_ns, patience)

    def try_recv(self, handle: RoutedHandle, out: Float32Array) -> bool:
        """Take what has arrived; True once everything has. Does not block. See `e2a_recv`."""
        shape = self._shape
        if out.dtype != np.float32 or not out.flags.c_contiguous:
            raise ValueError(f"out: {out.dtype} must be C-contiguous float32")
        if out.shape != (handle.num_rows, shape.num_slots, shape.hidden):
            wanted = [handle.num_rows, shape.num_slots, shape.hidden]
            raise ValueError(f"out: {list(out.shape)} must be {wanted}")
        self._scan()
        for expert in tuple(handle.arrived):
            self._pull(handle, expert, handle.arrived.pop(expert), out)
            del handle.pending[expert]
        if handle.pending:
            return False
        if self._open.get(handle.event.microbatch) is handle:
            del self._open[handle.event.microbatch]
        return True

    def _scan(self) -> None:
        shape = self._shape
        # SYNC: cell-whole - acquire: the answered rows are visible.
        news = _collectives.scan_cells(self._segment.buf, CELLS_OFFSET, len(self._seen), self._seen)
        for index, _, event_id, w2, echo in news:
            group, microbatch = divmod(index, shape.num_microbatches)
            direct = group < shape.num_expert_ranks
            expert = group if direct else self._trampoline
            handle = self._open.get(microbatch)
            if (
                handle is None
                or event_id != handle.event_id
                or direct != (handle.route is Route.DIRECT)
                or handle.pending.get(expert, (0, 0))[0] != echo
            ):
                self._dropped += 1
                continue
            handle.arrived[expert] = w2

    def _pull(self, handle: RoutedHandle, expert: int, w2: int, out: Float32Array) -> None:
        shape, microbatch = self._shape, handle.event.microbatch
        first, end = 0, handle.order.shape[0]
        if handle.route is Route.DIRECT:
            first, end = int(handle.starts[expert]), int(handle.starts[expert + 1])
            at = shape.expert_result(self._rank, microbatch)
        else:
            at = shape.seat_result(shape.seat_of(self._rank), microbatch)
        if w2 & FAILED:
            raise PeerDied(
                f"process has ended, says expert-{expert}",
                rank=self._name,
                peer=f"expert-{w2 & U32}",
                event_id=handle.event_id,
            )
        if w2 != end - first:
            raise SegmentCorrupt(
                f"answer has {w2} rows, {end - first} were asked for",
                rank=self._name,
                peer=f"expert-{expert}",
                event_id=handle.event_id,
            )
        rank = Rank("expert", expert)
        peer = self._table.segment(rank, asker=self._name, event_id=handle.event_id)
        if peer.incarnation != handle.pending[expert][1]:
            raise PeerDied("process was replaced", rank=self._name, peer=str(rank), event_id=handle.event_id)
        self._scatter(self._views.result(peer, at), handle.order[first:end], out)

    def _scatter(self, block: ResultBlock, order: Int32Array, out: Float32Array) -> None:
        hidden, count = self._shape.hidden, order.shape[0]
        y = block.y
        if y.dtype == np.int8:
            rows = np.empty((count, hidden), np.float32)
            _collectives.dequantise(rows, y, block.y_scale, count, hidden)
            _collectives.scatter_rows(out, order, rows, 4 * hidden)
        else:
            _collectives.scatter_rows(out, order, y, 4 * hidden)

    def _check_peers(self, handle: RoutedHandle, deadline: Deadline) -> None:
        for expert, (_, incarnation) in sorted(handle.pending.items()):
            rank = Rank("expert", expert)
            if self._table.incarnation(rank) != incarnation or not self._table.alive(rank):
                raise PeerDied("process has ended", rank=self._name, peer=str(rank), event_id=handle.event_id)
        if deadline.expired():
            silent = ",".join(f"expert-{r}" for r in sorted(handle.pending))
            raise PeerStalled(
                "no answer by the deadline", rank=self._name, peer=silent, event_id=handle.event_id
            )

    def stats(self) -> dict[str, int]:
        """Return metadata writes at peers, exchanges by way, bytes staged, and dropped answers."""
        ways = {f"{route.value}_exchanges": n for route, n in self._exchanges.items()}
        writes = self._writer.cell_writes[Stage.A2E]
        return {"a2e_cell_writes": writes, **ways, "bytes_sent": self._bytes_sent, "dropped": self._dropped}
