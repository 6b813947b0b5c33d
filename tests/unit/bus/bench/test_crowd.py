"""Section crowd without processes: which rows it measures, with which settings, and when one is missing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bus.bench import crowd, launch, session
from bus.bench.launch import OURS_NICE, WAYS, Way
from bus.bench.plan import Plan
from bus.bench.session import Session
from bus.config import XcclConfig


class FakeGroup:
    """Answers as eight processes do; `played` has the ways of each turn, in order of the turns."""

    opened: dict[str, dict[str, Any]]
    played: list[tuple[str, list[str]]]

    def __init__(self, way: Way, num_ranks: int, folder: Path) -> None:
        self.way, self.num_ranks = way, num_ranks

    def ask(self, command: dict[str, Any]) -> list[Any]:
        name = self.way.name
        if command["what"] == "open_pairs":
            FakeGroup.opened[name] = command["options"]["xccl"]
            return [["C limit", "ours adaptive", "ours blocking"]] * self.num_ranks
        FakeGroup.played.append((name, command["ways"]))
        ns = 4_000 if name == OURS_NICE else 8_000
        return [{way: [[ns] * 5] * command["blocks"] for way in command["ways"]}] * self.num_ranks

    def close(self) -> None:
        """Nothing runs."""


@pytest.fixture(autouse=True)
def groups(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    FakeGroup.opened, FakeGroup.played = {}, []
    monkeypatch.setattr(session, "Group", FakeGroup)
    monkeypatch.setattr(launch, "_is_permitted", lambda nice: True)
    yield


def measured(nice: int = 0) -> Session:
    plan = Plan(peers=(), rounds=2, busy_processes=0, xccl=XcclConfig(nice=nice))
    with Session(plan, progress=lambda text: None) as run:
        crowd.run(run)
    return run


def rows(run: Session) -> dict[str, float]:
    return {r.way: r.figures.p50_us for r in run.records if r.case["scenario"] == crowd.FOUR_PAIRS}


def test_a_group_of_its_own_has_the_nice_setting_and_takes_turns_with_the_other() -> None:
    run = measured()
    assert rows(run) == {"ours adaptive": 4.0, "ours blocking": 4.0, "ours adaptive, nice -10": 2.0}
    assert {name: xccl["nice"] for name, xccl in FakeGroup.opened.items()} == {"ours": 0, OURS_NICE: -10}
    assert FakeGroup.opened["ours"] | {"nice": -10} == FakeGroup.opened[OURS_NICE]
    turns = [name for name, _ in FakeGroup.played]
    # In each of the three scenarios: calibrated in the first round, then in turn.
    assert turns == 3 * ["ours", "ours", OURS_NICE, OURS_NICE, "ours", OURS_NICE]
    assert len(run.records) == 9 and not run.absences
    [nicer] = [r for r in run.records if r.way.endswith("-10") and r.case["scenario"] == crowd.FOUR_PAIRS]
    assert nicer.extra["to_ours"] == 0.5


def test_where_the_nice_value_is_not_permitted_the_row_is_missing_and_says_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(launch, "_is_permitted", lambda nice: False)
    run = measured()
    assert list(rows(run)) == ["ours adaptive", "ours blocking"]
    [absence] = run.absences
    assert (absence.section, absence.way, absence.is_failure) == ("crowd", OURS_NICE, False)
    assert absence.reason == "xccl.nice = -10 is not permitted: it needs CAP_SYS_NICE or RLIMIT_NICE"
    assert not run.has_failed


def test_a_run_with_the_setting_has_it_in_all_rows_once() -> None:
    run = measured(nice=-5)
    assert list(rows(run)) == ["ours adaptive", "ours blocking"]
    assert {name: xccl["nice"] for name, xccl in FakeGroup.opened.items()} == {"ours": -5}


@pytest.mark.parametrize(
    ("own", "in_force", "is_permitted"),
    [
        (0, (0, -10), True),
        (0, (0, 0), False),
        (19, (3_000, 9), True),
        (-15, (0, -20), True),
        (0, None, False),
    ],
)
def test_permission_is_what_the_kernel_says_afterwards(
    monkeypatch: pytest.MonkeyPatch, own: int, in_force: tuple[int, int] | None, is_permitted: bool
) -> None:
    monkeypatch.undo()
    asked: list[tuple[int, int]] = []

    def prioritise(slice_us: int, nice: int) -> tuple[int, int] | None:
        asked.append((slice_us, nice))
        return in_force

    monkeypatch.setattr(launch, "prioritise", prioritise)
    monkeypatch.setattr(launch.os, "getpriority", lambda which, who: own)
    assert (WAYS[OURS_NICE].missing() is None) is is_permitted
    assert asked == [(0, -10)]
