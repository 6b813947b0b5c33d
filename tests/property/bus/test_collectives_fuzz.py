"""Peers that scribble, in the collectives: any words in their cells and blocks raise or are delivered, within bounds.

The rank under test is real; what the others write is drawn. Run under AddressSanitizer by tests/native, where a read or
write out of bounds ends the process.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bus.clock import Deadline
from bus.errors import BusError, SegmentCorrupt
from bus.memory import _native
from bus.memory.segment import Segment
from bus.xccl.cost import Route
from bus.xccl.dispatch import DispatchShape
from bus.xccl.endpoint import Rank, stamp
from bus.xccl.event import Event
from bus.xccl.relay_layout import RelayShape
from tests.harness.dispatch_world import DispatchWorld
from tests.harness.relay_world import RelayWorld, routing, work

U64 = st.one_of(
    st.integers(0, 12),
    st.sampled_from([2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**63 | 1, 2**64 - 1]),
    st.builds(lambda first, count: first << 32 | count, st.integers(0, 9), st.integers(0, 9)),
    st.integers(0, 2**64 - 1),
)
I32 = st.one_of(
    st.integers(-1, 9), st.sampled_from([-(2**31), 2**31 - 1, 2**30]), st.integers(-(2**31), 2**31 - 1)
)
SCRIBBLES = st.lists(st.tuples(st.integers(0, 2**16), I32), max_size=8)


def scribble(segment: Segment, writes: list[tuple[int, int]], *, until: int) -> None:
    """Overwrite int32 words of the first `until` bytes of the managed area."""
    words = segment.array(segment.layout.managed_offset, (until // 4,), np.int32)
    for place, word in writes:
        words[place % len(words)] = word


steps, writes_so_far = itertools.count(1), itertools.count(1000)


@pytest.fixture(scope="module", params=[False, True], ids=["float32", "int8"])
def group(request: pytest.FixtureRequest) -> Iterator[DispatchWorld]:
    shape = DispatchShape(
        num_ranks=3, max_tokens=3, top_k=2, hidden=20, num_local_experts=2, int8=request.param
    )
    with DispatchWorld(shape) as world:
        yield world


def announce(world: DispatchWorld, writer: int, lane: int, event: Event, w2: int, w3: int) -> None:
    own = world.segments[0]
    cell = own.cell_offset(writer * world.shape.num_microbatches * 3 + lane)
    _native.write_cell(own.buf, cell, stamp(1, next(writes_so_far)), event.pack(), w2, w3)


@settings(max_examples=300, deadline=None)
@given(st.tuples(U64, U64), st.tuples(U64, U64), SCRIBBLES, SCRIBBLES, st.tuples(U64, U64), SCRIBBLES, I32)
def test_a_rank_of_a_group_survives_any_words(
    group: DispatchWorld,
    one: tuple[int, int],
    two: tuple[int, int],
    before: list[tuple[int, int]],
    later: list[tuple[int, int]],
    answers: tuple[int, int],
    after: list[tuple[int, int]],
    seed: int,
) -> None:
    side, shape, event = group.ranks[0], group.shape, Event(next(steps), 0)
    routed = group.routed(np.random.default_rng(abs(seed)), [3, 0, 0])[0]
    for writer, words, writes in ((1, one, before), (2, two, later)):
        announce(group, writer, event.step % 2, event, *words)
        scribble(group.segments[writer], writes, until=shape.offsets()[-1])
    now = Deadline.after_ms(0)
    try:
        result, handle = side.dispatch(routed.x, routed.topk_idx, event=event, deadline=now)
    except BusError:
        return
    assert len(result.x) == sum(result.expert_counts) <= shape.pairs_max
    for writer, words in ((1, answers[0]), (2, answers[1])):
        announce(group, writer, 2, event, words, 0)
        scribble(group.segments[writer], after, until=shape.offsets()[-1])
    with contextlib.suppress(BusError), np.errstate(all="ignore"):
        out = side.combine(result.y, routed.weights, handle, deadline=now)
        assert out.shape == routed.x.shape


@pytest.fixture(scope="module", params=[False, True], ids=["float32", "int8"])
def relays(request: pytest.FixtureRequest) -> Iterator[RelayWorld]:
    shape = RelayShape(
        num_attention_ranks=3, num_expert_ranks=2, rows_max=4, num_slots=2, hidden=20, int8=request.param
    )
    with RelayWorld(shape) as world:
        yield world


@settings(max_examples=250, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2**16), st.booleans(), U64, U64), max_size=6), SCRIBBLES, SCRIBBLES)
def test_an_expert_rank_survives_any_words(
    relays: RelayWorld,
    cells: list[tuple[int, bool, int, int]],
    sources: list[tuple[int, int]],
    others: list[tuple[int, int]],
) -> None:
    """Cells of attention ranks, of trampolines and of owners, for this exchange or any other."""
    shape, event = relays.shape, Event(next(steps), 0)
    rng = np.random.default_rng(event.step)
    x, ranks, experts = routing(rng, shape, 3)
    for index, route in ((0, Route.TRAMPOLINE), (1, Route.DIRECT)):
        relays.attention[index].a2e_send(x, ranks, experts, event, route)
        scribble(relays.segments[Rank("attention", index)], sources, until=shape.source_bytes)
    scribble(relays.segments[Rank("expert", 1)], others, until=shape.seat_result(shape.num_seats, 0))
    own = relays.segments[Rank("expert", 0)]
    errors: list[SegmentCorrupt] = []
    for place, is_this, w2, w3 in [(0, True, 0, 0), *cells]:
        cell = own.cell_offset(place % own.layout.num_cells)
        event_id = event.pack() if is_this else w3
        _native.write_cell(own.buf, cell, stamp(1, next(writes_so_far)), event_id, w2, w3)
        own.ring_doorbell()
        for arrival in relays.experts[0].poll(errors.append):
            assert len(arrival.y) == len(arrival.pair_row) <= shape.pairs_max
            with np.errstate(all="ignore"):
                work(arrival)
            relays.experts[0].commit(arrival)


@settings(max_examples=250, deadline=None)
@given(
    st.booleans(),
    st.lists(st.tuples(st.integers(0, 2**16), U64, st.one_of(st.none(), U64)), max_size=6),
    SCRIBBLES,
)
def test_an_attention_rank_survives_any_answer(
    relays: RelayWorld,
    direct: bool,
    answers: list[tuple[int, int, int | None]],
    results: list[tuple[int, int]],
) -> None:
    shape, event = relays.shape, Event(next(steps), 0)
    x, ranks, experts = routing(np.random.default_rng(event.step), shape, 4)
    side, own = relays.attention[2], relays.segments[Rank("attention", 2)]
    before = side.stats()["a2e_cell_writes"]
    handle = side.a2e_send(x, ranks, experts, event, Route.DIRECT if direct else Route.TRAMPOLINE)
    echoes = [stamp(1, count + 1) for count in range(before, side.stats()["a2e_cell_writes"])]
    out = np.zeros((4, shape.num_slots, shape.hidden), np.float32)
    for expert in range(shape.num_expert_ranks):
        scribble(relays.segments[Rank("expert", expert)], results, until=shape.seat_result(1, 0))
    for place, w2, echo in answers:
        cell = own.cell_offset(place % own.layout.num_cells)
        w3 = echoes[place % len(echoes)] if echo is None and echoes else echo or 0
        _native.write_cell(own.buf, cell, stamp(1, next(writes_so_far)), event.pack(), w2, w3)
        own.ring_doorbell()
        with contextlib.suppress(BusError), np.errstate(all="ignore"):
            if side.try_recv(handle, out):
                break
