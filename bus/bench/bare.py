"""Loops that do nothing but compute, as long as an exchange: how uneven are times on this machine without any waiting?

Two processes, each alone on a core, compute for as long and then meet, spinning (bus/memory/_native_bench.c). What a
timer tick, the kernel's own threads or a hypervisor take from either core is in these durations as in those of an
exchange of that length, so their 99th percentile in medians is what hardly any exchange on two cores falls below here.
The shorter an exchange, the more the same tick is in terms of it: without this comparison the faster way looks the less
even one.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack

import numpy as np

from bus.bench.meeting import Meeting
from bus.memory import _native
from bus.memory.layout import SegmentLayout
from bus.memory.segment import Segment, segment_name

TIMEOUT_NS = 30_000_000_000
STEPS_FIRST, CALIBRATIONS = 20_000, 20
NUM_LOOPS = 2
NUM_UNTIMED = 4  # the first of a turn: the two do not begin at once


class BareLoops:
    """The end of one rank; only ranks 0 and 1 compute."""

    def __init__(self, meeting: Meeting, stack: ExitStack) -> None:
        self._rank, self._played = meeting.rank, 0
        name = segment_name(f"{meeting.name}b", "bare", 0, 1)
        if meeting.rank == 0:
            self._segment = Segment.create(
                name, SegmentLayout(1, 0, 4096), service="bare", index=0, incarnation=1
            )
            stack.callback(self._segment.unlink)
        meeting.gather()
        if meeting.rank != 0:
            self._segment = Segment.attach(name)
        stack.callback(self._segment.close)
        self._steps_per_ns = self._calibrate() if meeting.rank < NUM_LOOPS else 0.0

    def play(self, length_ns: float, rounds: int) -> list[int]:
        """Compute for `length_ns` and meet, so many times; return each duration, ns. Nothing at other ranks."""
        if self._rank >= NUM_LOOPS:
            return []
        before = os.sched_getaffinity(0)
        cpus = sorted(before)
        os.sched_setaffinity(0, {cpus[self._rank % len(cpus)]})
        try:
            num_steps = max(1, int(length_ns * self._steps_per_ns))
            return self._meet(num_steps, NUM_UNTIMED + rounds)[NUM_UNTIMED:]
        finally:
            os.sched_setaffinity(0, before)

    def _meet(self, num_steps: int, rounds: int) -> list[int]:
        durations = np.zeros(rounds, np.uint64)
        first, offset = self._played, self._segment.layout.app_offset
        self._played += rounds
        if not _native.bench_meet(
            self._segment.buf, offset, self._rank, num_steps, first, durations, TIMEOUT_NS
        ):
            raise TimeoutError("the other bare loop is silent")
        return [int(value) for value in durations]

    def _calibrate(self) -> float:
        """Return steps per ns where nothing disturbs them."""
        fastest = min(_native.bench_compute(STEPS_FIRST) for _ in range(CALIBRATIONS))
        return STEPS_FIRST / max(1, fastest)


def unevenness(rounds_ns: Sequence[Sequence[float]]) -> float:
    """Return the 99th percentile of all samples in medians of their rounds."""
    relative = [np.asarray(samples, np.float64) / np.median(samples) for samples in rounds_ns]
    return float(np.percentile(np.concatenate(relative), 99))
