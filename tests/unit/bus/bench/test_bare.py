"""Bare loops: what the machine does to anybody."""

from __future__ import annotations

import mmap
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from bus.bench.bare import unevenness
from bus.memory import _native

TIMEOUT_NS = 30_000_000_000


def test_two_sides_compute_and_meet() -> None:
    """Nobody is a round ahead: side 1 computes for longer, and side 0 waits for it."""
    buf, durations = mmap.mmap(-1, 4096), [np.zeros(50, np.uint64) for _ in range(2)]
    steps = (1, 200_000)
    with ThreadPoolExecutor(2) as pool:
        done = [
            pool.submit(_native.bench_meet, buf, 128, side, steps[side], 7, durations[side], TIMEOUT_NS)
            for side in (0, 1)
        ]
        assert [future.result(60) for future in done] == [True, True]
    alone = min(_native.bench_compute(steps[1]) for _ in range(10))
    assert all(
        found.sum() >= 0.5 * 50 * alone for found in durations
    )  # of one: the other may have been interrupted
    flags = np.frombuffer(buf, np.uint64)
    assert (flags[128 // 8], flags[256 // 8]) == (57, 57)


def test_a_silent_side_is_noticed_and_bad_buffers_are_refused() -> None:
    buf, durations = mmap.mmap(-1, 4096), np.zeros(2, np.uint64)
    assert not _native.bench_meet(buf, 0, 0, 1, 0, durations, 1_000_000)
    for offset in (64, 4096 - 128, 4096):
        with pytest.raises(ValueError, match="too small or unaligned"):
            _native.bench_meet(buf, offset, 0, 1, 0, durations, 1_000_000)
    with pytest.raises(ValueError, match="side"):
        _native.bench_meet(buf, 0, 2, 1, 0, durations, 1_000_000)
    with pytest.raises(ValueError, match="num_steps"):
        _native.bench_compute(-1)


def test_unevenness_is_in_medians_of_each_round() -> None:
    slow, fast = [100.0] * 99 + [300.0], [10.0] * 100
    assert unevenness([fast]) == 1.0
    assert unevenness([slow, [1.0] * 99 + [3.0]]) == pytest.approx(np.percentile([1.0] * 198 + [3.0] * 2, 99))
