"""Three processes give each other rows that testify; one is killed at every fault point of the plain all-to-all.

A survivor has its rows whole (they are checked), or names the dead rank, or a survivor that gave up meanwhile.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

NUM_RANKS, VICTIM = 3, 1
STAGED, IN_AREA = 4, 5
Spawn = Callable[..., Any]


def start(spawn: Spawn, pod: str, rank: int, incarnation: int = 1, poll_ms: int = 20, **how: Any) -> Any:
    return spawn("rank", pod, rank, incarnation, poll_ms, script="alltoall_child.py", **how)


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


@pytest.mark.parametrize("step", [STAGED, IN_AREA])
@pytest.mark.parametrize(
    "point", ["staged", "cell-begun", "published", "rung", "rung:2", "counted", "pulled"]
)
def test_the_survivors_have_all_or_name_who_is_missing(
    spawn: Spawn, pod: str, faulty_build: Path, point: str, step: int
) -> None:
    children = ready([start(spawn, pod, rank, build=faulty_build) for rank in range(NUM_RANKS)])
    tell(children, "run 1 3")
    assert [child.line() for child in children] == ["done 3"] * NUM_RANKS
    children[VICTIM].say(f"arm {point}")
    tell(children, f"run {step} {step}")
    assert children[VICTIM].line() == f"fault {point.split(':')[0]}"
    assert children[VICTIM].wait() == -signal.SIGKILL
    died, done = f"died {step} expert-{VICTIM}", f"done {step}"
    first, second = children[0].line(), children[2].line()
    if point in ("staged", "cell-begun") or step == IN_AREA:  # what lies in an area needs the taker's answer
        assert {first, second} <= {died, f"moved {step} expert-0", f"moved {step} expert-2"}
        assert died in (first, second)
    elif point in ("published", "rung"):  # the right neighbour, rank 2, was told first
        assert first == died
        assert second in (done, f"moved {step} expert-0")
    else:
        assert (first, second) == (done, done)

    tell([children[0], children[2]], f"learn {VICTIM} 2")
    [children[VICTIM]] = ready([start(spawn, pod, VICTIM, incarnation=2)])
    tell(children, "run 10 30")
    assert [child.line() for child in children] == ["done 30"] * NUM_RANKS
    finish(children)
