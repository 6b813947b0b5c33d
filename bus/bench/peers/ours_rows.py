"""The collectives of the bus: plain all-to-all out of the app area, dispatch + combine, A2E + E2A both ways.

The experts write into the y that the bus hands them, which lies in shared memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from threading import Event as Flag

import numpy as np

from bus.bench.meeting import Meeting, Message
from bus.bench.peers.limit_rows import LIMIT, LimitRows
from bus.bench.routing import A2E, DISPATCH, Shape, check_result, expert_factor, inputs
from bus.bench.rows import (
    NUM_CHECKED,
    PERSISTENT,
    PLAIN,
    RowsWay,
    check_plain,
    plain_blocks,
    timed,
)
from bus.clock import Deadline
from bus.config import XcclConfig
from bus.memory import _collectives
from bus.memory.layout import SegmentLayout, align_up
from bus.memory.segment import Segment, segment_name
from bus.xccl.alltoall import AllToAll, AllToAllShape
from bus.xccl.cost import Route
from bus.xccl.dispatch import Dispatcher
from bus.xccl.dispatch_layout import DispatchShape
from bus.xccl.endpoint import Rank
from bus.xccl.event import STEP, Event
from bus.xccl.group import AddressTable
from bus.xccl.relay import RoutedExpert
from bus.xccl.relay_layout import RelayShape
from bus.xccl.trampoline import RoutedAttention

OURS, TRAMPOLINE = "ours", "ours trampoline"
TIMEOUT_MS = 120_000
SERVE_POLL_NS = 100_000_000


def open_rows(meeting: Meeting, stack: ExitStack, options: Message) -> dict[str, RowsWay]:
    """Return the ways among all ranks."""
    config = XcclConfig(**options["xccl"])
    return {
        OURS: OurRows(meeting, config, {PLAIN: Blocks, DISPATCH: Dispatching, A2E: Routing}),
        TRAMPOLINE: OurRows(meeting, config, {A2E: Bouncing}),
        f"{OURS} {PERSISTENT}": OurRows(meeting, config, {PLAIN: PersistentBlocks}),
        LIMIT: LimitRows(meeting),
    }


class Place:
    """A segment and the addresses of the others', for one case."""

    def __init__(self, meeting: Meeting, config: XcclConfig, number: int) -> None:
        self.meeting, self.config, self.rank = meeting, config, meeting.rank
        self.table = AddressTable()
        self._number, self._steps = number, 0

    def open(self, layout: SegmentLayout, place: Callable[[int], Rank]) -> Segment:
        """Create the own segment and learn all addresses; `place` gives the name of each rank."""
        pod, me = f"{self.meeting.name}r", place(self.rank)
        names = [
            segment_name(pod, r.service, r.index, self._number)
            for r in map(place, range(self.meeting.num_ranks))
        ]
        self.segment = Segment.create(
            names[self.rank], layout, service=me.service, index=me.index, incarnation=self._number
        )
        self.meeting.gather()
        for rank, name in enumerate(names):
            self.table.learn(place(rank), self._number, name)
        return self.segment

    def next_event(self) -> Event:
        """Return the name of the next exchange, the same at all ranks."""
        self._steps += 1
        return Event(self._steps, 0)

    def close(self) -> None:
        """Remove the segment once nobody uses it."""
        self.meeting.gather()
        self.table.close()
        self.segment.close()
        self.segment.unlink()


class Blocks(Place):
    """Plain all-to-all of equal blocks."""

    def __init__(self, meeting: Meeting, config: XcclConfig, case: Message, number: int) -> None:
        super().__init__(meeting, config, number)
        num_ranks, size = meeting.num_ranks, int(case["size"])
        out, self._into, self._wanted = plain_blocks(self.rank, num_ranks, size)
        sizes = AllToAllShape(num_ranks=num_ranks, area_bytes=align_up(out.size, 4096))
        segment = self.open(sizes.layout(), lambda rank: Rank("expert", rank))
        self._side = AllToAll(segment, sizes, self.rank, self.table, config=config)
        self._out, self._rows = (
            self._side.area((num_ranks, size), np.uint8),
            self._into.reshape(num_ranks, size),
        )
        self._out[:] = out.reshape(num_ranks, size)

    def run(self) -> None:
        """Exchange once."""
        self._steps += 1
        event, side = Event(self._steps, 0), self._side
        side.exchange_fixed(self._out, event=event, deadline=self._deadline, out=self._rows)

    def play(self, repetitions: int) -> list[int]:
        """Return the durations, ns."""
        self._deadline = Deadline.after_ms(TIMEOUT_MS)  # of all of them
        return timed(self, repetitions)

    def verify(self) -> None:
        """Raise ValueError if the last result is wrong."""
        check_plain(self._into, self._wanted)

    def close(self) -> None:
        """See `Place`."""
        self._out = np.empty((0, 0), np.uint8)  # a view keeps the segment mapped
        self._side.close()
        super().close()


class PersistentBlocks(Blocks):
    """The same, prepared once."""

    def __init__(self, meeting: Meeting, config: XcclConfig, case: Message, number: int) -> None:
        super().__init__(meeting, config, case, number)
        self._exchange = self._side.persistent(self._out, self._rows).exchange
        self._event_id = Event(0, 0).pack()

    def run(self) -> None:
        """Exchange once."""
        self._event_id += STEP
        self._exchange(self._event_id, self._deadline.at_ns)

    def close(self) -> None:
        """See `Place`."""
        del self._exchange
        super().close()


class Case(Place):
    """An MoE-shaped exchange, set up."""

    def __init__(self, meeting: Meeting, config: XcclConfig, case: Message, number: int) -> None:
        super().__init__(meeting, config, number)
        self.shape = Shape(**case)
        self.is_int8 = self.shape.kind == "int8"
        self.given = inputs(self.shape, meeting.rank)
        self.sum = np.empty(self.given.x.shape, np.float32)

    def verify(self) -> None:
        """Raise ValueError if the last result is wrong."""
        check_result(self.shape, self.given, self.sum)


class Dispatching(Case):
    """Dispatch + combine."""

    def __init__(self, meeting: Meeting, config: XcclConfig, case: Message, number: int) -> None:
        super().__init__(meeting, config, case, number)
        shape = self.shape
        sizes = DispatchShape(
            num_ranks=shape.num_ranks,
            max_tokens=shape.batch,
            top_k=shape.top_k,
            hidden=shape.hidden,
            num_local_experts=shape.num_local_experts,
            int8=self.is_int8,
            deliver_int8=self.is_int8,
            in_place=True,
        )
        segment = self.open(sizes.layout(), lambda rank: Rank("expert", rank))
        self._side = Dispatcher(segment, sizes, self.rank, self.table, config=config)
        self._factor = expert_factor(self.rank)

    def run(self) -> None:
        """Exchange once."""
        given, side, deadline = self.given, self._side, Deadline.after_ms(TIMEOUT_MS)
        event = self.next_event()
        if self.is_int8:
            rows, handle = side.dispatch_int8(given.x, given.topk_idx, event=event, deadline=deadline)
            np.multiply(rows.x_scale, self._factor, out=rows.y_scale)
            side.combine(rows.y, given.topk_weights, handle, deadline=deadline, out=self.sum)
            return
        result, handle = side.dispatch(given.x, given.topk_idx, event=event, deadline=deadline)
        np.multiply(result.x, self._factor, out=result.y)
        side.combine(result.y, given.topk_weights, handle, deadline=deadline, out=self.sum)

    def play(self, repetitions: int) -> list[int]:
        """Return the durations, ns."""
        return timed(self, repetitions)

    def close(self) -> None:
        """See `Case`."""
        self._side.close()
        super().close()


class Routing(Case):
    """A2E + E2A. Attention ranks are timed, expert ranks serve until the attention ranks are done."""

    route = Route.DIRECT

    def __init__(self, meeting: Meeting, config: XcclConfig, case: Message, number: int) -> None:
        super().__init__(meeting, config, case, number)
        shape = self.shape
        sizes = RelayShape(
            num_attention_ranks=shape.first_expert_rank,
            num_expert_ranks=shape.num_expert_ranks,
            rows_max=shape.batch,
            num_slots=shape.top_k,
            hidden=shape.hidden,
            int8=self.is_int8,
            deliver_int8=self.is_int8,
        )
        self._is_attention = self.rank < shape.first_expert_rank
        layout = sizes.attention_layout() if self._is_attention else sizes.expert_layout()
        segment, me = self.open(layout, self._place), self._place(self.rank)
        self._attention: RoutedAttention | None = None
        self._expert: RoutedExpert | None = None
        if self._is_attention:
            self._attention = RoutedAttention(segment, sizes, me.index, self.table, config=config)
        else:
            self._expert = RoutedExpert(segment, sizes, me.index, self.table, config=config)
        self._owner = (self.given.topk_idx // shape.num_local_experts).astype(np.int32)
        self._factor = expert_factor(self.rank)

    def _place(self, rank: int) -> Rank:
        first = self.shape.first_expert_rank
        return Rank("attention", rank) if rank < first else Rank("expert", rank - first)

    def run(self) -> None:
        """Exchange once; attention ranks only."""
        given, side = self.given, self._attention
        assert side is not None
        handle = side.a2e_send(given.x, self._owner, given.topk_idx, self.next_event(), self.route)
        side.e2a_combine(handle, given.topk_weights, self.sum, self._deadline)

    def play(self, repetitions: int) -> list[int]:
        """Return the durations, ns; none from an expert rank."""
        self._deadline = Deadline.after_ms(TIMEOUT_MS)  # of all of them
        if self._is_attention:
            return timed(self, repetitions)
        self._serve()
        return []

    def _serve(self) -> None:
        side, stopping = self._expert, Flag()
        assert side is not None

        def stop() -> None:
            stopping.set()
            self.segment.ring_doorbell()

        thread = self.meeting.serve(stop)
        work = self._work_int8 if self.is_int8 else self._work
        while not stopping.is_set():
            work(side)
            side.wait(timeout_ns=SERVE_POLL_NS)
        thread.join()

    def _work(self, side: RoutedExpert) -> None:
        for arrival in side.poll(_raise):
            y = arrival.y
            _collectives.gather_rows(y, arrival.pair_row, arrival.x, 4 * self.shape.hidden)
            np.multiply(y, self._factor, out=y)
            side.commit(arrival)

    def _work_int8(self, side: RoutedExpert) -> None:
        for arrival in side.poll_int8(_raise):
            _collectives.gather_rows(arrival.y, arrival.pair_row, arrival.x, self.shape.hidden)
            np.multiply(arrival.pair_scale, self._factor, out=arrival.y_scale)
            side.commit(arrival)

    def close(self) -> None:
        """See `Case`."""
        if self._attention is not None:
            self._attention.close()
        if self._expert is not None:
            self._expert.close()
        super().close()


class Bouncing(Routing):
    """A2E + E2A, each attention rank through its trampoline."""

    route = Route.TRAMPOLINE


def _raise(error: Exception) -> None:
    raise error


Form = Blocks | Dispatching | Routing
Forms = Mapping[str, type[Blocks] | type[Dispatching] | type[Routing]]


class OurRows:
    """A way of the bus; see `bus.bench.rows.RowsWay`."""

    numbers = 0  # of the segments that this process has made

    def __init__(self, meeting: Meeting, config: XcclConfig, forms: Forms) -> None:
        self._meeting, self._config, self._forms = meeting, config, forms
        self._case: Form | None = None

    def supports(self, case: Message) -> bool:
        """See `RowsWay`."""
        return case["form"] in self._forms

    def prepare(self, case: Message) -> None:
        """See `RowsWay`."""
        OurRows.numbers += 1
        self._case = self._forms[case["form"]](self._meeting, self._config, case, OurRows.numbers)

    def check(self) -> None:
        """See `RowsWay`."""
        assert self._case is not None
        self._case.play(NUM_CHECKED)
        self._case.verify()

    def measure(self, repetitions: int) -> list[int]:
        """See `RowsWay`."""
        assert self._case is not None
        return self._case.play(repetitions)

    def finish(self) -> None:
        """See `RowsWay`."""
        if self._case is not None:
            self._case.close()
        self._case = None
