"""Dispatch/combine in one process: contracts, late and lost peers, impossible words."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from bus.clock import Deadline
from bus.errors import EventMismatch, PeerDied, PeerStalled, SegmentCorrupt, Truncated, XcclError
from bus.memory import _native
from bus.xccl.dispatch_layout import DispatchResult, DispatchShape
from bus.xccl.endpoint import Rank
from bus.xccl.event import Event
from bus.xccl.reference import dispatch_combine, dispatch_combine_int8, dispatch_rows
from tests.harness.dispatch_world import (
    DispatchWorld,
    Routed,
    expert_product,
    fill,
    fill_int8,
    int8_product,
)

SHAPE = DispatchShape(num_ranks=3, max_tokens=4, top_k=2, hidden=6, num_local_experts=2, num_microbatches=2)
BLOCK, X_AT, _, STARTS_AT, PAIR_ROW_AT, Y_START_AT, _, Y_AT = SHAPE.offsets()


@pytest.fixture
def world() -> Iterator[DispatchWorld]:
    with DispatchWorld(SHAPE) as world:
        yield world


@pytest.fixture
def inputs(world: DispatchWorld) -> list[Routed]:
    return world.routed(np.random.default_rng(5), [4, 3, 4], none_share=0.0)


def soon() -> Deadline:
    return Deadline.after_ms(40)


def publish(world: DispatchWorld, inputs: list[Routed], rank: int, event: Event) -> None:
    """The part of a dispatch that others see."""
    world.ranks[rank]._stage(inputs[rank].x, inputs[rank].topk_idx, event)
    world.ranks[rank]._announce(event)


def twin(inputs: list[Routed]) -> list[np.ndarray]:
    return dispatch_combine(
        [i.x for i in inputs], [i.topk_idx for i in inputs], [i.weights for i in inputs], expert_product
    )


def test_rows_arrive_grouped_by_expert_in_source_order(world: DispatchWorld) -> None:
    # Payloads that testify: the sender's rank, then the token.
    inputs = []
    for rank in range(3):
        x = np.array([[rank, token, 0, 0, 0, 0] for token in range(2)], np.float32)
        inputs.append(Routed(x, np.array([[3, 2], [2, -1]], np.int32), np.ones((2, 2), np.float32)))
    (_, none), (result, _), (last, _) = [r[0:2] for r in world.exchange(inputs, Event(1, 0))]
    assert none.shape == (2, 6) and last.x.shape == (0, 6)
    assert result.expert_counts.tolist() == [6, 3]
    assert result.x[:, :2].tolist() == [[r, t] for r in range(3) for t in range(2)] + [
        [r, 0] for r in range(3)
    ]


def test_no_tokens_anywhere_is_a_normal_exchange(world: DispatchWorld) -> None:
    for step in range(1, 4):
        inputs = world.routed(np.random.default_rng(1), [0, 0, 0])
        for result, out in world.exchange(inputs, Event(step, 0)):
            assert result.x.shape == (0, 6) and out.shape == (0, 6)


def test_rows_written_in_place_need_no_copy(world: DispatchWorld, inputs: list[Routed]) -> None:
    for rank, routed in enumerate(inputs):
        rows = world.ranks[rank].input_rows(0)[: len(routed.x)]
        rows[:] = routed.x
        routed.x = rows
    outs = world.exchange(inputs, Event(1, 0))
    assert all(out.tobytes() == t.tobytes() for (_, out), t in zip(outs, twin(inputs), strict=True))


def test_int8_has_no_rows_to_write_in_place() -> None:
    shape = DispatchShape(num_ranks=1, max_tokens=1, top_k=1, hidden=2, num_local_experts=1, int8=True)
    with DispatchWorld(shape) as world, pytest.raises(ValueError, match="INT8"):
        world.ranks[0].input_rows(0)


INT8 = replace(SHAPE, int8=True, deliver_int8=True)


@pytest.mark.parametrize("kind", [{}, {"int8": True}, {"int8": True, "deliver_int8": True}])
def test_results_may_take_the_place_of_the_rows(kind: dict[str, bool]) -> None:
    with DispatchWorld(replace(SHAPE, in_place=True, **kind)) as world:
        inputs, event = world.routed(np.random.default_rng(3), [4, 2, 3]), Event(1, 0)

        def one(rank: int) -> None:
            side, deadline = world.ranks[rank], Deadline.after_ms(9_000)
            dispatch = side.dispatch_int8 if world.shape.deliver_int8 else side.dispatch
            result, handle = dispatch(inputs[rank].x, inputs[rank].topk_idx, event=event, deadline=deadline)
            assert result.x.ctypes.data == result.y.ctypes.data
            side.combine(result.y, inputs[rank].weights, handle, deadline=deadline)

        world.each(one)


def test_int8_is_delivered_only_where_it_travels() -> None:
    with pytest.raises(ValueError, match="deliver_int8: True needs int8=True"):
        replace(SHAPE, deliver_int8=True)


@pytest.mark.parametrize("shape", [SHAPE, INT8])
def test_the_form_that_the_shape_does_not_say_is_refused(shape: DispatchShape) -> None:
    with DispatchWorld(shape) as world:
        side = world.ranks[0]
        wrong = side.dispatch if shape.deliver_int8 else side.dispatch_int8
        with pytest.raises(ValueError, match="deliver_int8"):
            wrong(
                np.zeros((1, 6), np.float32), np.zeros((1, 2), np.int32), event=Event(1, 0), deadline=soon()
            )
        assert side.stats()["cell_writes"] == 0


def test_int8_rows_must_be_filled_in_place() -> None:
    with DispatchWorld(INT8) as world:
        inputs = world.routed(np.random.default_rng(3), [4, 3, 4], none_share=0.0)

        def combine(rank: int) -> np.ndarray:
            side, routed, deadline = world.ranks[rank], inputs[rank], Deadline.after_ms(9_000)
            result, handle = side.dispatch_int8(
                routed.x, routed.topk_idx, event=Event(1, 0), deadline=deadline
            )
            with pytest.raises(ValueError, match="filled in place"):
                side.combine(result.y.copy(), routed.weights, handle, deadline=deadline)
            with pytest.raises(ValueError, match="y: float32"):
                side.combine(result.y.astype(np.float32), routed.weights, handle, deadline=deadline)
            fill_int8(result, rank, INT8.num_local_experts)
            return side.combine(result.y, routed.weights, handle, deadline=deadline)

        expected = dispatch_combine_int8(
            [i.x for i in inputs], [i.topk_idx for i in inputs], [i.weights for i in inputs], int8_product
        )
        for out, wanted in zip(world.each(combine), expected, strict=True):
            assert out.tobytes() == wanted.tobytes()


def test_ranks_that_widen_and_ranks_that_do_not_are_one_group() -> None:
    # Delivery concerns nobody else: the bytes in shared memory are the same.
    with DispatchWorld(INT8) as world:
        inputs = world.routed(np.random.default_rng(4), [4, 3, 4], none_share=0.0)
        world.shape = replace(INT8, deliver_int8=False)
        world.ranks[0].close()
        world.ranks[0] = world.open(0)

        def one(rank: int) -> tuple[object, np.ndarray]:
            exchange = world.one if rank == 0 else world.one_int8
            return exchange(rank, inputs[rank], Event(1, 0))

        (first, _), *_ = world.each(one)
        rows, counts = dispatch_rows([i.x for i in inputs], [i.topk_idx for i in inputs], 2, int8=True)[0]
        assert isinstance(first, DispatchResult)
        assert first.x.tobytes() == rows.tobytes() and np.array_equal(first.expert_counts, counts)


def test_microbatches_are_in_flight_together(world: DispatchWorld, inputs: list[Routed]) -> None:
    def both(rank: int) -> list[np.ndarray]:
        side, opened = world.ranks[rank], []
        for microbatch in range(2):
            event = Event(1, 0, microbatch)
            opened.append(
                side.dispatch(
                    inputs[rank].x,
                    inputs[rank].topk_idx,
                    event=event,
                    deadline=Deadline.after_ms(9_000),
                )
            )
        outs = []
        for result, handle in opened:
            fill(result, rank, SHAPE.num_local_experts)
            outs.append(
                side.combine(result.y, inputs[rank].weights, handle, deadline=Deadline.after_ms(9_000))
            )
        return outs

    for outs, expected in zip(world.each(both), twin(inputs), strict=True):
        assert all(out.tobytes() == expected.tobytes() for out in outs)


def test_a_rank_may_be_one_exchange_ahead_of_a_rank_that_it_needs_nothing_from(world: DispatchWorld) -> None:
    x, none = np.ones((1, 6), np.float32), np.full((1, 2), -1, np.int32)
    fast, others = world.ranks[0], world.ranks[1:]
    for side in others:
        side._stage(x, none, Event(1, 0))
        side._announce(Event(1, 0))
    _, handle = fast.dispatch(x, none, event=Event(1, 0), deadline=soon())
    fast.combine(np.empty((0, 6), np.float32), np.ones((1, 2), np.float32), handle, deadline=soon())
    with pytest.raises(PeerStalled, match="expert-1,expert-2"):
        fast.dispatch(x, none, event=Event(2, 0), deadline=soon())
    # The others have seen neither of its counts yet: both must still be there.
    for side in others:
        assert side._native.receive(0, soon().at_ns) in (0, -2)
        assert side._native.states(0)[0] == 0


def test_more_tokens_than_the_block_holds_are_refused(world: DispatchWorld) -> None:
    with pytest.raises(Truncated, match="max_tokens=4"):
        world.ranks[0].dispatch(
            np.zeros((5, 6), np.float32), np.zeros((5, 2), np.int32), event=Event(1, 0), deadline=soon()
        )


@pytest.mark.parametrize(
    ("x", "idx", "microbatch", "text"),
    [
        (np.zeros((1, 6)), np.zeros((1, 2), np.int32), 0, "x: float64"),
        (np.zeros((1, 5), np.float32), np.zeros((1, 2), np.int32), 0, r"\[n, 6\]"),
        (np.zeros((1, 6), np.float32), np.zeros((2, 2), np.int32), 0, r"\[n, 2\]"),
        (np.zeros((1, 6), np.float32), np.zeros((1, 2)), 0, "topk_idx: float64"),
        (np.zeros((1, 6), np.float32), np.full((1, 2), 6, np.int32), 0, "outside -1..5"),
        (np.zeros((1, 6), np.float32), np.full((1, 2), -2, np.int32), 0, "outside -1..5"),
        (np.zeros((1, 6), np.float32), np.zeros((1, 2), np.int32), 2, "must be below 2"),
    ],
)
def test_bad_input_is_refused_before_anything_is_sent(
    world: DispatchWorld, x: np.ndarray, idx: np.ndarray, microbatch: int, text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        world.ranks[0].dispatch(x, idx, event=Event(1, 0, microbatch), deadline=soon())
    assert world.ranks[0].stats()["cell_writes"] == 0


def test_a_handle_serves_one_combine(world: DispatchWorld, inputs: list[Routed]) -> None:
    def twice(rank: int) -> None:
        side = world.ranks[rank]
        deadline = Deadline.after_ms(9_000)
        result, handle = side.dispatch(
            inputs[rank].x, inputs[rank].topk_idx, event=Event(1, 0), deadline=deadline
        )
        with pytest.raises(ValueError, match="y: "):
            side.combine(result.y[1:], inputs[rank].weights, handle, deadline=deadline)
        side.combine(result.y, inputs[rank].weights, handle, deadline=deadline)
        with pytest.raises(ValueError, match="not the open exchange"):
            side.combine(result.y, inputs[rank].weights, handle, deadline=deadline)

    world.each(twice)


def test_the_silent_are_named(world: DispatchWorld, inputs: list[Routed]) -> None:
    publish(world, inputs, 2, Event(1, 0))
    with pytest.raises(PeerStalled, match="peer expert-1,"):
        world.ranks[0].dispatch(inputs[0].x, inputs[0].topk_idx, event=Event(1, 0), deadline=soon())


def test_the_dead_are_named_and_their_next_incarnation_joins_the_next_attempt(
    world: DispatchWorld, inputs: list[Routed]
) -> None:
    world.segments[1].close()
    for rank in (0, 2):
        with pytest.raises(PeerDied, match="peer expert-1,"):
            world.ranks[rank].dispatch(
                inputs[rank].x, inputs[rank].topk_idx, event=Event(1, 0), deadline=Deadline.after_ms(9_000)
            )
    world.segments[1].unlink()
    world.ranks[1].close()
    world.segments[1] = world.create_segment(1, 2)
    for table in world.tables:
        assert table.learn(Rank("expert", 1), 2, world.segments[1].name)
        assert not table.learn(Rank("expert", 1), 1, "/xds-older")
    world.ranks[1] = world.open(1)
    outs = world.exchange(inputs, Event(1, 0, attempt=2))
    assert all(out.tobytes() == t.tobytes() for (_, out), t in zip(outs, twin(inputs), strict=True))


def test_a_rank_that_moved_on_is_not_waited_for(world: DispatchWorld, inputs: list[Routed]) -> None:
    for rank in (1, 2):
        publish(world, inputs, rank, Event(1, 0, attempt=2))
    with pytest.raises(EventMismatch, match="expert-1,expert-2"):
        world.ranks[0].dispatch(
            inputs[0].x, inputs[0].topk_idx, event=Event(1, 0), deadline=Deadline.after_ms(9_000)
        )


def late(
    world: DispatchWorld, inputs: list[Routed], rank: int, event: Event
) -> tuple[type[BaseException], str]:
    """Exchange on a rank that comes late; return the error and whom it names."""
    with pytest.raises(XcclError) as caught:
        world.one(rank, inputs[rank], event)
    return caught.type, caught.value.peer


@pytest.mark.parametrize("is_announced", [True, False])
def test_rows_that_were_withdrawn_are_not_taken(
    world: DispatchWorld, inputs: list[Routed], is_announced: bool
) -> None:
    """Rank 1 has staged the next event, with other rows, when the others come to the one that it gave up."""
    with pytest.raises(PeerStalled, match="peer expert-0,expert-2"):
        world.ranks[1].dispatch(inputs[1].x, inputs[1].topk_idx, event=Event(1, 0), deadline=soon())
    world.ranks[1]._stage(inputs[1].x[::-1].copy(), inputs[1].topk_idx, Event(1, 0, attempt=2))
    if is_announced:
        world.ranks[1]._announce(Event(1, 0, attempt=2))
    found = world.each(lambda r: late(world, inputs, r, Event(1, 0)) if r != 1 else None)
    assert found == [(EventMismatch, "expert-1"), None, (EventMismatch, "expert-1")]


def test_an_answer_that_will_not_come_is_not_waited_for(world: DispatchWorld, inputs: list[Routed]) -> None:
    """Rank 1 leaves between dispatch and combine, the others have gone on to wait for its rows."""

    def one(rank: int) -> tuple[type[BaseException], str] | None:
        if rank != 1:
            return late(world, inputs, rank, Event(1, 0))
        deadline = Deadline.after_ms(9_000)
        world.ranks[1].dispatch(inputs[1].x, inputs[1].topk_idx, event=Event(1, 0), deadline=deadline)
        world.ranks[1]._stage(inputs[1].x, inputs[1].topk_idx, Event(1, 0, attempt=2))
        return None

    assert world.each(one) == [(EventMismatch, "expert-1"), None, (EventMismatch, "expert-1")]


def test_an_unknown_rank_is_named(world: DispatchWorld, inputs: list[Routed]) -> None:
    world.tables[0]._addresses.pop(Rank("expert", 2))
    with pytest.raises(PeerDied, match=r"no address is known .* peer expert-2"):
        world.ranks[0].dispatch(inputs[0].x, inputs[0].topk_idx, event=Event(1, 0), deadline=soon())


def publish_all(world: DispatchWorld, inputs: list[Routed]) -> None:
    for rank in (1, 2):
        publish(world, inputs, rank, Event(1, 0))


@pytest.mark.parametrize(
    ("extent", "tokens"),
    [(1 << 40 | 1, 4), (9, 4), (1, 5), (7 << 32 | 2, 4), ((1 << 64) - 1, (1 << 64) - 1), (3, 4)],
)
def test_impossible_counts_raise(
    world: DispatchWorld, inputs: list[Routed], extent: int, tokens: int
) -> None:
    publish_all(world, inputs)
    own = world.segments[0]
    stamp = 1 << 40 | 99
    cell = own.cell_offset((1 * SHAPE.num_microbatches + 0) * 3)
    _native.write_cell(own.buf, cell, stamp, Event(1, 0).pack(), extent, tokens)
    with pytest.raises(SegmentCorrupt, match="expert-1"):
        world.ranks[0].dispatch(inputs[0].x, inputs[0].topk_idx, event=Event(1, 0), deadline=soon())


@pytest.mark.parametrize("word", [-1, 9, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("place", [STARTS_AT, STARTS_AT + 4, STARTS_AT + 8, PAIR_ROW_AT])
def test_impossible_starts_and_rows_raise(
    world: DispatchWorld, inputs: list[Routed], place: int, word: int
) -> None:
    for routed in inputs:
        routed.topk_idx[:, 0] = 0
    publish_all(world, inputs)
    peer = world.segments[1]
    peer.array(peer.layout.managed_offset + place, (1,), np.int32)[0] = word
    with pytest.raises(SegmentCorrupt, match="expert-1"):
        world.ranks[0].dispatch(inputs[0].x, inputs[0].topk_idx, event=Event(1, 0), deadline=soon())


@pytest.mark.parametrize("word", [-1, SHAPE.pairs_max, 2**31 - 1, -(2**31)])
def test_an_impossible_place_of_an_answer_raises(
    world: DispatchWorld, inputs: list[Routed], word: int
) -> None:
    inputs[0].topk_idx[:] = 2
    deadline = Deadline.after_ms(9_000)

    def combine(rank: int) -> None:
        side = world.ranks[rank]
        result, handle = side.dispatch(
            inputs[rank].x, inputs[rank].topk_idx, event=Event(1, 0), deadline=deadline
        )
        if rank == 1:
            own = world.segments[1]
            own.array(own.layout.managed_offset + Y_START_AT, (1,), np.int32)[0] = word
        side.combine(result.y, inputs[rank].weights, handle, deadline=deadline)

    with pytest.raises(SegmentCorrupt, match="expert-1"):
        world.each(combine)


def test_a_segment_of_another_shape_is_refused(world: DispatchWorld, inputs: list[Routed]) -> None:
    other = DispatchShape(num_ranks=3, max_tokens=1, top_k=1, hidden=1, num_local_experts=1)
    with DispatchWorld(other) as stranger:
        world.tables[0].learn(Rank("expert", 1), 2, stranger.segments[1].name)
        with pytest.raises(SegmentCorrupt, match="do not fit its segment"):
            world.ranks[0].dispatch(inputs[0].x, inputs[0].topk_idx, event=Event(1, 0), deadline=soon())
        world.tables[0].forget(Rank("expert", 1))


def test_work_is_counted(world: DispatchWorld, inputs: list[Routed]) -> None:
    world.exchange(inputs, Event(1, 0))
    stats = [side.stats() for side in world.ranks]
    assert [s["dispatches"] for s in stats] == [s["combines"] for s in stats] == [1, 1, 1]
    assert sum(s["rows_sent"] for s in stats) == sum(s["rows_received"] for s in stats) == 22
    assert all(2 <= s["cell_writes"] <= 4 for s in stats)
