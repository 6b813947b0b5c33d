"""Twelve processes on two cores, each waiting thousands of times: every wake-up comes, and nobody starves.

Beside others that compute the ends of a pair come to share a core, and ranks of a group sleep.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from bus.bench.busy import busy
from bus.config import XcclConfig
from bus.memory import _native
from bus.memory.layout import LINK_PLACE_OFFSET
from bus.memory.segment import Segment
from tests.harness.poll import eventually
from tests.litmus.crowd_child import NUM_PROCESSES, STOP
from tests.litmus.group_child import NUM_RANKS

Spawn = Callable[..., Any]
ROUNDS = 3_000  # of the slowest pair
SHARE_MIN = 0.2  # of the mean that the slowest pair must have had by then
GIVE_UP_S = 50.0
EXCHANGES = 2_000


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


def test_the_ends_of_a_pair_join_where_others_compute(pod: str, spawn: Spawn) -> None:
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        pytest.skip("this machine lends a single core")
    with busy(2 * len(cores), 19):
        children = [spawn("adaptive", pod, i, cpus={cores[i]}, script="crowd_child.py") for i in (0, 1)]
        names = [child.line().split()[1] for child in children]
        segments = [Segment.attach(name) for name in names]
        for child, name in zip(children, reversed(names), strict=True):
            child.say(f"go {name}")
        base, first = segments[0].layout.app_offset, children[0].process.pid

        def has_joined() -> bool:
            """The first is held apart, then let go: it joins the second, or the kernel moves it, and we try again."""
            is_apart = _native.load_u32(segments[0].buf, LINK_PLACE_OFFSET) == 1 + cores[0]
            os.sched_setaffinity(first, set(cores) if is_apart else cores[:1])
            return _native.load_u64(segments[0].buf, base + 16) > 0

        eventually(has_joined, timeout_s=GIVE_UP_S, what="the first end moves to the second")
        assert _native.load_u64(segments[1].buf, base + 16) == 0, "it may not leave its core"
        _native.store_u64(segments[0].buf, base + 8, STOP)
        assert [child.line().split()[0] for child in children] == ["played", "played"]
    for child in children:
        child.say("bye")
    assert [child.wait() for child in children] == [0, 0]
    for segment in segments:
        segment.close()


@contextmanager
def crowded_core() -> Iterator[set[int]]:
    """Yield a core on which a process computes, at our nice value."""
    allowed = os.sched_getaffinity(0)
    core = {min(allowed)}
    os.sched_setaffinity(0, core)  # for the process to inherit
    try:
        with busy(1, os.getpriority(os.PRIO_PROCESS, 0)):
            os.sched_setaffinity(0, allowed)
            yield core
    finally:
        os.sched_setaffinity(0, allowed)


def test_ranks_of_a_group_sleep_where_others_compute(pod: str, spawn: Spawn) -> None:
    """A yield there gives the core to who computes, for all of a slice: it is not taken for one that pays."""
    how = (XcclConfig().poll_interval_ms, XcclConfig().spin_us)
    with crowded_core() as core:
        children = [
            spawn("alltoall", pod, rank, 1, *how, cpus=core, script="group_child.py")
            for rank in range(NUM_RANKS)
        ]
        assert [child.line() for child in children] == ["ready"] * NUM_RANKS
        for child in children:
            child.say(f"run 1 {EXCHANGES}")
        assert [child.line() for child in children] == [f"done {EXCHANGES}"] * NUM_RANKS
        for child in children:
            child.say("sleeps")
        sleeps = [int(child.line()) for child in children]
    assert sum(sleeps) > NUM_RANKS * EXCHANGES // 2, sleeps


def test_ranks_of_a2e_sleep_where_others_compute(pod: str, spawn: Spawn) -> None:
    with crowded_core() as core:
        children = [
            spawn(service, pod, index, 1, "polls", cpus=core, script="relay_child.py")
            for service, index in (("attention", 0), ("expert", 0), ("expert", 1))
        ]
        assert [child.line() for child in children] == ["ready"] * len(children)
        children[0].say(f"run direct 1 {EXCHANGES}")
        assert children[0].line() == f"done {EXCHANGES}"
        for child in children:
            child.say("sleeps")
        sleeps = [int(child.line()) for child in children]
    assert sum(sleeps) > EXCHANGES, sleeps
