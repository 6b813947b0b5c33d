"""KV transfer under a weak memory: a fetch that ends well has what was offered, whenever the offer is withdrawn.

As `KvSource.offer`, `KvSource._end` and `KvPair.look` of bus/distflow, with one word for the blocks. Every order and
fence there has a mutant here that does without it.
"""

from __future__ import annotations

import pytest

from tests.modelcheck.checker import Model, check
from tests.modelcheck.program import mutate, parse

WINDOW = 6
OFFER = """
    store relaxed block = 1
    store relaxed w0 = 0
    fence release
    store release w0 = 1            # SYNC: kv-offer
"""
END = """
    store relaxed w0 = 0
    fence release                   # SYNC: cell-torn
    store release w0 = 9            # SYNC: kv-offer
    store relaxed block = 2
"""
FETCH = """
    a = load acquire w0             # SYNC: kv-offer
    if a != 1 goto refused
    b = load relaxed block
    c = load acquire w0
    fence acquire                   # SYNC: cell-torn
    d = load relaxed w0
    if d != 1 goto refused
    assert b == 1
refused:
"""


def transfer(offer: str = OFFER, end: str = END, fetch: str = FETCH, window: int = WINDOW) -> Model:
    return Model((parse("source", offer + end), parse("sink", fetch)), {"w0": 0, "block": 0}, window)


def test_what_is_fetched_is_what_was_offered() -> None:
    assert check(transfer()).violation is None


def test_a_fetch_can_end_well() -> None:
    """So the assertion above is reached."""
    assert check(transfer(fetch=mutate(FETCH, "assert b == 1", "assert b == 2"))).violation is not None


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("fence release                   # SYNC: cell-torn", ""),
        ("store relaxed w0 = 0\n", ""),
        ("store relaxed w0 = 0\n    fence release                   # SYNC: cell-torn\n", ""),
    ],
    ids=["no-release-fence", "w0-is-not-taken-away", "a-release-store-alone"],
)
def test_a_source_that_withdraws_carelessly_is_misread(old: str, new: str) -> None:
    assert check(transfer(end=mutate(END, old, new))).violation is not None


def test_a_source_that_rewrites_before_it_withdraws_is_misread() -> None:
    early = "    store relaxed block = 2\n" + mutate(END, "    store relaxed block = 2\n", "")
    assert check(transfer(end=early)).violation is not None


def test_a_source_that_publishes_carelessly_is_misread() -> None:
    careless = mutate(mutate(OFFER, "fence release", ""), "store release w0 = 1", "store relaxed w0 = 1")
    assert check(transfer(offer=careless)).violation is not None


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("a = load acquire w0", "a = load relaxed w0"),
        ("fence acquire ", ""),
        ("if d != 1 goto refused\n", ""),
        ("if a != 1 goto refused\n", ""),
    ],
    ids=["first-look-is-relaxed", "an-acquire-load-alone", "no-second-look", "no-first-look"],
)
def test_a_careless_sink_takes_foreign_words(old: str, new: str) -> None:
    assert check(transfer(fetch=mutate(FETCH, old, new))).violation is not None


def test_in_program_order_no_fence_would_be_missed() -> None:
    """So it is the window that makes the mutants fail, not the interleaving."""
    without = mutate(END, "fence release                   # SYNC: cell-torn", "")
    assert check(transfer(end=without, window=1)).violation is None
    assert check(transfer(fetch=mutate(FETCH, "fence acquire ", ""), window=1)).violation is None
