"""The expert rank's end of A2E/E2A with trampolines: its own experts' work, and the forwarding for its guests.

Everything happens in `poll` and `commit`, which never block: a trampoline forwards when it is next polled, and collects
when the owners have answered, however they are ordered; so no ring of ranks that wait for one another can arise.

    attention i --A2E--> trampoline --A2E_FORWARD--> owners --E2A_FORWARD--> trampoline --E2A--> attention i
       1 cell            copies the source block,     pull their share        copies each owner's     pulls all results
                         1 cell per owner             from the trampoline     result when it comes    from one place

Deaths: an attention rank waits for its trampoline only, and sees its death by its owner lock. A trampoline looks at the
owner locks of the owners it waits for, and reports a death in its E2A cell. A trampoline keeps no state that
outlives an exchange, so its next incarnation just serves the next attempt. Source: paper section 3. Twin:
`bus.xccl.reference.exchange`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from bus.clock import NS_PER_MS, now_ns
from bus.config import XcclConfig
from bus.errors import PeerDied, SegmentCorrupt
from bus.memory import _collectives, _native
from bus.memory.layout import CELLS_OFFSET
from bus.memory.segment import Segment
from bus.xccl.a2e import Arrival
from bus.xccl.endpoint import COUNTER_BITS, Rank, stamp
from bus.xccl.event import Event
from bus.xccl.group import AddressTable
from bus.xccl.relay_layout import (
    FAILED,
    U32,
    BlockViews,
    CellKind,
    CellPlace,
    Float32Array,
    Int32Array,
    RelayShape,
    Rows,
    Stage,
)

_INCARNATION_MASK = (1 << 64 - COUNTER_BITS) - 1


class CellWriter:
    """Writes cells at peers under ever new stamps, and counts them by stage."""

    def __init__(self, incarnation: int) -> None:
        self._incarnation = incarnation
        self._writes = 0
        self.cell_writes = dict.fromkeys(Stage, 0)

    def push(self, peer: Segment, cell: int, stage: Stage, event_id: int, w2: int, w3: int) -> int:
        """Write cell number `cell` of `peer`, ring, and return the stamp."""
        self._writes += 1
        word = stamp(self._incarnation, self._writes)
        # SYNC: cell-whole - what was written to the own blocks becomes visible to whoever reads this stamp.
        _native.write_cell(peer.buf, peer.cell_offset(cell), word, event_id, w2, w3)
        peer.ring_doorbell()
        self.cell_writes[stage] += 1
        return word


def incarnation_order(word: int, known: int) -> int:
    """Return 0 when the stamp `word` is of incarnation `known`, 1 when of a later one, -1 when of an earlier one."""
    ahead = ((word >> COUNTER_BITS) - known) & _INCARNATION_MASK
    if ahead == 0:
        return 0
    return 1 if known == 0 or ahead <= _INCARNATION_MASK // 2 else -1


@dataclass(slots=True)
class RoutedArrival(Arrival):
    """Work that reached an expert rank, and whom to answer; see `Arrival`.

    place: the cell that it came by. echo: that cell's stamp. incarnation: of who wrote it.
    """

    place: CellPlace
    echo: int
    incarnation: int


@dataclass(slots=True)
class _Relay:
    """An exchange of a guest that is under way."""

    guest: Rank
    event_id: int
    echo: int
    starts: Int32Array
    pending: dict[int, tuple[int, int]]  # owner -> (stamp of the forwarded cell, owner's incarnation)


class RoutedExpert:
    """The expert rank's end. Driven by what arrives. Used by one thread.

    Args:
        segment: own segment, made with `shape.expert_layout()`; stays the caller's.
        shape: the same at all ranks. rank: own expert rank.
        table: addresses of attention and expert ranks; mapped as they are needed.
        config: how often to look at the owner locks of awaited peers.
    """

    def __init__(
        self,
        segment: Segment,
        shape: RelayShape,
        rank: int,
        table: AddressTable,
        *,
        config: XcclConfig | None = None,
    ) -> None:
        self._segment, self._shape, self._rank, self._table = segment, shape, rank, table
        self._name = f"expert-{rank}"
        self._writer = CellWriter(segment.incarnation)
        self._views = BlockViews(shape)
        self._seen = np.zeros(segment.layout.num_cells, np.uint64)
        self._relays: dict[tuple[int, int], _Relay] = {}
        self._poll_ns = (config or XcclConfig()).poll_interval_ms * NS_PER_MS
        self._check_at_ns = 0
        self.num_dropped = 0

    # ------------------------------------------------------------------ arrivals

    def poll(self, on_corrupt: Callable[[SegmentCorrupt], None]) -> list[RoutedArrival]:
        """Return the work for this rank's experts that arrived since the last poll; forward what is for others.

        Words outside the agreed shape go to `on_corrupt` and are dropped; their sender will time out. Does not block.
        """
        arrivals = []
        self._views.expire(self._table.version)
        for index, word, event_id, w2, w3 in self._scan():
            place = self._shape.locate(index)
            try:
                self._check_guest(place, event_id)
                if not self._is_current(index, word, self._writer_of(place)):
                    continue
                if place.kind is CellKind.ENTRY:
                    self._enter(place, word, event_id, w2, w3)
                elif place.kind is CellKind.RETURN:
                    self._collect(place, event_id, w2, w3)
                else:
                    arrivals.append(self._open(place, word, event_id, w2, w3))
            except SegmentCorrupt as error:
                on_corrupt(error)
            except PeerDied:
                self.num_dropped += 1
        self._check_owners()
        return arrivals

    def _scan(self) -> list[tuple[int, int, int, int, int]]:
        # SYNC: cell-whole - acquire: the writer's blocks are visible.
        return _collectives.scan_cells(self._segment.buf, CELLS_OFFSET, len(self._seen), self._seen)

    def _check_guest(self, place: CellPlace, event_id: int) -> None:
        if place.kind in (CellKind.ENTRY, CellKind.RETURN):
            guest = self._shape.guest(self._rank, place.seat)
            if guest >= self._shape.num_attention_ranks:
                nobody = Rank("attention", guest)
                raise self._corrupt(f"seat {place.seat} belongs to nobody", nobody, event_id)

    def _writer_of(self, place: CellPlace) -> Rank:
        match place.kind:
            case CellKind.DIRECT:
                return Rank("attention", place.peer)
            case CellKind.FORWARD:
                return Rank("expert", self._shape.trampoline_of(place.peer))
            case CellKind.ENTRY:
                return Rank("attention", self._shape.guest(self._rank, place.seat))
            case CellKind.RETURN:
                return Rank("expert", place.peer)

    def _is_current(self, index: int, word: int, writer: Rank) -> bool:
        order = incarnation_order(word, self._table.incarnation(writer))
        if order > 0:
            self._seen[index] = 0  # its address has not been learned yet: look again
        elif order < 0:
            self.num_dropped += 1
        return order == 0

    def _open(self, place: CellPlace, word: int, event_id: int, extent: int, num_rows: int) -> RoutedArrival:
        shape, writer = self._shape, self._writer_of(place)
        first, count = extent >> 32, extent & U32
        self._check_extent(place, writer, event_id, first + count, num_rows)
        sender = self._peer(writer, event_id)
        if place.kind is CellKind.DIRECT:
            source = self._views.source(sender, shape.attention_source(place.microbatch))
        else:
            source = self._views.source(
                sender, shape.seat_source(shape.seat_of(place.peer), place.microbatch)
            )
        # Own copies: the sender may start another attempt while this one is being worked on.
        pair_row = source.pair_row[first : first + count].copy()
        pair_expert = source.pair_expert[first : first + count].copy()
        if count and (int(pair_row.min()) < 0 or int(pair_row.max()) >= num_rows):
            raise self._corrupt(f"pair_row outside 0..{num_rows - 1}", writer, event_id)
        x: Float32Array
        if source.x.dtype == np.int8:
            x, pair_row = _dequantised(source.x, source.x_scale, pair_row)
        else:
            x = source.x[:num_rows].view(np.float32)
        return RoutedArrival(
            place.peer,
            Event.unpack(event_id),
            event_id,
            x,
            pair_row,
            pair_expert,
            self._result_rows(place, count),
            place,
            word,
            self._table.incarnation(writer),
        )

    def _result_rows(self, place: CellPlace, count: int) -> Float32Array:
        if self._shape.int8:
            return np.empty((count, self._shape.hidden), np.float32)
        block = self._views.result(self._segment, self._shape.expert_result(place.peer, place.microbatch))
        return block.y[:count].view(np.float32)

    def _check_extent(
        self, place: CellPlace, writer: Rank, event_id: int, num_pairs: int, num_rows: int
    ) -> None:
        shape, microbatch = self._shape, Event.unpack(event_id).microbatch
        if num_rows > shape.rows_max or num_pairs > shape.pairs_max or microbatch != place.microbatch:
            raise self._corrupt(
                f"num_rows={num_rows} num_pairs={num_pairs} microbatch={microbatch}", writer, event_id
            )

    def commit(self, arrival: RoutedArrival) -> None:
        """Publish `arrival.y` to the attention rank or to its trampoline. Does not block; the dead are not told."""
        shape, place, count = self._shape, arrival.place, arrival.y.shape[0]
        writer = self._writer_of(place)
        if self._table.incarnation(writer) != arrival.incarnation:
            self.num_dropped += 1
            return
        if shape.int8:
            block = self._views.result(self._segment, shape.expert_result(place.peer, place.microbatch))
            _collectives.quantise(block.y, block.y_scale, arrival.y, count, shape.hidden)
        if place.kind is CellKind.DIRECT:
            cell, stage = shape.answer_cell(self._rank, place.microbatch), Stage.E2A
        else:
            seat = shape.seat_of(place.peer)
            cell = shape.expert_cell(CellPlace(CellKind.RETURN, self._rank, seat, place.microbatch))
            stage = Stage.E2A_FORWARD
        self._writer.push(
            self._peer(writer, arrival.event_id), cell, stage, arrival.event_id, count, arrival.echo
        )

    # ------------------------------------------------------------------ trampoline

    def _enter(self, place: CellPlace, word: int, event_id: int, extent: int, num_rows: int) -> None:
        shape, guest, microbatch = self._shape, self._writer_of(place), place.microbatch
        count = extent & U32
        self._check_extent(place, guest, event_id, extent, num_rows)
        source = self._views.source(self._peer(guest, event_id), shape.attention_source(microbatch))
        starts = source.starts.copy()
        if starts[0] != 0 or starts[-1] != count or (np.diff(starts) < 0).any():
            raise self._corrupt("starts do not lead from 0 to the number of pairs", guest, event_id)
        own = self._views.source(self._segment, shape.seat_source(place.seat, microbatch))
        own.x[:num_rows] = source.x[:num_rows]
        own.x_scale[:num_rows] = source.x_scale[:num_rows]
        own.pair_row[:count] = source.pair_row[:count]
        own.pair_expert[:count] = source.pair_expert[:count]
        relay = _Relay(guest, event_id, word, starts, {})
        self._relays[place.seat, microbatch] = relay
        cell = shape.expert_cell(CellPlace(CellKind.FORWARD, guest.index, 0, microbatch))
        for owner in np.flatnonzero(np.diff(starts)).tolist():
            self._forward(relay, owner, cell, place, num_rows)

    def _forward(self, relay: _Relay, owner: int, cell: int, place: CellPlace, num_rows: int) -> None:
        first, end = int(relay.starts[owner]), int(relay.starts[owner + 1])
        rank = Rank("expert", owner)
        try:
            peer = self._peer(rank, relay.event_id)
        except PeerDied:
            self._fail(place.seat, place.microbatch, owner)
            return
        word = self._writer.push(
            peer, cell, Stage.A2E_FORWARD, relay.event_id, first << 32 | end - first, num_rows
        )
        relay.pending[owner] = (word, self._incarnation(rank))

    def _collect(self, place: CellPlace, event_id: int, count: int, echo: int) -> None:
        shape, owner = self._shape, place.peer
        relay = self._relays.get((place.seat, place.microbatch))
        if relay is None or event_id != relay.event_id or relay.pending.get(owner, (0, 0))[0] != echo:
            self.num_dropped += 1
            return
        first, end = int(relay.starts[owner]), int(relay.starts[owner + 1])
        rank = Rank("expert", owner)
        if count != end - first:
            raise self._corrupt(f"answer has {count} rows, {end - first} were asked for", rank, event_id)
        place_there = shape.expert_result(relay.guest.index, place.microbatch)
        theirs = self._views.result(self._peer(rank, event_id), place_there)
        own = self._views.result(self._segment, shape.seat_result(place.seat, place.microbatch))
        own.y[first:end] = theirs.y[:count]
        own.y_scale[first:end] = theirs.y_scale[:count]
        del relay.pending[owner]
        if not relay.pending:
            self._finish(place.seat, place.microbatch, int(relay.starts[-1]))

    def _finish(self, seat: int, microbatch: int, w2: int) -> None:
        relay = self._relays.pop((seat, microbatch))
        guest = self._peer(relay.guest, relay.event_id)
        self._writer.push(guest, self._shape.e2a_cell(microbatch), Stage.E2A, relay.event_id, w2, relay.echo)

    def _fail(self, seat: int, microbatch: int, owner: int) -> None:
        if (seat, microbatch) in self._relays:
            self._finish(seat, microbatch, FAILED | owner)

    def _check_owners(self) -> None:
        if not self._relays:
            return
        now = now_ns()
        if now < self._check_at_ns:
            return
        due, self._check_at_ns = self._check_at_ns > 0, now + self._poll_ns
        for (seat, microbatch), relay in tuple(self._relays.items()) if due else ():
            for owner, (_, incarnation) in tuple(relay.pending.items()):
                rank = Rank("expert", owner)
                if self._incarnation(rank) != incarnation or not self._is_alive(rank):
                    try:
                        self._fail(seat, microbatch, owner)
                    except PeerDied:  # the guest is gone too
                        self.num_dropped += 1
                    break

    # ------------------------------------------------------------------ peers

    def _peer(self, rank: Rank, event_id: int) -> Segment:
        if rank == Rank("expert", self._rank):
            return self._segment
        return self._table.segment(rank, asker=self._name, event_id=event_id)

    def _incarnation(self, rank: Rank) -> int:
        own = rank == Rank("expert", self._rank)
        return self._segment.incarnation if own else self._table.incarnation(rank)

    def _is_alive(self, rank: Rank) -> bool:
        return rank == Rank("expert", self._rank) or self._table.alive(rank)

    def _corrupt(self, text: str, peer: Rank, event_id: int) -> SegmentCorrupt:
        return SegmentCorrupt(text, rank=self._name, peer=str(peer), event_id=event_id)

    # ------------------------------------------------------------------ waiting

    def wait(self, seen: int, *, spin_ns: int, timeout_ns: int) -> int:
        """Sleep until someone rings, at most `timeout_ns`; return the doorbell's count. Releases the GIL.

        While guests wait for owners, sleep at most the poll interval, so that an owner's death is noticed in time.
        """
        limit = min(timeout_ns, self._poll_ns) if self._relays else timeout_ns
        return self._segment.wait_doorbell(seen, spin_ns, limit)

    def doorbell(self) -> int:
        """Return the doorbell's count now; read it *before* `poll`, else a ring in between is slept over."""
        return self._segment.doorbell_seq()

    def stats(self) -> dict[str, int]:
        """Return metadata writes at peers by stage, relays under way, and dropped messages."""
        writes = {f"{stage.value}_cell_writes": n for stage, n in self._writer.cell_writes.items()}
        return {**writes, "relays_open": len(self._relays), "dropped": self.num_dropped}


def _dequantised(x: Rows, scale: Float32Array, pair_row: Int32Array) -> tuple[Float32Array, Int32Array]:
    """Return one float32 row per pair, and the pairs' new row numbers."""
    count, hidden = pair_row.shape[0], x.shape[1]
    rows = np.empty((count, hidden), np.int8)
    _collectives.gather_rows(rows, pair_row, x, hidden)
    out = np.empty((count, hidden), np.float32)
    _collectives.dequantise(out, rows, scale[pair_row], count, hidden)
    return out, np.arange(count, dtype=np.int32)
