"""Cells under a weak memory: never torn, never back in time, never mixed from two incarnations of the writer.

As `store_cell` and `load_cell` of bus/memory/_native.h; two payload words stand for three. Every order and
fence there has a mutant here that does without it.
"""

from __future__ import annotations

import pytest

from tests.modelcheck.checker import Model, check
from tests.modelcheck.program import mutate, parse

WINDOW = 5

WRITE = """
    store relaxed w0 = 0
    fence release                   # SYNC: cell-torn
    store relaxed w1 = {word}
    store relaxed w2 = {word}
    store release w0 = {stamp}      # SYNC: cell-whole
"""
READ = """
    a = load acquire w0             # SYNC: cell-whole
    b = load relaxed w1
    c = load relaxed w2
    fence acquire                   # SYNC: cell-torn
    d = load relaxed w0
    if a == 0 goto nothing
    if a != d goto nothing
    assert b == c == a
nothing:
"""
CELL = {"w0": 0, "w1": 0, "w2": 0}


def write(number: int, text: str = WRITE) -> str:
    return text.format(word=number, stamp=number)


def two_writes(write_text: str = WRITE, read_text: str = READ, window: int = WINDOW) -> Model:
    writer = parse("writer", write(1, write_text) + write(2, write_text))
    return Model((writer, parse("reader", read_text)), CELL, window)


def test_a_cell_is_whole() -> None:
    assert check(two_writes()).violation is None


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("store relaxed w0 = 0\n", ""),
        ("fence release", ""),
        ("store release w0 = {stamp}", "store relaxed w0 = {stamp}"),
    ],
    ids=["w0-is-not-taken-away", "no-release-fence", "w0-is-relaxed"],
)
def test_a_careless_writer_tears_it(old: str, new: str) -> None:
    assert check(two_writes(write_text=mutate(WRITE, old, new))).violation is not None


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("load acquire w0", "load relaxed w0"),
        ("fence acquire ", ""),
        ("if a != d goto nothing\n", ""),
        ("if a == 0 goto nothing\n", ""),
    ],
    ids=["w0-is-relaxed", "no-acquire-fence", "no-second-look", "empty-is-taken-for-news"],
)
def test_a_careless_reader_sees_it_torn(old: str, new: str) -> None:
    assert check(two_writes(read_text=mutate(READ, old, new))).violation is not None


def test_in_program_order_no_fence_would_be_missed() -> None:
    """So it is the window that makes the mutants above fail, not the interleaving."""
    assert check(two_writes(mutate(WRITE, "fence release", ""), window=1)).violation is None
    assert check(two_writes(read_text=mutate(READ, "fence acquire ", ""), window=1)).violation is None


def test_a_cell_never_goes_back_in_time() -> None:
    second_look = (
        READ.replace("a ", "e ").replace("nothing", "still_nothing").replace("b == c == a", "e >= a")
    )
    reader = (
        mutate(READ, "if a != d goto nothing", "if a != d goto done").replace("nothing:", "") + second_look
    )
    reader = reader.replace("goto nothing", "goto done") + "\ndone:\n"
    assert (
        check(Model((parse("writer", write(1) + write(2)), parse("reader", reader)), CELL, 3)).violation
        is None
    )


def incarnations(stamps: tuple[int, int], before: str = "until lock == 0\n") -> Model:
    """One write of an incarnation that may be killed at any step, then one of the next incarnation."""
    first = parse("first", WRITE.format(word=1, stamp=stamps[0]) + "store release lock = 0")
    then = parse("next", before + WRITE.format(word=2, stamp=stamps[1]))
    read = mutate(READ, "assert b == c == a", "assert b == c")
    memory = {**CELL, "lock": 1}
    return Model((first, then, parse("reader", read)), memory, WINDOW, kills={"first": {"lock": 0}})


def test_two_incarnations_never_mix() -> None:
    """Also when the first one ended half-way; the lock is the rank's: the second begins only when the first has
    ended."""
    assert check(incarnations((1 << 4 | 1, 2 << 4 | 1))).violation is None


def test_a_stamp_without_incarnation_mixes_them() -> None:
    """ABA: the same w0 before and after, other words in between."""
    violation = check(incarnations((1, 1))).violation
    assert violation is not None
    assert violation.what.startswith("broken: reader: assert b == c")


def test_two_living_incarnations_would_tear_it() -> None:
    """A stamp tells whose words they are, but two writers at once still mix them: the rank's lock is needed as
    well."""
    assert check(incarnations((1 << 4 | 1, 2 << 4 | 1), before="")).violation is not None
