"""Three processes exchange rows that testify; one is killed at every fault point, and the others name it.

The steps of an exchange are in bus/xccl/dispatch.py. A survivor has its exchange whole (it is checked) or `PeerDied`;
with the dead one's next incarnation the group goes on.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

NUM_RANKS, VICTIM = 3, 1
SURVIVORS = [rank for rank in range(NUM_RANKS) if rank != VICTIM]
# In this step every rank has rows at every other one.
STEP = 4
DIED, DONE = f"died {STEP} expert-{VICTIM}", f"done {STEP}"
# Fault point -> what ranks 0 and 2 say. The victim's right neighbour, rank 2, is told first.
DISPATCH_POINTS = {
    "entered": (DIED, DIED),
    "staged": (DIED, DIED),
    "cell-begun": (DIED, DIED),
    "published": (DIED, DIED),
    "rung": (DIED, DIED),
    "published:2": (DIED, DIED),
    "rung:2": (DIED, DIED),
    "counted": (DIED, DIED),
    "pulled": (DIED, DIED),
    "answering": (DIED, DIED),
    "published:3": (DIED, DONE),
    "rung:3": (DIED, DONE),
    "cell-begun:4": (DIED, DONE),
    "published:4": (DONE, DONE),
    "rung:4": (DONE, DONE),
    "answered": (DONE, DONE),
}
Spawn = Callable[..., Any]


def start(spawn: Spawn, pod: str, rank: int, incarnation: int = 1, poll_ms: int = 20, **how: Any) -> Any:
    return spawn("rank", pod, rank, incarnation, poll_ms, script="collectives_child.py", **how)


def ready(children: list[Any]) -> list[Any]:
    assert [child.line() for child in children] == ["ready"] * len(children)
    return children


def tell(children: list[Any], line: str) -> None:
    for child in children:
        child.say(line)


def finish(children: list[Any]) -> None:
    for child in children:
        child.process.stdin.close()
    assert [child.wait() for child in children] == [0] * len(children)


def test_three_processes_exchange_what_they_should(spawn: Spawn, pod: str) -> None:
    # Nobody looks up by himself within the deadlines of an exchange: a lost wake-up would end it.
    children = ready([start(spawn, pod, rank, poll_ms=120_000) for rank in range(NUM_RANKS)])
    tell(children, "run 1 1000")
    assert [child.line() for child in children] == ["done 1000"] * NUM_RANKS
    finish(children)


@pytest.mark.parametrize("point", DISPATCH_POINTS)
def test_the_survivors_name_the_killed_rank(spawn: Spawn, pod: str, faulty_build: Path, point: str) -> None:
    children = ready([start(spawn, pod, rank, build=faulty_build) for rank in range(NUM_RANKS)])
    tell(children, "run 1 3")
    assert [child.line() for child in children] == ["done 3"] * NUM_RANKS
    children[VICTIM].say(f"arm {point}")
    tell(children, f"run {STEP} {STEP}")
    assert children[VICTIM].line() == f"fault {point.split(':')[0]}"
    assert children[VICTIM].wait() == -signal.SIGKILL
    assert tuple(children[rank].line() for rank in SURVIVORS) == DISPATCH_POINTS[point]

    tell([children[rank] for rank in SURVIVORS], f"learn {VICTIM} 2")
    [children[VICTIM]] = ready([start(spawn, pod, VICTIM, incarnation=2)])
    tell(children, "run 10 30")
    assert [child.line() for child in children] == ["done 30"] * NUM_RANKS
    finish(children)
