"""The attention rank's end of A2E/E2A, with a trampoline or without: `a2e_send`, then `e2a_recv` or `e2a_combine`.

The rows and the pairs, sorted by expert rank, are staged once in the own managed area, whichever way they go. Directly,
every expert rank with pairs gets a cell and answers with one. Through the trampoline only expert rank
`trampoline_of(rank)` gets a cell, and answers when it has collected everything (bus/xccl/relay.py). `cost`
picks the way per exchange.

Results lie in the answering ranks' segments per pair. `e2a_recv` copies them to their (row, slot) places, `e2a_combine`
adds them from where they lie, in slot order; either way both routes and the twin (`bus.xccl.reference.exchange`) yield
the same bits. Hot path: bus/memory/_relay_attention*.c. Source: paper section 4.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bus.clock import NS_PER_MS, Deadline, now_ns
from bus.config import XcclConfig
from bus.errors import PeerDied, PeerStalled, SegmentCorrupt, Truncated
from bus.memory import _relay
from bus.memory.segment import Segment
from bus.memory.wait import next_look_ns
from bus.xccl.cost import CostRule, Route
from bus.xccl.endpoint import Rank
from bus.xccl.event import Event
from bus.xccl.group import AddressTable
from bus.xccl.int8 import check_rows
from bus.xccl.relay_layout import U32, Float32Array, Int32Array, RelayShape, burst_ns, segment_words

_TRAMPOLINE = Route.TRAMPOLINE
_DEAD_OWNER, _WRONG_COUNT = 2, 3


@dataclass(slots=True)
class RoutedHandle:
    """What `a2e_send` returns and one `e2a_recv` or `e2a_combine` uses up; void after the microbatch's next send."""

    event: Event
    route: Route
    num_rows: int
    token: int


class RoutedAttention:
    """The attention rank's end. Used by one thread.

    Args:
        segment: own segment, made with `shape.attention_layout()` or one with more app area; stays the caller's.
        shape: the same at all ranks. rank: own attention rank.
        table: addresses of expert ranks; mapped as they are needed.
        config: how long to spin, how often to look at owner locks, and the rule that picks the way.
        rule: instead of the one in `config`.
    """

    def __init__(
        self,
        segment: Segment,
        shape: RelayShape,
        rank: int,
        table: AddressTable,
        *,
        config: XcclConfig | None = None,
        rule: CostRule | None = None,
    ) -> None:
        settings = config or XcclConfig()
        self._shape, self._table = shape, table
        self._name = f"attention-{rank}"
        self._poll_ns = settings.poll_interval_ms * NS_PER_MS
        self._native = _relay.AttentionEnd(
            shape.geometry(rank), segment_words(segment), burst_ns(settings.spin_us, shape.num_expert_ranks)
        )
        self._connected: dict[int, int] = {}  # expert rank -> incarnation
        self._version = -1
        self.rule = CostRule.parse(settings.route_costs_ns) if rule is None else rule

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
            event: names the exchange; a retry uses a higher attempt. The microbatch's exchange before it is given up
            if it has not ended. route: overrides the cost rule.

        Raises:
            Truncated: more rows than the block holds. ValueError: shapes, dtypes, ranks. PeerDied: a needed rank has no
            address. SegmentCorrupt: its segment is too small. Nothing was sent then.

        Blocks: no. Order: pairs keep (row, slot) order within a rank. Source: paper section 4.
        """
        if self._table.version != self._version:
            self._drop_replaced()
        try:
            if route is None:
                route = self.rule.only or self._choose(slot_rank)
            code = 1 if route is _TRAMPOLINE else 0
            token = self._native.send(x, slot_rank, slot_expert, event, code)
            while token < 0:
                self._connect(-1 - token, event)
                token = self._native.send(x, slot_rank, slot_expert, event, code)
        except ValueError:
            self._check_input(x, slot_rank, slot_expert, event)
            raise
        return RoutedHandle(event, route, x.shape[0], token)

    def _choose(self, slot_rank: Int32Array) -> Route:
        num_targets, num_pairs = self._native.count(slot_rank)
        return self.rule.choose(num_targets, (slot_rank.shape[0] + num_pairs) * self._shape.row_bytes)

    def _connect(self, expert: int, event: Event) -> None:
        rank, event_id = Rank("expert", expert), event.pack()
        segment = self._table.segment(rank, asker=self._name, event_id=event_id)
        try:
            self._native.set_peer(expert, *segment_words(segment))
        except ValueError as error:
            raise SegmentCorrupt(str(error), rank=self._name, peer=str(rank), event_id=event_id) from error
        self._connected[expert] = segment.incarnation

    def _drop_replaced(self) -> None:
        for expert, incarnation in tuple(self._connected.items()):
            if self._table.incarnation(Rank("expert", expert)) != incarnation:
                self._native.drop_peer(expert)
                del self._connected[expert]
        self._version = self._table.version

    def _check_input(
        self, x: Float32Array, slot_rank: Int32Array, slot_expert: Int32Array, event: Event
    ) -> None:
        shape = self._shape
        event_id = event.pack()
        check_rows("x", x, np.dtype(np.float32))
        check_rows("slot_rank", slot_rank, np.dtype(np.int32))
        check_rows("slot_expert", slot_expert, np.dtype(np.int32))
        if x.shape[0] > shape.rows_max:
            text = f"{x.shape[0]} rows exceed rows_max={shape.rows_max}"
            raise Truncated(text, rank=self._name, peer="experts", event_id=event_id)
        slots = (x.shape[0], shape.num_slots)
        if x.shape[1] != shape.hidden or slot_rank.shape != slots or slot_expert.shape != slots:
            raise ValueError(
                f"x{list(x.shape)}, slot_rank{list(slot_rank.shape)}, slot_expert{list(slot_expert.shape)} "
                f"must be [n, {shape.hidden}], [n, {shape.num_slots}], [n, {shape.num_slots}]"
            )
        if event.microbatch >= shape.num_microbatches:
            raise ValueError(f"event.microbatch: {event.microbatch} must be below {shape.num_microbatches}")

    # ------------------------------------------------------------------ receiving

    def e2a_recv(self, handle: RoutedHandle, out: Float32Array, deadline: Deadline) -> None:
        """Wait for all answers and put each pair's row at its (row, slot) place.

        Args:
            out: [num_rows, num_slots, hidden] float32, C-contiguous; places of slots with rank -1 are left as they are.
            deadline: a living rank that has not answered by then has stalled.

        Raises:
            PeerDied: an awaited rank's process has ended, or a trampoline says so of an owner. PeerStalled:
            the deadline passed. SegmentCorrupt: an answer contradicts the request. `out` may be partly filled;
            send again under a higher attempt. ValueError: `out`, or the handle is void.
        Blocks: yes; polls for as long as such waits take, at most 4 ms, then sleeps in the kernel and looks at owner
        locks meanwhile.
        """
        self._receive(handle, None, out, deadline)

    def e2a_combine(
        self, handle: RoutedHandle, weights: Float32Array, out: Float32Array, deadline: Deadline
    ) -> None:
        """Wait for all answers and add each row's slots, weighted, without copying them first.

        Args:
            weights: [num_rows, num_slots] float32; those of slots with rank -1 are not read.
            out: [num_rows, hidden] float32, C-contiguous: 0 + weight * y for slots 0, 1, ... in this order, in float32.
            deadline: as in `e2a_recv`, like errors and blocking.
        """
        self._receive(handle, weights, out, deadline)

    def _receive(
        self, handle: RoutedHandle, weights: Float32Array | None, out: Float32Array, deadline: Deadline
    ) -> None:
        patience = self._poll_ns
        while True:
            left = max(0, deadline.at_ns - now_ns())
            if self._take(handle, weights, out, min(patience, left)):
                return
            patience = next_look_ns(patience, self._poll_ns)
            if (dead := self._dead(handle)) is not None and self._take(handle, weights, out, 0):
                return  # it had answered before it died
            self._check_peers(handle, dead, deadline)

    def try_recv(self, handle: RoutedHandle, out: Float32Array) -> bool:
        """Take what has arrived; True once everything has. Does not block. See `e2a_recv`."""
        return self._take(handle, None, out, 0)

    def _take(
        self, handle: RoutedHandle, weights: Float32Array | None, out: Float32Array, patience_ns: int
    ) -> bool:
        found = self._native.recv(handle.token, handle.event.microbatch, weights, out, patience_ns)
        if found is True or found is False:
            return found
        raise self._failure(handle, *found)

    def _failure(self, handle: RoutedHandle, code: int, expert: int, value: int) -> PeerDied | SegmentCorrupt:
        event_id, peer = handle.event.pack(), f"expert-{expert}"
        if code == _DEAD_OWNER:
            text, peer = f"process has ended, says {peer}", f"expert-{value & U32}"
            return PeerDied(text, rank=self._name, peer=peer, event_id=event_id)
        if code == _WRONG_COUNT:
            text = f"answer has {value} rows, another number was asked for"
            return SegmentCorrupt(text, rank=self._name, peer=peer, event_id=event_id)
        return PeerDied("process was replaced", rank=self._name, peer=peer, event_id=event_id)

    def _dead(self, handle: RoutedHandle) -> int | None:
        """Return an awaited expert rank whose process has ended, if there is one."""
        for expert, incarnation in sorted(self._native.pending(handle.token, handle.event.microbatch)):
            rank = Rank("expert", expert)
            if self._table.incarnation(rank) != incarnation or not self._table.alive(rank):
                return expert
        return None

    def _check_peers(self, handle: RoutedHandle, dead: int | None, deadline: Deadline) -> None:
        """Raise if `dead` has not answered, even after its lock was found free, or if the deadline has passed."""
        event_id = handle.event.pack()
        pending = sorted(rank for rank, _ in self._native.pending(handle.token, handle.event.microbatch))
        if dead in pending:
            raise PeerDied("process has ended", rank=self._name, peer=f"expert-{dead}", event_id=event_id)
        if deadline.expired():
            silent = ",".join(f"expert-{r}" for r in pending)
            raise PeerStalled("no answer by the deadline", rank=self._name, peer=silent, event_id=event_id)

    # ------------------------------------------------------------------ the rest

    def stats(self) -> dict[str, int]:
        """Return metadata writes at peers, exchanges by way, bytes staged, dropped answers, sleeps, moves to a core."""
        return self._native.counters()

    def close(self) -> None:
        """Let go of all mappings. Segment and table stay the caller's."""
        self._native.close()
        self._connected.clear()
