"""The row functions of the extension: what they do, and that nothing out of bounds is ever touched."""

from __future__ import annotations

import mmap
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from bus.memory import _collectives, _native
from bus.xccl.dispatch_layout import DispatchShape

SHAPE = DispatchShape(num_ranks=2, max_tokens=3, top_k=2, hidden=4, num_local_experts=2)
NATIVE_SHAPE = (0, 2, 3, 2, 4, 2, 1, False, False)
ERRORS = (ValueError, IndexError, TypeError, LookupError, RuntimeError, OverflowError, BufferError)


def make_exchange() -> tuple[_collectives.Exchange, bytearray, bytearray]:
    layout = SHAPE.layout()
    exchange = _collectives.Exchange(NATIVE_SHAPE, SHAPE.offsets(), 0, 1_000)
    exchange.bind(0, np.zeros((SHAPE.pairs_max, SHAPE.hidden), np.float32), None)
    segments = bytearray(layout.total_bytes), bytearray(layout.total_bytes)
    for rank, segment in enumerate(segments):
        exchange.set_peer(rank, segment, 1, layout.cells_offset, layout.managed_offset)
    return exchange, *segments


def test_partition_is_stable_and_leaves_out_the_negative() -> None:
    group = np.array([2, 0, -1, 2, 0], np.int32)
    order, starts = np.full(5, 99, np.int32), np.empty(4, np.int32)
    assert _collectives.partition(group, 3, order, starts) == 4
    assert order.tolist() == [1, 4, 0, 3, 99] and starts.tolist() == [0, 2, 2, 4]


@pytest.mark.parametrize("width", [1, 4, 127, 128, 129, 4096, 8192])
@pytest.mark.parametrize("phase", [0, 16, 2032, 4080])
def test_rows_are_scattered_and_gathered_whole(width: int, phase: int) -> None:
    rng = np.random.default_rng(width)
    src = rng.integers(0, 255, (5, width), np.uint8)
    room = np.zeros(5 * width + 8192, np.uint8)
    dst = room[phase : phase + 5 * width].reshape(5, width)
    index = np.array([4, 0, 3, 1, 2], np.int32)
    _collectives.scatter_rows(dst, index, src, width)
    assert np.array_equal(dst[index], src) and room[phase + 5 * width :].max() == 0
    _collectives.gather_rows(dst, index, src, width)
    assert np.array_equal(dst, src[index]) and room[:phase].max(initial=0) == 0


@pytest.mark.parametrize("bad", [-1, 5, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("move", [_collectives.scatter_rows, _collectives.gather_rows])
def test_rows_outside_are_refused(move: Callable[..., None], bad: int) -> None:
    dst, index = np.zeros((5, 8), np.uint8), np.array([0, bad], np.int32)
    with pytest.raises(IndexError, match="index: row"):
        move(dst, index, np.ones((5, 8), np.uint8), 8)
    assert not dst.any()


@pytest.mark.parametrize("width", [1, 4, 7, 64, 130])
def test_a_weighted_sum_adds_in_slot_order(width: int) -> None:
    rng = np.random.default_rng(width)
    src, weights = rng.standard_normal((6, width), np.float32), rng.random((4, 3), np.float32)
    index = np.array([[5, 0, 2], [-1, 1, 1], [3, -1, -1], [-1, -1, -1]], np.int32)
    out, wanted = np.full((4, width), np.nan, np.float32), np.zeros((4, width), np.float32)
    for row, slot in np.ndindex(index.shape):
        if index[row, slot] >= 0:
            wanted[row] += weights[row, slot] * src[index[row, slot]]
    _collectives.weighted_sum(out, src, index, weights, 4, 3, width)
    assert out.tobytes() == wanted.tobytes()


def test_a_weighted_sum_refuses_rows_outside_and_short_buffers() -> None:
    src, weights, out = np.ones((2, 8), np.float32), np.ones((1, 2), np.float32), np.zeros((1, 8), np.float32)
    with pytest.raises(IndexError, match=r"index: row 2 is outside 0\.\.1"):
        _collectives.weighted_sum(out, src, np.array([0, 2], np.int32), weights, 1, 2, 8)
    with pytest.raises(ValueError, match="index: 4 bytes are too few"):
        _collectives.weighted_sum(out, src, np.array([0], np.int32), weights, 1, 2, 8)
    with pytest.raises(IndexError, match="top_k: 65"):
        _collectives.weighted_sum(out, src, np.zeros(65, np.int32), weights, 1, 65, 8)
    assert not out.any()


@pytest.mark.parametrize("width", [1, 4, 7, 64, 130])
def test_a_weighted_sum_of_int8_rows_equals_that_of_what_they_mean(width: int) -> None:
    rng = np.random.default_rng(width)
    q, scale = rng.integers(-127, 128, (6, width), np.int8), rng.random((6, 1), np.float32)
    rows = np.concatenate([q.view(np.uint8), scale.view(np.uint8)], axis=1)
    index = np.array([[5, 0, 2], [-1, 1, 1], [-1, -1, -1]], np.int32)
    weights = rng.random((3, 3), np.float32)
    out, wanted = np.full((3, width), np.nan, np.float32), np.empty((3, width), np.float32)
    _collectives.weighted_sum(wanted, q.astype(np.float32) * scale, index, weights, 3, 3, width)
    _collectives.weighted_sum_int8(out, rows, index, weights, 3, 3, width)
    assert out.tobytes() == wanted.tobytes()
    with pytest.raises(IndexError, match=r"index: row 5 is outside 0\.\.4"):
        _collectives.weighted_sum_int8(out, rows[:5], index, weights, 3, 3, width)


def test_what_delivers_int8_needs_scales_and_int8_transport() -> None:
    exchange = _collectives.Exchange((*NATIVE_SHAPE[:-2], True, True), SHAPE.offsets(), 0, 1_000)
    rows = np.zeros((SHAPE.pairs_max, SHAPE.hidden), np.int8)
    with pytest.raises(TypeError):
        exchange.bind(0, rows, None)
    with pytest.raises(ValueError, match="scales: 4 bytes are too few"):
        exchange.bind(0, rows, np.zeros(1, np.float32))
    exchange.bind(0, rows, np.zeros(SHAPE.pairs_max, np.float32))
    with pytest.raises(ValueError, match="only INT8 transport"):
        _collectives.Exchange((*NATIVE_SHAPE[:-2], False, True), SHAPE.offsets(), 0, 1_000)


def test_a_scan_returns_what_was_written_since() -> None:
    buf, seen, at = mmap.mmap(-1, 4096), np.zeros(3, np.uint64), 128
    _native.write_cell(buf, at + 64, 7, 1, 2, 2**64 - 1)
    assert _collectives.scan_cells(buf, at, 3, seen) == [(1, 7, 1, 2, 2**64 - 1)]
    assert _collectives.scan_cells(buf, at, 3, seen) == []
    with pytest.raises(ValueError, match="too few"):
        _collectives.scan_cells(buf, at, 100, seen)
    with pytest.raises(ValueError, match="not aligned"):
        _collectives.scan_cells(buf, at + 8, 1, seen)


@pytest.mark.parametrize("place", range(8))
def test_offsets_that_leave_the_block_are_refused(place: int) -> None:
    offsets = list(SHAPE.offsets())
    offsets[place] = 64 if place == 0 else offsets[0]
    with pytest.raises(ValueError, match="leaves the block"):
        _collectives.Exchange(NATIVE_SHAPE, tuple(offsets), 0, 0)


def test_a_segment_that_is_too_small_is_refused() -> None:
    exchange, segment, _ = make_exchange()
    layout = SHAPE.layout()
    with pytest.raises(ValueError, match="do not fit its segment"):
        exchange.set_peer(1, segment[:-4096], 1, layout.cells_offset, layout.managed_offset)


def test_a_rank_that_is_not_connected_is_named() -> None:
    exchange, _, _ = make_exchange()
    exchange.drop_peer(1)
    with pytest.raises(LookupError, match="rank 1 is not connected"):
        exchange.announce(0)


def test_a_call_in_the_wrong_phase_is_refused() -> None:
    exchange, _, _ = make_exchange()
    for call in (exchange.announce, lambda microbatch: exchange.receive(microbatch, 0)):
        with pytest.raises(ValueError, match="is in phase 0"):
            call(0)
    rows = np.zeros((0, 4), np.float32)
    assert exchange.combine(0, 1, rows, np.zeros((0, 2), np.float32), rows, 0) == -1


@pytest.mark.parametrize(
    "event", [(1, 0, 0, 0), (1, 4096, 0, 1), (1, 0, 1, 1), (1, 0, -1, 1), (1, 0, 0), 7, ("1", 0, 0, 1)]
)
def test_an_event_out_of_range_is_refused(event: Any) -> None:
    exchange, _, _ = make_exchange()
    x, idx = np.zeros((1, 4), np.float32), np.zeros((1, 2), np.int32)
    assert exchange.stage((1, 0, 0, 1), x, idx) == 0
    assert exchange.stage(event, x, idx) == -1


def test_a_batch_is_routed_as_dispatch_does_it() -> None:
    topk = np.array([[2, 0], [-1, 2], [0, 1]], np.int32)
    position, pair_row, starts = np.empty((3, 2), np.int32), np.empty(6, np.int32), np.empty(4, np.int32)
    assert _collectives.route(topk, 2, 3, position, starts, pair_row) == 5
    assert position.tolist() == [[3, 0], [-1, 4], [1, 2]]
    assert starts.tolist() == [0, 2, 3, 5] and pair_row[:5].tolist() == [0, 2, 2, 0, 1]
    with pytest.raises(ValueError, match=r"outside -1\.\.1"):
        _collectives.route(topk, 2, 2, position, starts, pair_row)


def test_no_segment_content_makes_a_call_touch_what_it_should_not() -> None:
    """Fuzz: random words in all segments and in the arguments. Errors are fine, crashes are not."""
    rng = random.Random(11)
    exchange, own, peer = make_exchange()
    layout = SHAPE.layout()
    words = [0, 1, 2, 3, 5, 6, 7, -1, -2, 2**31 - 1, -(2**31), 1 << 16]
    extents = [0, 1, 6, 7, 1 << 32, 3 << 32 | 3, 2**64 - 1, 2**63, 12]
    reached: set[int] = set()
    for step in range(1, 6_000):
        for segment in (own, peer):
            view = np.frombuffer(segment, np.int32)
            for _ in range(rng.randrange(4)):
                view[rng.randrange(1024, len(view))] = rng.choice(words)
        tokens = rng.randrange(0, 4)
        x = np.zeros((tokens, 4), np.float32)
        topk = np.array([rng.choice([-1, 0, 1, 2, 3]) for _ in range(2 * tokens)], np.int32).reshape(-1, 2)
        event_id = step << 32 | 1
        # The peer announces counts that may be right, and answers what may be right.
        cell = layout.cells_offset + 3 * 64
        plausible = rng.randrange(4) << 32 | rng.randrange(4)
        extent = plausible if rng.random() < 0.8 else rng.choice(extents)
        for lane in range(2):
            _native.write_cell(own, cell + lane * 64, 1 << 40 | step, event_id, extent, rng.randrange(5))
        answer = rng.randrange(7)
        _native.write_cell(own, cell + 128, 1 << 40 | step, event_id, answer, 0)
        try:
            rows = exchange.dispatch((step, 0, 0, 1), x, topk, 0)
            reached.add(min(rows, 1))
            y = np.zeros((max(rows, 0), 4), np.float32)
            reached.add(10 + exchange.combine(0, event_id, y, np.zeros((tokens, 2), np.float32), x, 0))
        except ERRORS:
            continue
    assert reached >= {0, 1, -4, 10, 6}, reached
