"""The expert rank's end of A2E/E2A: its own experts' work, and the forwarding for its guests as a trampoline.

Everything happens in `poll` and `commit`, which never block: a trampoline forwards when it is next polled, and collects
when the owners have answered, however they are ordered; so no ring of ranks that wait for one another can arise.

    attention i --A2E--> trampoline --A2E_FORWARD--> owners --E2A_FORWARD--> trampoline --E2A--> attention i
       1 cell            copies the source block,     pull their share        copies each owner's     pulls all results
                         1 cell per owner             from the trampoline     result when it comes    from one place

Deaths: an attention rank waits for its trampoline only, and sees its death by its owner lock. A trampoline looks at the
owner locks of the owners it waits for, and reports a death in its E2A cell. A trampoline keeps no state that
outlives an exchange, so its next incarnation just serves the next attempt. Hot path: bus/memory/_relay_expert.c, which
hands back what needs Python as *problems*: a segment to map, private memory to make, an error to raise. Source: paper
section 4. Twin: `bus.xccl.reference.exchange`.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from bus.clock import NS_PER_MS, now_ns
from bus.config import XcclConfig
from bus.errors import PeerDied, SegmentCorrupt
from bus.memory import _relay
from bus.memory.segment import Segment
from bus.xccl.endpoint import COUNTER_BITS, Rank
from bus.xccl.event import Event
from bus.xccl.group import AddressTable
from bus.xccl.relay_layout import (
    CellKind,
    CellPlace,
    Float32Array,
    Int8Array,
    Int32Array,
    RelayShape,
    burst_ns,
    segment_words,
)

_CUTS_MAX = 64
_INCARNATION_MASK = (1 << 64 - COUNTER_BITS) - 1

OnCorrupt = Callable[[SegmentCorrupt], None]
_Entry: TypeAlias = tuple[int, int, int, int, int]  # cell, stamp, event id, rows, pairs


def incarnation_order(word: int, known: int) -> int:
    """Return 0 when the stamp `word` is of incarnation `known`, 1 when of a later one, -1 when of an earlier one."""
    ahead = ((word >> COUNTER_BITS) - known) & _INCARNATION_MASK
    if ahead == 0:
        return 0
    return 1 if known == 0 or ahead <= _INCARNATION_MASK // 2 else -1


class _Code(enum.IntEnum):
    """Problems, numbered as in bus/memory/_relay_expert.c."""

    UNKNOWN_WRITER = 0
    MISSING_OWNER = 1
    NO_SLOT = 2
    BAD_COUNTS = 3
    BAD_ROWS = 4
    BAD_STARTS = 5
    BAD_ANSWER = 6
    NOBODY = 7


@dataclass(slots=True)
class Arrival:
    """Work that reached an expert rank: fill `y`, then `commit`.

    x: [num_rows, hidden] float32, read in place from the sender's segment (INT8: own memory, rows that no pair wants
    undefined). pair_row, pair_expert: [num_pairs] int32, own memory. y: [num_pairs, hidden] float32, to be filled. All
    are valid until the next arrival of the same peer and microbatch is polled. cell, stamp: which message this is.
    """

    peer: int
    event_id: int
    x: Float32Array
    pair_row: Int32Array
    pair_expert: Int32Array
    y: Float32Array
    cell: int
    stamp: int

    @property
    def event(self) -> Event:
        """What the exchange is about."""
        return Event.unpack(self.event_id)


@dataclass(slots=True)
class Int8Arrival:
    """Work that reached an expert rank, INT8 as it came: fill `y` and `y_scale`, then `commit`.

    x: [num_rows, hidden] int8, x_scale: [num_rows] float32, read in place from the sender's segment: a value is
    float32(x) * x_scale of its row; NaN says that the row was not finite. pair_scale: [num_pairs] float32, own memory,
    x_scale of each pair's row. y: [num_pairs, hidden] int8, y_scale: [num_pairs] float32, to be filled: what the
    attention rank adds, without another rounding. The rest is as in `Arrival`.
    """

    peer: int
    event_id: int
    x: Int8Array
    x_scale: Float32Array
    pair_row: Int32Array
    pair_expert: Int32Array
    y: Int8Array
    y_scale: Float32Array
    pair_scale: Float32Array
    cell: int
    stamp: int

    @property
    def event(self) -> Event:
        """What the exchange is about."""
        return Event.unpack(self.event_id)


_Cut: TypeAlias = tuple[
    npt.NDArray[Any], Float32Array, Int32Array, Int32Array, npt.NDArray[Any], Float32Array, Float32Array
]


@dataclass(slots=True)
class _Views:
    """Full-size arrays of the arrivals of one cell; scales where INT8 is delivered.

    cuts: what arrivals of (rows, pairs) see of them: x, x_scale, pair_row, pair_expert, y, y_scale, pair_scale. Sizes
    come again, and cutting the arrays takes as long as all else that an arrival costs in Python.
    """

    peer: int
    x: npt.NDArray[Any]
    pair_row: Int32Array
    pair_expert: Int32Array
    y: npt.NDArray[Any]
    x_scale: Float32Array
    y_scale: Float32Array
    pair_scale: Float32Array
    cuts: dict[tuple[int, int], _Cut] = field(default_factory=dict)

    def cut(self, num_rows: int, num_pairs: int) -> _Cut:
        """Return the arrays of an arrival of this size."""
        found = self.cuts.get((num_rows, num_pairs))
        if found is None:
            if len(self.cuts) == _CUTS_MAX:
                self.cuts.clear()
            pairs = self.pair_row[:num_pairs], self.pair_expert[:num_pairs]
            ys = self.y[:num_pairs], self.y_scale[:num_pairs]
            found = self.cuts[num_rows, num_pairs] = (
                self.x[:num_rows],
                self.x_scale[:num_rows],
                *pairs,
                *ys,
                self.pair_scale[:num_pairs],
            )
        return found


@dataclass(frozen=True, slots=True)
class _Memory:
    """Private memory of the arrivals of one cell; what it holds.

    words: [pair_row | pair_expert | of delivered INT8: pair_scale | of widened INT8: x | y].
    """

    words: Int32Array
    rows: int
    pairs: int


def _room(needed: int, largest: int) -> int:
    return min(largest, max(16, 1 << (needed - 1).bit_length()))


class RoutedExpert:
    """The expert rank's end. Driven by what arrives. Used by one thread.

    Args:
        segment: own segment, made with `shape.expert_layout()`; stays the caller's.
        shape: the same at all ranks. rank: own expert rank.
        table: addresses of attention and expert ranks; mapped as they are needed.
        config: how long to spin, how often to look at the owner locks of awaited peers.
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
        settings = config or XcclConfig()
        self._segment, self._shape, self._rank, self._table = segment, shape, rank, table
        self._name = f"expert-{rank}"
        self._poll_ns = settings.poll_interval_ms * NS_PER_MS
        self._native = _relay.ExpertEnd(
            shape.geometry(rank),
            segment_words(segment),
            burst_ns(settings.spin_us, shape.num_attention_ranks),
        )
        self._views: dict[int, _Views] = {}  # of the cells that arrivals have come by
        self._memory: dict[int, _Memory] = {}
        self._connected: dict[Rank, int] = {}
        self._absent: set[Rank] = set()
        self._version = -1
        self._unsolved = False  # a cell is there whose writer's address has not been learned yet
        self._check_at_ns = 0
        self._alarms_seen = 0
        self._found_dead: set[tuple[int, int, int]] = (
            set()
        )  # owners (seat, microbatch, rank) that get a last look
        self._dropped = 0

    # ------------------------------------------------------------------ arrivals

    def poll(self, on_corrupt: OnCorrupt) -> list[Arrival]:
        """Return the work for this rank's experts that arrived since the last poll; forward what is for others.

        Words outside the agreed shape go to `on_corrupt` and are dropped; their sender will time out. Does not block.
        ValueError: the shape says `deliver_int8`.
        """
        if self._shape.deliver_int8:
            raise ValueError("poll: the shape says deliver_int8, which poll_int8 does")
        opened = []
        for cell, stamp, event_id, num_rows, num_pairs in self._poll(on_corrupt):
            views = self._views.get(cell) or self._make_views(cell)
            x, _, pair_row, pair_expert, y, _, _ = views.cut(num_rows, num_pairs)
            opened.append(Arrival(views.peer, event_id, x, pair_row, pair_expert, y, cell, stamp))
        return opened

    def poll_int8(self, on_corrupt: OnCorrupt) -> list[Int8Arrival]:
        """Do what `poll` does, and hand out INT8 as it came. ValueError: the shape does not say `deliver_int8`."""
        if not self._shape.deliver_int8:
            raise ValueError("poll_int8: the shape does not say deliver_int8")
        opened = []
        for cell, stamp, event_id, num_rows, num_pairs in self._poll(on_corrupt):
            views = self._views.get(cell) or self._make_views(cell)
            x, x_scale, row, expert, y, y_scale, scale = views.cut(num_rows, num_pairs)
            opened.append(
                Int8Arrival(views.peer, event_id, x, x_scale, row, expert, y, y_scale, scale, cell, stamp)
            )
        return opened

    def _poll(self, on_corrupt: OnCorrupt) -> Sequence[_Entry]:
        if self._table.version != self._version:
            self._drop_replaced()
        found = self._native.poll()
        if found is None:
            if self._native.num_relays:
                self._check_owners()
            return ()
        arrivals, problems = found
        return (arrivals or ()) if problems is None else self._solve_all(arrivals or [], problems, on_corrupt)

    def commit(self, arrival: Arrival | Int8Arrival) -> bool:
        """Publish what was filled to the attention rank or its trampoline; False if it was given up. Does not block."""
        return self._native.commit(arrival.cell, arrival.stamp)

    # ------------------------------------------------------------------ problems

    def _solve_all(
        self,
        opened: list[_Entry],
        problems: list[tuple[int, int, int, int, int, int]],
        on_corrupt: OnCorrupt,
    ) -> list[_Entry]:
        self._unsolved = False
        while sum(self._solve(*problem, on_corrupt) for problem in problems):
            arrivals, problems_left = self._native.poll() or (None, None)
            problems = problems_left or []
            opened = opened + (arrivals or [])
        # An arrival that a later one of the same exchange's sender has replaced shares its memory.
        latest = {}
        for entry in opened:
            place = self._shape.locate(entry[0])
            latest[place.peer, place.microbatch] = entry
        return list(latest.values())

    def _solve(
        self, code: int, cell: int, stamp: int, event_id: int, a: int, b: int, on_corrupt: OnCorrupt
    ) -> bool:
        """Tell whether looking at the cell again is worth it now."""
        match code:
            case _Code.UNKNOWN_WRITER:
                solved = self._meet(cell, stamp, event_id, on_corrupt)
            case _Code.MISSING_OWNER:
                solved = self._find_owner(Rank("expert", a), event_id, on_corrupt)
            case _Code.NO_SLOT:
                self._make_memory(cell, a, b)
                solved = True
            case _:
                on_corrupt(self._corrupt(_Code(code), cell, event_id, a, b))
                return False
        if solved:
            self._native.look_again(cell)
        return solved

    def _meet(self, cell: int, stamp: int, event_id: int, on_corrupt: OnCorrupt) -> bool:
        writer = self._writer_of(self._shape.locate(cell))
        order = incarnation_order(stamp, self._table.incarnation(writer))
        if order > 0:
            self._unsolved = True
            self._native.look_again(cell)
            return False
        if order < 0 or not self._connect(writer, event_id, on_corrupt):
            self._dropped += 1
            return False
        return True

    def _find_owner(self, owner: Rank, event_id: int, on_corrupt: OnCorrupt) -> bool:
        if not self._connect(owner, event_id, on_corrupt):
            self._native.drop_peer(False, owner.index, True)
            self._absent.add(owner)
        return True

    def _connect(self, rank: Rank, event_id: int, on_corrupt: OnCorrupt) -> bool:
        try:
            segment = self._table.segment(rank, asker=self._name, event_id=event_id)
        except PeerDied:
            return False
        except SegmentCorrupt as error:
            on_corrupt(error)
            return False
        connect = self._native.set_attention if rank.service == "attention" else self._native.set_expert
        try:
            connect(rank.index, *segment_words(segment))
        except ValueError as error:
            on_corrupt(SegmentCorrupt(str(error), rank=self._name, peer=str(rank), event_id=event_id))
            return False
        self._connected[rank] = segment.incarnation
        return True

    def _corrupt(self, code: _Code, cell: int, event_id: int, a: int, b: int) -> SegmentCorrupt:
        place = self._shape.locate(cell)
        text = {
            _Code.BAD_COUNTS: f"num_pairs={a} num_rows={b} or the microbatch is outside the agreed shape",
            _Code.BAD_ROWS: f"pair_row outside 0..{a - 1}",
            _Code.BAD_STARTS: f"starts do not lead from 0 to {a}",
            _Code.BAD_ANSWER: f"answer has {a} rows, {b} were asked for",
            _Code.NOBODY: f"seat {a} belongs to nobody",
        }[code]
        peer = str(self._writer_of(place))
        return SegmentCorrupt(text, rank=self._name, peer=peer, event_id=event_id)

    # ------------------------------------------------------------------ peers

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

    def _drop_replaced(self) -> None:
        for rank, incarnation in tuple(self._connected.items()):
            if self._table.incarnation(rank) != incarnation:
                self._native.drop_peer(rank.service == "attention", rank.index, False)
                del self._connected[rank]
                self._drop_views(rank)
        for rank in self._absent:
            self._native.drop_peer(False, rank.index, False)
        self._absent.clear()
        self._version = self._table.version

    def _drop_views(self, writer: Rank) -> None:
        for cell in tuple(self._views):
            if self._writer_of(self._shape.locate(cell)) == writer:
                del self._views[cell]  # they would keep its segment mapped

    def _make_memory(self, cell: int, num_rows: int, num_pairs: int) -> None:
        shape = self._shape
        rows, pairs = _room(num_rows, shape.rows_max), _room(num_pairs, shape.pairs_max)
        num_private = 0
        if shape.int8:
            num_private = pairs if shape.deliver_int8 else (rows + pairs) * shape.hidden
        self._memory[cell] = _Memory(np.empty(2 * pairs + num_private, np.int32), rows, pairs)
        self._native.set_slot(cell, self._memory[cell].words, rows, pairs)
        self._views.pop(cell, None)

    def _make_views(self, cell: int) -> _Views:
        shape, place, memory = self._shape, self._shape.locate(cell), self._memory[cell]
        pair_row, pair_expert, private = np.split(memory.words, [memory.pairs, 2 * memory.pairs])
        if shape.int8 and not shape.deliver_int8:
            floats = private.view(np.float32).reshape(-1, shape.hidden)
            none = floats[0, :0]
            rows = floats[: memory.rows], none, floats[memory.rows :], none
        else:
            rows = self._shared_rows(place)
        x, x_scale, y, y_scale = rows
        pair_scale = private.view(np.float32)
        views = self._views[cell] = _Views(
            place.peer, x, pair_row, pair_expert, y, x_scale, y_scale, pair_scale
        )
        return views

    def _shared_rows(
        self, place: CellPlace
    ) -> tuple[npt.NDArray[Any], Float32Array, npt.NDArray[Any], Float32Array]:
        """Return x and x_scale in the writer's segment, y and y_scale in the own one; no scales with float32."""
        shape, writer = self._shape, self._writer_of(place)
        sender = self._segment
        if writer != Rank("expert", self._rank):
            sender = self._table.segment(writer, asker=self._name)
        at = shape.attention_source(place.microbatch)
        if place.kind is CellKind.FORWARD:
            at = shape.seat_source(shape.seat_of(place.peer), place.microbatch)
        source = sender.layout.managed_offset + at
        result = self._segment.layout.managed_offset + shape.expert_result(place.peer, place.microbatch)
        dtype: type[np.generic] = np.int8 if shape.int8 else np.float32
        x = sender.array(source, (shape.rows_max, shape.hidden), dtype)
        y = self._segment.array(result, (shape.pairs_max, shape.hidden), dtype)
        x_scale_at, y_scale_at = shape.scale_places
        num_scales = (shape.rows_max, shape.pairs_max) if shape.int8 else (0, 0)
        x_scale = sender.array(source + x_scale_at, num_scales[:1], np.float32)
        return x, x_scale, y, self._segment.array(result + y_scale_at, num_scales[1:], np.float32)

    # ------------------------------------------------------------------ owners of guests' pairs

    def _check_owners(self) -> None:
        now, num_alarms = now_ns(), self._segment.num_alarms()
        is_alarmed, self._alarms_seen = num_alarms != self._alarms_seen, num_alarms
        if now < self._check_at_ns and not is_alarmed:
            return
        due, self._check_at_ns = is_alarmed or self._check_at_ns > 0, now + self._poll_ns
        if not due:
            return
        awaited = self._native.awaited()
        self._found_dead &= {(seat, microbatch, owner) for seat, microbatch, owner, _ in awaited}
        for seat, microbatch, owner, incarnation in awaited:
            rank = Rank("expert", owner)
            if owner != self._rank and (
                self._table.incarnation(rank) != incarnation or not self._table.alive(rank)
            ):
                self._give_up(seat, microbatch, owner)
                self._check_at_ns = now  # the last look comes with the next poll

    def _give_up(self, seat: int, microbatch: int, owner: int) -> None:
        """Tell the guest that an owner is dead, unless its answer shows at one more look after its lock was free."""
        if (seat, microbatch, owner) in self._found_dead:
            self._found_dead.discard((seat, microbatch, owner))
            self._native.fail(seat, microbatch, owner)
            return
        self._found_dead.add((seat, microbatch, owner))
        place = CellPlace(CellKind.RETURN, owner, seat, microbatch)
        self._native.look_again(self._shape.expert_cell(place))

    # ------------------------------------------------------------------ waiting

    def wait(self, *, timeout_ns: int) -> bool:
        """Wait until someone rings after the last `poll` began; False after `timeout_ns`. Releases the GIL.

        Polls for as long as such waits take, at most 4 ms, while that pays, then sleeps. While guests wait for owners,
        or a message for its sender's address, it ends after the poll interval at the latest, and when a death is told.
        """
        if self._unsolved or self._native.num_relays:
            timeout_ns = min(timeout_ns, 0 if self._found_dead else self._poll_ns)
        return self._native.wait(timeout_ns)

    def stats(self) -> dict[str, int]:
        """Return metadata writes at peers by stage, relays under way, dropped messages, sleeps, moves to a core."""
        counters = self._native.counters()
        counters["dropped"] += self._dropped
        return counters

    def close(self) -> None:
        """Let go of all mappings. Segment and table stay the caller's."""
        self._native.close()
        self._views.clear()
        self._memory.clear()
        self._connected.clear()
