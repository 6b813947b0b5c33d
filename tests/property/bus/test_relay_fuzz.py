"""Whatever a peer writes into cells and blocks, both ends of A2E/E2A raise or report; they never leave their memory."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bus.clock import Deadline
from bus.errors import BusError, SegmentCorrupt
from bus.memory import _native
from bus.xccl.cost import Route
from bus.xccl.endpoint import Rank, stamp
from bus.xccl.event import Event
from bus.xccl.relay_layout import RelayShape
from tests.harness.relay_world import RelayWorld, routing

ROWS, SLOTS, EXPERTS = 4, 3, 3
U64 = (1 << 64) - 1

small = st.integers(0, 2 * ROWS * SLOTS)
words = st.one_of(
    small,
    st.integers(0, U64),
    st.builds(lambda high, low: high << 32 | low, small, small),
    st.sampled_from([U64, 1 << 63, 1 << 32, (1 << 32) - 1, 1 << 31]),
)
event_ids = st.one_of(
    st.builds(
        lambda step, microbatch: Event(step, 0, microbatch).pack(), st.integers(1, 3), st.integers(0, 3)
    ),
    st.integers(0, U64),
)
cells = st.tuples(st.integers(0, 10_000), st.integers(1, 2), event_ids, words, words)
shapes = st.builds(
    RelayShape,
    num_attention_ranks=st.just(2),
    num_expert_ranks=st.just(EXPERTS),
    rows_max=st.just(ROWS),
    num_slots=st.just(SLOTS),
    hidden=st.just(9),
    num_microbatches=st.integers(1, 2),
    num_domains=st.integers(1, 2),
)
KINDS = [{}, {"int8": True}, {"int8": True, "deliver_int8": True}]


def scribble(world: RelayWorld, rng: np.random.Generator, share: float) -> None:
    """Overwrite bytes of what all ranks have staged, small numbers and any."""
    for segment in world.segments.values():
        area = np.frombuffer(segment.managed, np.int32)
        hit = rng.random(area.shape) < share
        area[hit] = rng.integers(-(1 << 31), 1 << 31, int(hit.sum()))
        few = rng.random(area.shape) < share
        area[few] = rng.integers(-1, 2 * ROWS * SLOTS, int(few.sum()))


def forge(world: RelayWorld, rank: Rank, cell: tuple[int, int, int, int, int], count: int) -> None:
    segment = world.segments[rank]
    place, incarnation, *rest = cell
    offset = segment.cell_offset(place % segment.layout.num_cells)
    _native.write_cell(segment.buf, offset, stamp(incarnation, 1000 + count), *rest)
    segment.ring_doorbell()


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(shape=shapes, kind=st.sampled_from(KINDS), data=st.data())
def test_no_word_of_a_peer_leads_outside(
    shape: RelayShape, kind: dict[str, bool], data: st.DataObject
) -> None:
    shape = replace(shape, **kind)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    share, route = data.draw(st.sampled_from([0.0, 0.01, 0.3])), data.draw(st.sampled_from(list(Route)))
    forged = data.draw(st.lists(cells, max_size=12))
    reports: list[SegmentCorrupt] = []
    with RelayWorld(shape) as world:
        for step in range(1, 4):
            x, rank, expert = routing(rng, shape, ROWS)
            handle = world.attention[0].a2e_send(x, rank, expert, Event(step, 0), route)
            scribble(world, rng, share)
            for count, cell in enumerate(forged):
                to = data.draw(st.sampled_from(list(world.segments)))
                forge(world, to, cell, 100 * step + count)
            for _ in range(4):
                for side in world.experts:
                    poll = side.poll_int8 if shape.deliver_int8 else side.poll
                    for arrival in poll(reports.append):
                        assert 0 <= arrival.pair_row.min(initial=0) <= arrival.pair_row.max(initial=0) < ROWS
                        arrival.y[:] = arrival.x[arrival.pair_row]
                        side.commit(arrival)
            out = np.zeros((ROWS, SLOTS, shape.hidden), np.float32)
            try:
                world.attention[0].e2a_recv(handle, out, Deadline.after_ms(0))
            except BusError:
                continue
    assert all(report.rank.startswith("expert-") for report in reports)
