"""No transport races under ThreadSanitizer, and each order that is taken away is reported. See race.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.native.race import SCENARIOS, build, leave_out, mutate, run, runtime, tree

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        runtime() is None, reason="the compiler has no libtsan (Debian: apt-get install libtsan2)"
    ),
]


@pytest.fixture(scope="module")
def real() -> Iterator[Path]:
    with tree() as directory:
        build(directory)
        yield directory


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_nothing_races(real: Path, scenario: str) -> None:
    outcome = run(real, scenario)
    assert outcome.races == [], outcome.text
    assert outcome.status == 0, outcome.text
    assert outcome.text.endswith("finished\n")


@pytest.mark.parametrize(
    ("labels", "scenarios"),
    [
        (["cell-whole"], ["p2p"]),
        (["cell-whole", "doorbell", "word"], ["dispatch", "alltoall", "relay"]),
        (["word", "doorbell"], ["ring"]),
        (["lane-block", "lane-job"], ["lanes"]),
        (["share-invite"], ["share"]),
        (["share-done", "word", "doorbell"], ["share"]),
    ],
    ids=["cells", "cells-and-bells", "words-and-bells", "lanes", "invitations", "help"],
)
@pytest.mark.parametrize(
    "orders",
    [["RELEASE", "SEQ_CST", "ACQ_REL"], ["ACQUIRE", "SEQ_CST", "ACQ_REL"]],
    ids=["publish", "take"],
)
def test_relaxed_orders_are_reported(labels: list[str], scenarios: list[str], orders: list[str]) -> None:
    with tree() as directory:
        assert mutate(directory, labels, orders) > 0
        build(directory)
        for scenario in scenarios:
            assert run(directory, scenario, until_race=True).races, f"{scenario} did not see it"


def test_rows_that_are_overwritten_without_a_word_are_reported() -> None:
    with tree() as directory:
        assert leave_out(directory, "_collectives_dispatch.c", "piece-torn") == 1
        build(directory)
        assert run(directory, "withdraw", until_race=True).races, "nobody saw it"
