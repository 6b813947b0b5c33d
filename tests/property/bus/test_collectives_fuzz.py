"""Peers that scribble, in dispatch/combine: any words in their cells and blocks raise or are delivered, within bounds.

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
from bus.errors import BusError
from bus.memory import _native
from bus.memory.segment import Segment
from bus.xccl.alltoall import AllToAllShape
from bus.xccl.dispatch import DispatchShape
from bus.xccl.endpoint import stamp
from bus.xccl.event import Event
from tests.harness.alltoall_world import AllToAllWorld
from tests.harness.dispatch_world import DispatchWorld

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


LANES = 3  # of a writer; the groups below have one microbatch
steps, writes_so_far = itertools.count(1), itertools.count(1000)


@pytest.fixture(scope="module", params=[(False, False), (True, False), (True, True)], ids=str)
def group(request: pytest.FixtureRequest) -> Iterator[DispatchWorld]:
    int8, deliver_int8 = request.param
    shape = DispatchShape(
        num_ranks=3,
        max_tokens=3,
        top_k=2,
        hidden=20,
        num_local_experts=2,
        int8=int8,
        deliver_int8=deliver_int8,
    )
    with DispatchWorld(shape) as world:
        yield world


def announce(segment: Segment, writer: int, lane: int, event_id: int, w2: int, w3: int) -> None:
    cell = segment.cell_offset(writer * LANES + lane)
    _native.write_cell(segment.buf, cell, stamp(1, next(writes_so_far)), event_id, w2, w3)


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
        announce(group.segments[0], writer, event.step % 2, event.pack(), *words)
        scribble(group.segments[writer], writes, until=shape.offsets()[-1])
    now = Deadline.after_ms(0)
    try:
        dispatch = side.dispatch_int8 if shape.deliver_int8 else side.dispatch
        result, handle = dispatch(routed.x, routed.topk_idx, event=event, deadline=now)
    except BusError:
        return
    assert len(result.x) == sum(result.expert_counts) <= shape.pairs_max
    for writer, words in ((1, answers[0]), (2, answers[1])):
        announce(group.segments[0], writer, 2, event.pack(), words, 0)
        scribble(group.segments[writer], after, until=shape.offsets()[-1])
    with contextlib.suppress(BusError), np.errstate(all="ignore"):
        out = side.combine(result.y, routed.weights, handle, deadline=now)
        assert out.shape == routed.x.shape


# ------------------------------------------------------------------ the plain all-to-all


PLAIN = AllToAllShape(num_ranks=3, stage_bytes=128, area_bytes=256)
PLACES = st.one_of(
    st.integers(0, 2 * PLAIN.half_bytes + 256),
    st.integers(0, 64).map(lambda below: 2 * PLAIN.half_bytes + 256 - below),
    U64,
)
SAID = st.tuples(
    st.integers(0, LANES - 1),
    st.sampled_from([0, 0, 0, 0, -1, 1, 2**40]),  # added to the event id
    st.tuples(PLACES, st.booleans()).map(
        lambda place: place[0] | place[1] << 63
    ),  # with and without an answer
    st.one_of(st.sampled_from([0, 4, 8, 12]), st.integers(0, 300), U64),
)


@pytest.fixture(scope="module")
def plain() -> Iterator[tuple[AllToAllWorld, set[str]]]:
    """A group, and what has become of its exchanges."""
    outcomes: set[str] = set()
    with AllToAllWorld(PLAIN) as world:
        yield world, outcomes
    assert outcomes >= {"whole", "SegmentCorrupt"}


@settings(max_examples=600, deadline=None)
@given(
    st.tuples(*[st.lists(SAID, min_size=1, max_size=3)] * 2),
    st.booleans(),
    st.booleans(),
    st.sampled_from([1, 4]),
    SCRIBBLES,
)
def test_a_rank_of_an_all_to_all_survives_any_words(
    plain: tuple[AllToAllWorld, set[str]],
    said: tuple[list[tuple[int, int, int, int]], ...],
    in_area: bool,
    has_out: bool,
    width: int,
    writes: list[tuple[int, int]],
) -> None:
    """What is delivered are the bytes that a cell of this event names; nothing beyond a segment is read."""
    (world, outcomes), event = plain, Event(next(steps), 0)
    side = world.ranks[0]
    rows = side.area((3, width), np.uint8) if in_area else np.zeros((3, width), np.uint8)
    named: dict[int, list[bytes]] = {1: [], 2: []}
    for writer, words in zip(named, said, strict=True):
        giver = world.segments[writer]
        scribble(giver, writes, until=2 * PLAIN.half_bytes + 256)
        for lane, later, place, size in words:
            event_id = (event.pack() + later) % 2**64
            announce(world.segments[0], writer, lane, event_id, place, size)
            begin = giver.layout.managed_offset + place % 2**63
            if event_id == event.pack() and size <= 2**20 and begin < giver.layout.total_bytes:
                named[writer].append(bytes(giver.buf[begin : begin + size]))
    try:
        out = np.zeros((1000, width), np.uint8) if has_out else None
        came, counts = side.exchange(
            rows, np.array([1, 1, 1]), event=event, deadline=Deadline.after_ms(0), out=out
        )
    except BusError as error:
        outcomes.add(type(error).__name__)
        return
    outcomes.add("whole")
    parts = np.split(came, np.cumsum(counts)[:-1])
    assert counts[0] == 1
    for writer, pieces in named.items():
        assert parts[writer].tobytes() in pieces
