"""Twelve processes on two cores, each waiting thousands of times: every wake-up comes, and nobody starves."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

from bus.memory import _native
from bus.memory.segment import Segment
from tests.harness.poll import eventually
from tests.litmus.crowd_child import NUM_PROCESSES, STOP

Spawn = Callable[..., Any]
ROUNDS = 3_000  # of the slowest pair
SHARE_MIN = 0.2  # of the mean that the slowest pair must have had by then
GIVE_UP_S = 50.0


@pytest.mark.parametrize("strategy", ["adaptive", "blocking"])
def test_a_crowd_on_two_cores_shares_them(pod: str, spawn: Spawn, strategy: str) -> None:
    cores = set(sorted(os.sched_getaffinity(0))[:2])
    children = [
        spawn(strategy, pod, index, cpus=cores, script="crowd_child.py") for index in range(NUM_PROCESSES)
    ]
    names = [child.line().split()[1] for child in children]
    segments = [Segment.attach(name) for name in names]
    base = segments[0].layout.app_offset
    for index, child in enumerate(children):
        child.say(f"go {names[index ^ 1]}")

    def rounds() -> list[int]:
        return [_native.load_u64(segment.buf, base) for segment in segments[::2]]

    eventually(lambda: min(rounds()) >= ROUNDS, timeout_s=GIVE_UP_S, what="rounds of the slowest pair")
    shares = rounds()
    for segment in segments[::2]:
        _native.store_u64(segment.buf, base + 8, STOP)
    reports = [child.line().split() for child in children]
    assert {word for word, _, _ in reports} == {"played"}
    assert min(shares) >= SHARE_MIN * sum(shares) / len(shares), shares
    for here, there in zip(reports[::2], reports[1::2], strict=True):
        assert here[1] == there[1], "both count every round"
    if strategy == "blocking":
        assert all(int(sleeps) >= ROUNDS for _, _, sleeps in reports), (
            "each round is waited for in the kernel"
        )
    for child in children:
        child.say("bye")
    assert [child.wait() for child in children] == [0] * NUM_PROCESSES
    for segment in segments:
        segment.close()
