"""One attention rank and two expert ranks exchange rows that testify; one of the three is killed at every fault point.

The attention rank has its exchange whole (it is checked) or `PeerDied` with the dead one's name, also when that is an
owner behind a living trampoline. With the dead one's next incarnation both ways work again, and nobody saw a torn
word. With float32 rows and with INT8 rows that the experts take as they are.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bus.xccl.cost import Route

DIRECT, TRAMPOLINE = Route.DIRECT.value, Route.TRAMPOLINE.value
RANKS = [("attention", 0), ("expert", 0), ("expert", 1)]
STEP = 4
DONE, DIED = "done", "died"
OWNER_POINTS: list[tuple[str, tuple[str, ...]]] = [
    ("arrived", (DIED,)),
    ("answering", (DIED,)),
    ("cell-begun", (DIED,)),
    ("published", (DONE,)),
    ("rung", (DONE,)),
]
# A trampoline tells itself and the other owner, answers itself, collects both, and answers: four cells.
TRAMPOLINE_POINTS: list[tuple[str, tuple[str, ...]]] = [
    ("entered", (DIED,)),
    ("copied", (DIED,)),
    ("cell-begun", (DIED,)),
    ("published", (DIED,)),
    ("rung", (DIED,)),
    ("rung:2", (DIED,)),
    ("arrived", (DIED,)),
    ("answering", (DIED,)),
    ("rung:3", (DIED,)),
    ("collected", (DIED,)),
    ("collected:2", (DIED,)),
    ("cell-begun:4", (DIED,)),
    ("published:4", (DONE,)),
    ("rung:4", (DONE,)),
]
ATTENTION_POINTS = ["entered", "staged", "cell-begun", "published", "rung", "pulled"]
CASES = [
    *[(DIRECT, 1, *case) for case in OWNER_POINTS],
    *[(TRAMPOLINE, 1, *case) for case in OWNER_POINTS],
    *[(TRAMPOLINE, 0, *case) for case in TRAMPOLINE_POINTS],
]
Spawn = Callable[..., Any]
Pod = dict[tuple[str, int], Any]


def start(spawn: Spawn, pod: str, rank: tuple[str, int], incarnation: int = 1, *more: str, **how: Any) -> Any:
    service, index = rank
    return spawn(service, pod, index, incarnation, *more, script="relay_child.py", **how)


@pytest.fixture(params=["float32", "int8"])
def kind(request: pytest.FixtureRequest) -> str:
    """How rows travel and reach the experts."""
    return str(request.param)


@pytest.fixture
def members(spawn: Spawn, pod: str, faulty_build: Path, kind: str) -> Pod:
    """All ranks, warm: they have exchanged both ways. They learn of deaths by the kernel alone."""
    children = {rank: start(spawn, pod, rank, 1, "trusts", kind, build=faulty_build) for rank in RANKS}
    assert [child.line() for child in children.values()] == ["ready"] * len(RANKS)
    for route, first in ((DIRECT, 1), (TRAMPOLINE, 2)):
        children["attention", 0].say(f"run {route} {first} {first}")
        assert children["attention", 0].line() == f"done {first}"
    return children


def assert_died_at(child: Any, point: str) -> None:
    assert child.line() == f"fault {point.split(':')[0]}"
    assert child.wait() == -signal.SIGKILL


def go_on(spawn: Spawn, pod: str, members: Pod, victim: tuple[str, int], kind: str) -> None:
    """Replace the dead one; both ways work, and everybody ends well."""
    members[victim] = start(spawn, pod, victim, 2, "trusts", kind)
    assert members[victim].line() == "ready"
    for rank, child in members.items():
        if rank != victim:
            child.say(f"learn {victim[0]} {victim[1]} 2")
            assert child.line() == "learned"
    for route, first in ((DIRECT, 10), (TRAMPOLINE, 30)):
        members["attention", 0].say(f"run {route} {first} {first + 9}")
        assert members["attention", 0].line() == f"done {first + 9}"
    end(members)


def end(members: Pod) -> None:
    for child in members.values():
        child.process.stdin.close()
    assert [members["expert", index].line() for index in (0, 1)] == ["served 0"] * 2
    assert [child.wait() for child in members.values()] == [0] * len(RANKS)


@pytest.mark.parametrize("waiting", ["sleeps", "trusts", "polls"])
def test_three_processes_exchange_what_they_should(spawn: Spawn, pod: str, waiting: str, kind: str) -> None:
    """Who `trusts` would not find a message whose ring was lost before this test gives up."""
    members = {rank: start(spawn, pod, rank, 1, waiting, kind) for rank in RANKS}
    assert [child.line() for child in members.values()] == ["ready"] * len(RANKS)
    for first in range(1, 1000, 200):
        for route, at in ((DIRECT, first), (TRAMPOLINE, first + 100)):
            members["attention", 0].say(f"run {route} {at} {at + 99}")
            assert members["attention", 0].line() == f"done {at + 99}"
    end(members)


@pytest.mark.parametrize(("route", "victim", "point", "outcomes"), CASES)
def test_an_expert_rank_killed_at_every_point(
    spawn: Spawn,
    pod: str,
    members: Pod,
    kind: str,
    route: str,
    victim: int,
    point: str,
    outcomes: tuple[str, ...],
) -> None:
    members["expert", victim].say(f"arm {point}")
    assert members["expert", victim].line() == "armed"
    members["attention", 0].say(f"run {route} {STEP} {STEP}")
    said = members["attention", 0].line()
    assert_died_at(members["expert", victim], point)
    assert said in {
        f"done {STEP}" if outcome == DONE else f"died {STEP} expert-{victim}" for outcome in outcomes
    }
    go_on(spawn, pod, members, ("expert", victim), kind)


@pytest.mark.parametrize("route", [DIRECT, TRAMPOLINE])
@pytest.mark.parametrize("point", ATTENTION_POINTS)
def test_an_attention_rank_killed_at_every_point(
    spawn: Spawn, pod: str, members: Pod, kind: str, route: str, point: str
) -> None:
    members["attention", 0].say(f"arm {point}")
    assert members["attention", 0].line() == "armed"
    members["attention", 0].say(f"run {route} {STEP} {STEP}")
    assert_died_at(members["attention", 0], point)
    go_on(spawn, pod, members, ("attention", 0), kind)
