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
from bus.xccl.dispatch import DispatchShape
from bus.xccl.endpoint import stamp
from bus.xccl.event import Event
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
