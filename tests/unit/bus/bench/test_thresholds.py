"""Section thresholds without processes: what it plays, in which order, and what its table says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bus.bench import machine, session
from bus.bench.launch import WAYS, Way
from bus.bench.peers.ours_paths import PATHS
from bus.bench.plan import Plan
from bus.bench.report import Report
from bus.bench.session import Session
from bus.bench.tables import render
from bus.bench.thresholds import BLOCKS, LANES_BYTES_MIN, SECTION, THRESHOLDS, run
from bus.bench.worker import PEERS


class FakeGroup:
    """Answers as two processes do; the path from a threshold on is the faster one from 64 KiB on."""

    played: list[tuple[list[str], int]]

    def __init__(self, way: Way, num_ranks: int, folder: Path) -> None:
        assert (way.name, num_ranks) == ("ours-paths", 2)

    def ask(self, command: dict[str, Any]) -> list[Any]:
        if command["what"] == "open_pairs":
            return [list(PATHS)] * 2
        ways, size, blocks = command["ways"], command["num_bytes"], command["blocks"]
        FakeGroup.played.append((ways, size))
        one_way_ns = {ways[0]: 2_000, ways[1]: 1_000 if size >= 65536 else 2_500}
        return [{way: [[2 * one_way_ns[way]] * 3] * blocks for way in ways}] * 2

    def close(self) -> None:
        """Nothing runs."""


@pytest.fixture(autouse=True)
def measured(monkeypatch: pytest.MonkeyPatch) -> Iterator[Session]:
    FakeGroup.played = []
    monkeypatch.setattr(session, "Group", FakeGroup)
    with Session(Plan(rounds=2), progress=lambda text: None) as found:
        run(found)
    yield found


def test_both_paths_of_every_threshold_are_played_in_turn_from_the_largest_size_down(
    measured: Session,
) -> None:
    for threshold in THRESHOLDS:
        assert {threshold.below, threshold.above} <= set(PATHS)
        records = [r for r in measured.records if r.case["threshold"] == threshold.name]
        assert len(records) == 2 * len(threshold.sizes)
        assert {r.extra["setting"] for r in records} == {threshold.num_bytes}
        assert threshold.num_bytes in threshold.sizes
        assert {r.figures.samples for r in records} == {2 * BLOCKS * 3}
    first = [size for ways, size in FakeGroup.played if ways == ["ring", "read"]]
    assert first == sorted(first, reverse=True)
    assert "ours-paths" in WAYS and "ours-paths" in PEERS


def test_a_choice_is_compared_with_the_other_path(measured: Session) -> None:
    pulled = [
        r for r in measured.records if r.case["threshold"] == "pull_bytes_min" and "to_other" in r.extra
    ]
    setting = pulled[0].extra["setting"]
    for record in pulled:
        size = int(record.case["size"])
        assert record.way == ("app: pull" if size >= setting else "app: ring")
        is_pull_faster = size >= 65536
        expected = {("app: pull", True): 0.5, ("app: pull", False): 1.25}.get(
            (record.way, is_pull_faster), 0.8
        )
        assert record.extra["to_other"] == pytest.approx(expected)


def test_the_table_says_where_the_setting_lies_and_what_it_loses(measured: Session) -> None:
    report = Report(machine.facts(), measured.plan, 1.0, [], measured.records)
    text = render(report)
    assert len(report.of(SECTION)) == len(measured.records)
    assert f"num_lanes = 2, from {LANES_BYTES_MIN >> 10} KiB on: one way, us, p50" in text
    part = text[text.index("read_bytes_min, from ") :].split("\n\n")[0].splitlines()
    assert [line.split("  ")[0] for line in part[2:]] == ["ring", "read", "chosen", "faster", "lost, %"]
    sizes = part[1].replace(" KiB", "").split()
    assert sizes == sorted(sizes, key=int)
    lost = dict(zip(sizes, part[-1].split()[2:], strict=True))
    assert lost["12"] == "25" and lost["3"] == "0"
