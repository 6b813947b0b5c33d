"""A2E and E2A: activations from attention ranks to expert ranks and back, direct (full fan-out) form.

Attention and experts are different processes and different in number. As in the paper's dispatch (v6 section 3.2),
data are *pulled*: a sender writes into its **own** managed area, partitioned by destination, and pushes only a
32-byte cell into each receiver's metadata area; the receiver polls its own cells and reads the rows in place.

    attention rank d                                   expert rank r
    managed area, per microbatch                       managed area, per (d, microbatch)
    +---------------------------+                      +--------------------------+
    | x  [rows_max, hidden] f32 | <---- reads rows --- |                          |
    | pair_row    [pairs] i32   | <---- reads pairs -- | y  [pairs_max, hidden]   |
    | pair_expert [pairs] i32   |                      +--------------------------+
    +---------------------------+                                 ^
              ^ cell (event, num_pairs) + doorbell <--- E2A ---   | pulls y
              | --- A2E ---> cell (event, first_pair, num_pairs, num_rows) + doorbell

A *pair* is one (row, expert) product to be made. A row stands in shared memory once, however many ranks and experts
want it; a rank without pairs hears nothing and is not awaited, so there is no barrier. Results come back per pair,
not pre-reduced: only so can the attention rank add them in the router's top-k order, which makes the result
independent of where the experts live (float addition is not associative).

Who may overwrite what: an attention rank reuses its block only after every awaited rank answered, or under a new
attempt; an expert rank reuses a y block when a newer event arrives from the same attention rank, which that rank sends
only after it pulled the old answer or gave it up. A late answer to an abandoned attempt carries the old event id and
is never read. Twin: `bus.xccl.reference.exchange`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from bus.clock import NS_PER_MS, Deadline
from bus.errors import PeerDied, PeerStalled, SegmentCorrupt, Truncated
from bus.memory import _collectives, _native
from bus.memory.segment import Segment
from bus.xccl.event import Event

Float32Array = npt.NDArray[np.float32]
Int32Array = npt.NDArray[np.int32]

_ALIGN = 64
_U32 = 0xFFFFFFFF


def _aligned(num_bytes: int) -> int:
    return (num_bytes + _ALIGN - 1) // _ALIGN * _ALIGN


@dataclass(frozen=True, slots=True, kw_only=True)
class A2EShape:
    """Sizes that both sides derive their offsets from; all ranks of a pod hold the same shape."""

    num_attention_ranks: int
    num_expert_ranks: int
    rows_max: int  # largest number of rows of one microbatch
    num_slots: int  # expert slots per row: top-k, plus one for a shared expert
    hidden: int
    num_microbatches: int = 1

    @property
    def pairs_max(self) -> int:
        """Largest number of (row, expert) pairs of one microbatch."""
        return self.rows_max * self.num_slots

    @property
    def x_bytes(self) -> int:
        """Bytes of the activations of one microbatch."""
        return _aligned(self.rows_max * self.hidden * 4)

    @property
    def pair_list_bytes(self) -> int:
        """Bytes of one int32 list with an entry per pair."""
        return _aligned(self.pairs_max * 4)

    @property
    def attention_block_bytes(self) -> int:
        """Managed bytes of an attention rank per microbatch."""
        return self.x_bytes + 2 * self.pair_list_bytes

    @property
    def expert_block_bytes(self) -> int:
        """Managed bytes of an expert rank per attention rank and microbatch."""
        return _aligned(self.pairs_max * self.hidden * 4)

    @property
    def attention_managed_bytes(self) -> int:
        """Managed area of an attention rank."""
        return self.num_microbatches * self.attention_block_bytes

    @property
    def expert_managed_bytes(self) -> int:
        """Managed area of an expert rank."""
        return self.num_attention_ranks * self.num_microbatches * self.expert_block_bytes

    @property
    def attention_cells(self) -> int:
        """Metadata cells that an attention rank needs: one per expert rank and microbatch."""
        return self.num_expert_ranks * self.num_microbatches

    @property
    def expert_cells(self) -> int:
        """Metadata cells that an expert rank needs: one per attention rank and microbatch."""
        return self.num_attention_ranks * self.num_microbatches

    def cell_index(self, peer: int, microbatch: int) -> int:
        """Index of the cell that `peer` writes for `microbatch`, in the receiver's metadata area."""
        return peer * self.num_microbatches + microbatch


@dataclass(slots=True)
class A2EHandle:
    """What `a2e_send` returns and exactly one `e2a_recv` needs.

    `order` [num_pairs] int32 holds flat (row * num_slots + slot) positions grouped by expert rank, ascending within
    a rank; rank r's pairs are `order[start[r] : start[r] + count[r]]`.
    """

    event: Event
    event_id: int
    order: Int32Array
    start: dict[int, int]
    count: dict[int, int]
    pending: set[int] = field(default_factory=set)


@dataclass(slots=True)
class Arrival:
    """Work that reached an expert rank: fill `y`, then `commit`.

    x: [num_rows, hidden] float32, read in place from the sender's segment; valid until `commit`.
    pair_row, pair_expert: [num_pairs] int32, own copies. y: [num_pairs, hidden] float32, own managed area.
    """

    peer: int
    event: Event
    event_id: int
    x: Float32Array
    pair_row: Int32Array
    pair_expert: Int32Array
    y: Float32Array


class AttentionSide:
    """The attention rank's end: `a2e_send`, then `e2a_recv`. Used by one thread."""

    def __init__(
        self, segment: Segment, shape: A2EShape, dp_rank: int, *, spin_us: int, poll_interval_ms: int
    ):
        """Use the managed area of `segment`, which must have `shape.attention_managed_bytes` and cells."""
        self._segment = segment
        self._shape = shape
        self._dp_rank = dp_rank
        self._spin_ns = spin_us * 1_000
        self._poll_ns = poll_interval_ms * NS_PER_MS
        self._peers: dict[int, Segment] = {}
        self._name = f"attention-{dp_rank}"
        self._blocks = [self._map_block(m) for m in range(shape.num_microbatches)]
        self.num_bytes_sent = 0

    def _map_block(self, microbatch: int) -> tuple[Float32Array, Int32Array, Int32Array]:
        shape, base = self._shape, microbatch * self._shape.attention_block_bytes
        base += self._segment.layout.managed_offset
        x = self._segment.array(base, (shape.rows_max, shape.hidden), np.float32)
        rows = self._segment.array(base + shape.x_bytes, (shape.pairs_max,), np.int32)
        experts_offset = base + shape.x_bytes + shape.pair_list_bytes
        experts = self._segment.array(experts_offset, (shape.pairs_max,), np.int32)
        return x, rows, experts

    def connect(self, expert_rank: int, segment: Segment) -> None:
        """Use `segment` (an attached peer) as expert rank `expert_rank` from now on, instead of an older one."""
        old = self._peers.get(expert_rank)
        self._peers[expert_rank] = segment
        if old is not None:
            old.close()

    def incarnation_of(self, expert_rank: int) -> int:
        """Return the incarnation connected as `expert_rank`, 0 when none is."""
        peer = self._peers.get(expert_rank)
        return peer.incarnation if peer is not None else 0

    def alive(self, expert_rank: int) -> bool:
        """Tell whether the process connected as `expert_rank` lives (one system call)."""
        peer = self._peers.get(expert_rank)
        return peer is not None and peer.owner_alive()

    def a2e_send(
        self, x: Float32Array, slot_rank: Int32Array, slot_expert: Int32Array, event: Event
    ) -> A2EHandle:
        """Publish every row to the expert ranks of its slots.

        Args:
            x: [num_rows, hidden] float32; may be reused after return.
            slot_rank: [num_rows, num_slots] int32 expert rank of each slot, -1 = no expert for this slot.
            slot_expert: [num_rows, num_slots] int32 expert id of each slot.
            event: names the exchange; a retry uses a higher attempt.

        Raises:
            Truncated: more rows than the block holds. ValueError: a slot's rank is outside -1..num_expert_ranks - 1.
            PeerDied: a needed rank is not connected. Nothing was sent.
        Blocks: no. Order: pairs keep (row, slot) order within a rank. Source: paper section 3.
        """
        shape, event_id, num_rows = self._shape, event.pack(), x.shape[0]
        if num_rows > shape.rows_max:
            raise Truncated(
                f"{num_rows} rows exceed rows_max={shape.rows_max}",
                rank=self._name,
                peer="experts",
                event_id=event_id,
            )
        handle = self._plan(slot_rank, event, event_id)
        block_x, pair_row, pair_expert = self._blocks[event.microbatch]
        num_pairs = handle.order.shape[0]
        np.copyto(block_x[:num_rows], x)
        pair_row[:num_pairs] = handle.order // shape.num_slots
        pair_expert[:num_pairs] = slot_expert.reshape(-1)[handle.order]
        for rank in handle.pending:
            self._notify(rank, handle, num_rows)
        self.num_bytes_sent += x.nbytes + 8 * num_pairs
        return handle

    def _plan(self, slot_rank: Int32Array, event: Event, event_id: int) -> A2EHandle:
        num_ranks = self._shape.num_expert_ranks
        order, starts = np.empty(slot_rank.size, np.int32), np.empty(num_ranks + 1, np.int32)
        num_pairs = _collectives.partition(
            np.ascontiguousarray(slot_rank, np.int32), num_ranks, order, starts
        )
        bounds = starts.tolist()
        used = [r for r in range(num_ranks) if bounds[r + 1] > bounds[r]]
        for rank in used:
            if rank not in self._peers:
                raise PeerDied("not connected", rank=self._name, peer=f"expert-{rank}", event_id=event_id)
        return A2EHandle(
            event=event,
            event_id=event_id,
            order=order[:num_pairs],
            start={r: bounds[r] for r in used},
            count={r: bounds[r + 1] - bounds[r] for r in used},
            pending=set(used),
        )

    def _notify(self, rank: int, handle: A2EHandle, num_rows: int) -> None:
        peer = self._peers[rank]
        offset = peer.cell_offset(self._shape.cell_index(self._dp_rank, handle.event.microbatch))
        extent = handle.start[rank] << 32 | handle.count[rank]
        # SYNC: a2e-cell - rows and pairs written above become visible to whoever reads this event id.
        _native.write_cell(peer.buf, offset, handle.event_id, extent, num_rows, self._segment.incarnation)
        peer.ring_doorbell()

    def e2a_recv(self, handle: A2EHandle, out: Float32Array, deadline: Deadline) -> None:
        """Wait for all answers and put each pair's row at its (row, slot) place.

        Args:
            out: [num_rows, num_slots, hidden] float32; places of slots with rank -1 are left as they are.
            deadline: a living rank that has not answered by then has stalled.

        Raises:
            PeerDied: an awaited rank's process has ended. PeerStalled: the deadline passed. In both cases `out` may
            be partly filled and the exchange may be sent again under a higher attempt.
        Blocks: yes; spins at most `spin_us`, then sleeps in the kernel and looks at owner locks meanwhile.
        """
        flat_out = out.reshape(-1, self._shape.hidden)
        seen = self._segment.doorbell_seq()
        while handle.pending:
            if self._pull_ready(handle, flat_out):
                continue
            rung = self._segment.wait_doorbell(seen, self._spin_ns, self._poll_ns)
            if rung == seen:
                self._check_peers(handle, deadline)
            seen = rung

    def _pull_ready(self, handle: A2EHandle, flat_out: Float32Array) -> bool:
        progressed = False
        for rank in tuple(handle.pending):
            cell_index = self._shape.cell_index(rank, handle.event.microbatch)
            # SYNC: e2a-cell - acquire: rows of y written before the cell are visible.
            cell = _native.read_cell(self._segment.buf, self._segment.cell_offset(cell_index))
            if cell is None or cell[0] != handle.event_id or cell[3] != self._peers[rank].incarnation:
                continue
            self._pull(rank, handle, cell[1], flat_out)
            handle.pending.discard(rank)
            progressed = True
        return progressed

    def _pull(self, rank: int, handle: A2EHandle, num_pairs: int, flat_out: Float32Array) -> None:
        shape, peer, count = self._shape, self._peers[rank], handle.count[rank]
        if num_pairs != count:
            raise SegmentCorrupt(
                f"answer has {num_pairs} rows, {count} were asked for",
                rank=self._name,
                peer=f"expert-{rank}",
                event_id=handle.event_id,
            )
        block = self._dp_rank * shape.num_microbatches + handle.event.microbatch
        offset = peer.layout.managed_offset + block * shape.expert_block_bytes
        y = peer.array(offset, (count, shape.hidden), np.float32)
        start = handle.start[rank]
        _collectives.scatter_rows(flat_out, handle.order[start : start + count], y, 4 * shape.hidden)

    def _check_peers(self, handle: A2EHandle, deadline: Deadline) -> None:
        for rank in sorted(handle.pending):
            if not self._peers[rank].owner_alive():
                raise PeerDied(
                    "process has ended", rank=self._name, peer=f"expert-{rank}", event_id=handle.event_id
                )
        if deadline.expired():
            silent = ",".join(f"expert-{r}" for r in sorted(handle.pending))
            raise PeerStalled(
                "no answer by the deadline", rank=self._name, peer=silent, event_id=handle.event_id
            )

    def close(self) -> None:
        """Detach from all peers. The own segment stays the caller's."""
        self._blocks = []
        for peer in self._peers.values():
            peer.close()
        self._peers.clear()


class ExpertSide:
    """The expert rank's end: `wait`, `poll`, fill, `commit`. Driven by what arrives. Used by one thread."""

    def __init__(self, segment: Segment, shape: A2EShape, ep_rank: int, segment_name: str):
        """`segment_name` is a format string with `{index}` and `{incarnation}` that names attention segments."""
        self._segment = segment
        self._shape = shape
        self._ep_rank = ep_rank
        self._segment_name = segment_name
        self._name = f"expert-{ep_rank}"
        self._peers: dict[int, Segment] = {}
        self._handled: dict[int, tuple[int, int]] = {}  # cell index -> (incarnation, event id) handled last
        self.num_dropped = 0

    def poll(self, on_corrupt: Callable[[SegmentCorrupt], None]) -> list[Arrival]:
        """Return what arrived since the last poll, in order of attention rank; [] when nothing did.

        A message of an ended or unknown attention incarnation is dropped and counted. One whose counts or indices
        are outside the agreed shape goes to `on_corrupt` and is dropped too; its sender will time out.
        """
        arrivals = []
        shape = self._shape
        for peer in range(shape.num_attention_ranks):
            for microbatch in range(shape.num_microbatches):
                index = shape.cell_index(peer, microbatch)
                # SYNC: a2e-cell - acquire: the sender's rows and pairs are visible.
                cell = _native.read_cell(self._segment.buf, self._segment.cell_offset(index))
                if cell is None or self._handled.get(index) == (cell[3], cell[0]):
                    continue
                self._handled[index] = (cell[3], cell[0])
                try:
                    arrival = self._open(peer, cell)
                except SegmentCorrupt as error:
                    on_corrupt(error)
                    continue
                if arrival is not None:
                    arrivals.append(arrival)
        return arrivals

    def _open(self, peer: int, cell: tuple[int, int, int, int]) -> Arrival | None:
        event_id, extent, num_rows, incarnation = cell
        sender = self._attach(peer, incarnation)
        if sender is None:
            self.num_dropped += 1
            return None
        shape, event = self._shape, Event.unpack(event_id)
        first, count = extent >> 32, extent & _U32
        if (
            num_rows > shape.rows_max
            or first + count > shape.pairs_max
            or event.microbatch >= shape.num_microbatches
        ):
            raise self._corrupt(f"num_rows={num_rows} first_pair={first} num_pairs={count}", peer, event_id)
        base = sender.layout.managed_offset + event.microbatch * shape.attention_block_bytes
        x = sender.array(base, (num_rows, shape.hidden), np.float32)
        lists = base + shape.x_bytes + 4 * first
        # Own copies: the sender may start another attempt while this one is being worked on.
        pair_row = sender.array(lists, (count,), np.int32).copy()
        pair_expert = sender.array(lists + shape.pair_list_bytes, (count,), np.int32).copy()
        if count and (int(pair_row.min()) < 0 or int(pair_row.max()) >= num_rows):
            raise self._corrupt(f"pair_row outside 0..{num_rows - 1}", peer, event_id)
        block = peer * shape.num_microbatches + event.microbatch
        offset = self._segment.layout.managed_offset + block * shape.expert_block_bytes
        y = self._segment.array(offset, (count, shape.hidden), np.float32)
        return Arrival(peer, event, event_id, x, pair_row, pair_expert, y)

    def _corrupt(self, what: str, peer: int, event_id: int) -> SegmentCorrupt:
        return SegmentCorrupt(what, rank=self._name, peer=f"attention-{peer}", event_id=event_id)

    def _attach(self, peer: int, incarnation: int) -> Segment | None:
        known = self._peers.get(peer)
        if known is not None and known.incarnation == incarnation:
            return known
        if known is not None and known.incarnation > incarnation:
            return None
        try:
            segment = Segment.attach(self._segment_name.format(index=peer, incarnation=incarnation))
        except FileNotFoundError:
            return None
        if known is not None:
            known.close()
        self._peers[peer] = segment
        return segment

    def commit(self, arrival: Arrival) -> None:
        """Publish `arrival.y` to the sender. Does not block."""
        sender = self._peers.get(arrival.peer)
        if sender is None:
            return
        index = self._shape.cell_index(self._ep_rank, arrival.event.microbatch)
        count = arrival.pair_row.shape[0]
        # SYNC: e2a-cell - release: y is visible to whoever reads this event id.
        _native.write_cell(
            sender.buf, sender.cell_offset(index), arrival.event_id, count, 0, self._segment.incarnation
        )
        sender.ring_doorbell()

    def wait(self, seen: int, *, spin_ns: int, timeout_ns: int) -> int:
        """Sleep until someone rings, at most `timeout_ns`; return the doorbell's count. Releases the GIL."""
        return self._segment.wait_doorbell(seen, spin_ns, timeout_ns)

    def doorbell(self) -> int:
        """Return the doorbell's count now; read it *before* `poll`, else a ring in between is slept over."""
        return self._segment.doorbell_seq()

    def close(self) -> None:
        """Detach from all peers. The own segment stays the caller's."""
        for peer in self._peers.values():
            peer.close()
        self._peers.clear()
