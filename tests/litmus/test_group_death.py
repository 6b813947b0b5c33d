"""Three processes exchange rows that testify; one is killed at every fault point, and the others name it.

The steps of an exchange are in bus/xccl/dispatch.py and bus/xccl/alltoall.py. A survivor has its exchange whole (it is
checked), or names the dead rank, or in a plain all-to-all a survivor that gave up meanwhile; with the dead one's next
incarnation the group goes on.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bus.config import XcclConfig
from bus.memory import _native
from bus.memory.segment import Segment, segment_name
from bus.xccl.event import Event
from tests.harness.poll import eventually
from tests.litmus.group_child import NUM_RANKS

VICTIM = 1
LANES = 3  # of each rank
SURVIVORS = [rank for rank in range(NUM_RANKS) if rank != VICTIM]
STAGED, IN_AREA = 4, 5  # steps in which every rank has rows at every other one
DIED, DONE = f"died {STAGED} expert-{VICTIM}", f"done {STAGED}"
# Fault point -> what ranks 0 and 2 say. The victim's right neighbour, rank 2, is told first.
DISPATCH_POINTS = {
    "entered": (DIED, DIED),
    "staged": (DIED, DIED),
    "cell-begun": (DIED, DIED),
    "published": (DIED, DIED),
    "rung": (DIED, DIED),
    "published:2": (DIED, DIED),
    "rung:2": (DIED, DIED),
    "looked": (DIED, DIED),
    "counted": (DIED, DIED),
    "pulled": (DIED, DIED),
    "answering": (DIED, DIED),
    "published:3": (DIED, DONE),
    "rung:3": (DONE, DONE),
    "cell-begun:4": (DIED, DONE),
    "published:4": (DONE, DONE),
    "rung:4": (DONE, DONE),
    "answered": (DONE, DONE),
}
ALLTOALL_POINTS = ["staged", "cell-begun", "published", "rung", "rung:2", "looked", "counted", "pulled"]
Spawn = Callable[..., Any]


class Group:
    """The processes of a group."""

    def __init__(self, spawn: Spawn, pod: str, kind: str, **how: Any) -> None:
        self._spawn, self._pod, self._kind = spawn, pod, kind
        self.children = [self._start(rank, 1, **how) for rank in range(NUM_RANKS)]
        assert [child.line() for child in self.children] == ["ready"] * NUM_RANKS

    def _start(
        self, rank: int, incarnation: int, poll_ms: int = 120_000, spin_us: int = 0, **how: Any
    ) -> Any:
        args = (self._kind, self._pod, rank, incarnation, poll_ms, spin_us)
        return self._spawn(*args, script="group_child.py", **how)

    def run(self, first: int, last: int) -> None:
        """Exchange the steps; everybody must succeed."""
        self.tell(f"run {first} {last}")
        assert [child.line() for child in self.children] == [f"done {last}"] * NUM_RANKS

    def tell(self, line: str) -> None:
        for child in self.children:
            child.say(line)

    def kill_at(self, point: str, step: int) -> tuple[str, str]:
        """Exchange `step`, in which the victim dies at `point`; return what the survivors say."""
        victim = self.children[VICTIM]
        victim.say(f"arm {point}")
        self.tell(f"run {step} {step}")
        assert victim.line() == f"fault {point.split(':')[0]}"
        assert victim.wait() == -signal.SIGKILL
        first, second = (self.children[rank].line() for rank in SURVIVORS)
        return first, second

    def go_on(self) -> None:
        """Replace the dead one; the group works, and everybody ends well."""
        for rank in SURVIVORS:
            self.children[rank].say(f"learn {VICTIM} 2")
        self.children[VICTIM] = self._start(VICTIM, 2)
        assert self.children[VICTIM].line() == "ready"
        self.run(10, 30)
        self.finish()

    def finish(self) -> None:
        for child in self.children:
            child.process.stdin.close()
        assert [child.wait() for child in self.children] == [0] * NUM_RANKS


@pytest.mark.parametrize("spin_us", [0, XcclConfig().spin_us], ids=["sleeps", "polls"])
@pytest.mark.parametrize("kind", ["dispatch", "dispatch_int8", "alltoall"])
def test_three_processes_exchange_what_they_should(spawn: Spawn, pod: str, kind: str, spin_us: int) -> None:
    group = Group(spawn, pod, kind, spin_us=spin_us)
    group.run(1, 1000)
    group.finish()


@pytest.mark.parametrize("kind", ["dispatch", "dispatch_int8"])
@pytest.mark.parametrize("point", DISPATCH_POINTS)
def test_the_survivors_of_a_dispatch_name_the_killed_rank(
    spawn: Spawn, pod: str, faulty_build: Path, point: str, kind: str
) -> None:
    group = Group(spawn, pod, kind, build=faulty_build)
    group.run(1, 3)
    assert group.kill_at(point, STAGED) == DISPATCH_POINTS[point]
    group.go_on()


@pytest.mark.parametrize("step", [STAGED, IN_AREA])
@pytest.mark.parametrize("point", ALLTOALL_POINTS)
def test_the_survivors_of_an_all_to_all_have_all_or_name_who_is_missing(
    spawn: Spawn, pod: str, faulty_build: Path, point: str, step: int
) -> None:
    group = Group(spawn, pod, "alltoall", build=faulty_build)
    group.run(1, 3)
    first, second = group.kill_at(point, step)
    died, done = f"died {step} expert-{VICTIM}", f"done {step}"
    if point in ("staged", "cell-begun") or step == IN_AREA:  # what lies in an area needs the taker's answer
        assert {first, second} <= {died, *(f"moved {step} expert-{rank}" for rank in SURVIVORS)}
        assert died in (first, second)
    elif point == "published":  # the right neighbour, rank 2, was told first
        assert first == died
        assert second in (done, f"moved {step} expert-0")
    else:
        assert (first, second) == (done, done)
    group.go_on()


def test_a_rank_that_is_overtaken_while_it_looks_has_its_exchange(
    spawn: Spawn, pod: str, faulty_build: Path
) -> None:
    """It stops between two lanes: the event that it awaits and the next one are published behind its back."""
    group = Group(spawn, pod, "alltoall", build=faulty_build)
    group.run(2, 3)
    slow, *others = group.children
    slow.say("arm looked~")
    slow.say(f"run {STAGED} {STAGED + 1}")
    assert slow.line() == "fault looked"
    for child in others:
        child.say(f"run {STAGED} {STAGED + 1}")
    segment = Segment.attach(segment_name(pod, "expert", 0, 1))
    cell, later = segment.cell_offset(LANES * VICTIM + 1), Event(STAGED + 1, 0).pack()
    eventually(lambda: _native.load_u64(segment.buf, cell + 8) == later, timeout_s=20, what="the later event")
    segment.close()
    slow.process.send_signal(signal.SIGCONT)
    assert [child.line() for child in group.children] == [f"done {STAGED + 1}"] * NUM_RANKS
    group.finish()
