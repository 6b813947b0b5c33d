"""Announcements alternate between two lanes: a reader never takes a giver that is ahead for one that gave up.

The giver announces event 3 on lane 0, then, since the reader has announced its own part of 3, event 4 on lane 1. `READ`
is `look` of bus/memory/_collectives_group.c for event 3; a lane's word stands for its cell.
"""

from __future__ import annotations

import pytest

from tests.modelcheck.checker import Model, check
from tests.modelcheck.program import mutate, parse

WEAK = 4

GIVE = """
    store release lane[0] = 3       # SYNC: cell-whole
    store release lane[1] = 4       # SYNC: cell-whole
"""
READ = """
    a = load acquire lane[0]        # SYNC: cell-whole
    b = load acquire lane[1]        # SYNC: cell-whole
    if a == 3 goto out
    if b <= 3 goto out
    a = load acquire lane[0]        # SYNC: cell-whole
    assert a == 3
out:
"""


def model(read: str, window: int) -> Model:
    """Both lanes show the events before."""
    return Model((parse("giver", GIVE), parse("reader", read)), {"lane[0]": 1, "lane[1]": 2}, window)


@pytest.mark.parametrize("window", [1, WEAK])
def test_a_giver_that_is_ahead_has_not_given_up(window: int) -> None:
    assert check(model(READ, window)).violation is None


def test_one_look_at_both_lanes_is_not_enough() -> None:
    once = mutate(READ, "    a = load acquire lane[0]        # SYNC: cell-whole\n    assert", "    assert")
    assert check(model(once, 1)).violation is not None


def test_the_later_event_must_be_acquired() -> None:
    relaxed = mutate(READ, "b = load acquire", "b = load relaxed").replace(
        "a = load acquire", "a = load relaxed"
    )
    assert check(model(relaxed, WEAK)).violation is not None
