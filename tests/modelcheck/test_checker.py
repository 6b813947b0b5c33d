"""The checker itself, on programs whose answers the literature knows, so that "no violation" means
something."""

from __future__ import annotations

import pytest

from tests.modelcheck.checker import Model, check
from tests.modelcheck.program import mutate, parse

WEAK = 6

# name, programs, first values, condition that must never hold at the end; is it reachable in order / out of order?
MESSAGE = (
    "store relaxed x = 1\nstore {w} y = 1",
    "a = load {r} y\nb = load relaxed x\nstore relaxed a0 = a\nstore relaxed b0 = b",
)
STORE_BUFFER = (
    "store {w} x = 1\na = load {r} y\nstore relaxed a0 = a",
    "store {w} y = 1\nb = load {r} x\nstore relaxed b0 = b",
)
LOAD_BUFFER = (
    "a = load {r} x\nstore {w} y = 1\nstore relaxed a0 = a",
    "b = load {r} y\nstore {w} x = 1\nstore relaxed b0 = b",
)
COHERENCE = (
    "store relaxed x = 1\nstore relaxed x = 2",
    "a = load relaxed x\nb = load relaxed x\nstore relaxed a0 = a\nstore relaxed b0 = b",
)


def reaches(sources: tuple[str, ...], bad: str, window: int, **orders: str) -> bool:
    programs = tuple(parse(f"P{i}", text.format(**orders)) for i, text in enumerate(sources))
    memory = {"x": 0, "y": 0, "a0": -1, "b0": -1}
    return check(Model(programs, memory, window, final=f"not ({bad})")).violation is not None


@pytest.mark.parametrize(
    ("sources", "bad", "weak", "strong"),
    [
        (MESSAGE, "a0 == 1 and b0 == 0", ("relaxed", "relaxed"), ("release", "acquire")),
        (STORE_BUFFER, "a0 == 0 and b0 == 0", ("release", "acquire"), ("seq_cst", "seq_cst")),
        (LOAD_BUFFER, "a0 == 1 and b0 == 1", ("relaxed", "relaxed"), ("release", "relaxed")),
    ],
    ids=["message-passing", "store-buffering", "load-buffering"],
)
def test_a_weak_outcome_needs_a_window_and_goes_with_the_right_orders(
    sources: tuple[str, ...], bad: str, weak: tuple[str, str], strong: tuple[str, str]
) -> None:
    assert not reaches(sources, bad, 1, w=weak[0], r=weak[1])
    assert reaches(sources, bad, WEAK, w=weak[0], r=weak[1])
    assert not reaches(sources, bad, WEAK, w=strong[0], r=strong[1])


@pytest.mark.parametrize(("w", "r"), [("release", "relaxed"), ("relaxed", "acquire")])
def test_message_passing_needs_both_halves(w: str, r: str) -> None:
    assert reaches(MESSAGE, "a0 == 1 and b0 == 0", WEAK, w=w, r=r)


def test_one_word_never_goes_back_in_time() -> None:
    assert not reaches(COHERENCE, "a0 == 2 and b0 < 2 or a0 == 1 and b0 == 0", WEAK)


def test_fences_do_what_orders_do() -> None:
    writer = "store relaxed x = 1\nfence release\nstore relaxed y = 1"
    reader = (
        "a = load relaxed y\nfence acquire\nb = load relaxed x\nstore relaxed a0 = a\nstore relaxed b0 = b"
    )
    bad = "a0 == 1 and b0 == 0"
    assert not reaches((writer, reader), bad, WEAK)
    assert reaches((mutate(writer, "fence release\n", ""), reader), bad, WEAK)
    assert reaches((writer, mutate(reader, "fence acquire\n", "")), bad, WEAK)


def test_loads_pass_branches_and_stores_do_not() -> None:
    reader = "a = load relaxed y\nif a == 0 goto out\nb = load relaxed x\nstore relaxed a0 = a\nstore relaxed b0 = b\n"
    reader += "out:"
    writer = "store relaxed x = 1\nstore release y = 1"
    assert reaches((writer, reader), "a0 == 1 and b0 == 0", WEAK)
    wary = mutate(reader, "load relaxed y", "load acquire y")
    assert not reaches((writer, wary), "a0 == 1 and b0 == 0", WEAK)
    guard = "a = load relaxed x\nif a == 0 goto out\nstore relaxed y = 1\nout:\nstore relaxed a0 = a"
    mirror = "b = load relaxed y\nif b == 0 goto out\nstore relaxed x = 1\nout:\nstore relaxed b0 = b"
    assert not reaches((guard, mirror), "a0 == 1 or b0 == 1", WEAK), "a value came out of thin air"


def test_additions_are_whole_and_loads_with_stores_are_not() -> None:
    memory = {"n": 0}
    whole, torn = "a = add relaxed n 1", "a = load relaxed n\nstore relaxed n = a + 1"
    for text, holds in ((whole, True), (torn, False)):
        result = check(Model((parse("A", text), parse("B", text)), memory, WEAK, final="n == 2"))
        assert (result.violation is None) == holds


def test_a_sleeper_that_nobody_wakes_is_found_and_shown() -> None:
    sleeper = "s = load seq_cst word\nsleep word == s"
    ringer = "n = add seq_cst word 1"
    lost = check(Model((parse("sleeper", sleeper), parse("ringer", ringer)), {"word": 0}))
    assert lost.violation is not None
    assert lost.violation.what.startswith("sleeper sleeps for ever")
    assert [step.thread for step in lost.violation.trace].count("ringer") == 1
    woken = check(Model((parse("sleeper", sleeper), parse("ringer", ringer + "\nwake word")), {"word": 0}))
    assert woken.violation is not None, "it read the word after the last ring, and nobody rings again"
    timed = sleeper + " or timeout"
    assert check(Model((parse("sleeper", timed), parse("ringer", ringer)), {"word": 0})).violation is None


def test_a_ring_without_exit_and_a_kill_are_found() -> None:
    spinner, setter = "again:\na = load relaxed x\nif a == 0 goto again", "store relaxed x = 1"
    model = Model((parse("spinner", spinner), parse("setter", setter)), {"x": 0}, progress=True)
    assert check(model).violation is None
    killed = Model(model.programs, model.memory, kills={"setter": {}}, progress=True)
    violation = check(killed).violation
    assert violation is not None
    assert (violation.what, str(violation.trace[-1])) == (
        "no end can be reached from here",
        "    setter: KILLED",
    )


@pytest.mark.parametrize("line", ["a = b", "load x", "store sometimes x = 1", "jump out"])
def test_what_is_no_program_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match="not a line of the language"):
        parse("P", line)
    with pytest.raises(ValueError, match="occurs 0 times"):
        mutate("end", line, "")
