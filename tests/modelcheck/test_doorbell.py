"""Doorbells: no ring is lost. Without time-outs, so that a lost one is a sleeper that nobody ever wakes.

The programs, and whose they are, stand in `bells.py`.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.modelcheck.bells import (
    PATIENT_RING,
    PATIENT_WAIT,
    QUIET_RING,
    QUIET_WAIT,
    QUIET_WAIT_FOR_ALL,
    RING,
    WAIT,
    look,
)
from tests.modelcheck.checker import Model, check
from tests.modelcheck.program import mutate, parse

WEAK = 4

TIDY = "sleepers == 0 and patient == 0"


def model(ringers: list[str], waiters: list[tuple[str, tuple[int, ...]]], window: int = 1) -> Model:
    """Ringer i rings for word i; each waiter waits for the words named. At the end no mark is left."""
    programs = [parse(f"ringer{i}", text.format(i=i)) for i, text in enumerate(ringers)]
    programs += [
        parse(f"waiter{i}", text.format(look=look(*words))) for i, (text, words) in enumerate(waiters)
    ]
    num_words = 1 + max(i for _, words in waiters for i in words)
    memory = {f"word[{i}]": 0 for i in range(max(num_words, len(ringers)))}
    memory |= {"seq": 0, "sleepers": 0, "patient": 0, "wake_at": 0}
    return Model(tuple(programs), memory, window, final=TIDY)


def is_lost(checked: Model) -> bool:
    """A mutant may also leave marks behind; here only a sleeper counts that nobody wakes."""
    violation = check(replace(checked, final="True")).violation
    return violation is not None and "for ever" in violation.what


@pytest.mark.parametrize("num_ringers", [1, 2, 3])
def test_no_ring_is_lost(num_ringers: int) -> None:
    words = tuple(range(num_ringers))
    assert check(model([RING] * num_ringers, [(WAIT, words)])).violation is None


def test_two_waiters_share_a_bell() -> None:
    assert check(model([RING, RING], [(WAIT, (0,)), (WAIT, (0, 1))])).violation is None


def test_no_ring_is_lost_out_of_order() -> None:
    assert check(model([RING], [(WAIT, (0,))], WEAK)).violation is None


LATE_NEWS = mutate(
    mutate(RING, "store release word[{i}] = 1", ""), "out:", "out:\n    store release word[{i}] = 1"
)
CLEARING_RING = mutate(RING, "wake seq", "store seq_cst sleepers = 0\n    wake seq")
LATE_SEEN = mutate(
    mutate(WAIT, "    seen = load acquire seq         # SYNC: word\n", ""),
    "m = add seq_cst sleepers 1",
    "seen = load acquire seq\n    m = add seq_cst sleepers 1",
)
TRUSTING = mutate(WAIT, "sleep seq == seen", "sleep seq == now").replace("if now != seen goto awake\n", "")
FLAG = mutate(
    mutate(WAIT, "m = add seq_cst sleepers 1 ", "store seq_cst sleepers = 1 "),
    "m = add seq_cst sleepers -1",
    "store seq_cst sleepers = 0",
)
UNMARKED = mutate(WAIT, "m = add seq_cst sleepers -1", "")


@pytest.mark.parametrize(
    ("ring", "wait", "waiters"),
    [
        (mutate(RING, "wake seq", ""), WAIT, [(0,)]),
        (LATE_NEWS, WAIT, [(0,)]),
        (CLEARING_RING, UNMARKED, [(0, 1)]),
        (RING, LATE_SEEN, [(0,)]),
        (RING, TRUSTING, [(0,)]),
        (RING, FLAG, [(0,), (0, 1)]),
    ],
    ids=[
        "ringer-never-wakes",
        "ringer-publishes-after-the-ring",
        "ringer-clears-the-waiters-mark",
        "waiter-looks-before-it-reads-seq",
        "waiter-does-not-compare-before-it-sleeps",
        "a-flag-instead-of-a-count-for-two-waiters",
    ],
)
def test_a_mutant_loses_one(ring: str, wait: str, waiters: list[tuple[int, ...]]) -> None:
    assert is_lost(model([ring] * 2, [(wait, words) for words in waiters]))


@pytest.mark.parametrize(
    ("ring", "wait"),
    [
        (mutate(RING, "add seq_cst seq", "add release seq"), WAIT),
        (
            mutate(RING, "load seq_cst sleepers", "load relaxed sleepers").replace(
                "add seq_cst", "add release"
            ),
            WAIT,
        ),
        (
            mutate(RING, "store release word", "store relaxed word").replace("add seq_cst", "add relaxed"),
            WAIT,
        ),
        (
            RING,
            mutate(WAIT, "seen = load acquire seq", "seen = load relaxed seq").replace(
                "load acquire word", "load relaxed word"
            ),
        ),
    ],
    ids=["seq-not-seq_cst", "neither", "nothing-published", "seen-not-acquired"],
)
def test_a_weaker_order_loses_one(ring: str, wait: str) -> None:
    """The store buffering at the doorbell's core; in program order each of these is right."""
    weak = model([ring], [(wait, (0,))], WEAK)
    assert is_lost(weak)
    assert check(Model(weak.programs, weak.memory)).violation is None


def test_the_kernel_s_comparison_covers_a_late_mark() -> None:
    """The waiter's own comparison may even happen before its mark: futex compares again, behind a full fence.

    C11 knows nothing of that, so the code does not rely on it.
    """
    late = mutate(WAIT, "m = add seq_cst sleepers 1 ", "m = add release sleepers 1 ")
    assert not is_lost(model([RING], [(late, (0,))], WEAK))
    blind = mutate(late, "sleep seq == seen", "now = load relaxed seq\n    sleep seq == now")
    assert is_lost(model([RING], [(blind, (0,))], WEAK))


# ---------------------------------------------------------------- patience


@pytest.mark.parametrize("num_ringers", [1, 2, 3])
def test_a_patient_waiter_is_woken_by_the_last_ring(num_ringers: int) -> None:
    words = tuple(range(num_ringers))
    assert check(model([PATIENT_RING] * num_ringers, [(PATIENT_WAIT, words)])).violation is None


def test_rings_of_others_do_no_harm() -> None:
    """A rank that is not awaited, and one of point-to-point, ring as well."""
    assert check(model([PATIENT_RING, PATIENT_RING, RING], [(PATIENT_WAIT, (0, 1))])).violation is None
    twice = PATIENT_RING + PATIENT_RING.replace("out", "out2").replace("call", "call2")
    assert check(model([twice, PATIENT_RING], [(PATIENT_WAIT, (0, 1))])).violation is None


def with_a_silent_rank(ring: str, first: str, second: str) -> Model:
    """`first` waits for words 1 and 2, which never come; `second` for word 0, whose ringer is the only one."""
    return replace(
        model([ring], [(first, (1, 2)), (second, (0,))]), may_wait=frozenset({"waiter0"}), final="True"
    )


def test_another_thread_may_sleep_for_point_to_point() -> None:
    """Its ringers ignore patience, so it does not wait for the ranks of others."""
    assert check(with_a_silent_rank(RING, PATIENT_WAIT, WAIT)).violation is None
    assert is_lost(with_a_silent_rank(PATIENT_RING, PATIENT_WAIT, WAIT))


def test_two_patient_waiters_would_need_two_words() -> None:
    """`patient` and `wake_at` have one writer: one thread at a time waits for collectives on a segment."""
    assert is_lost(with_a_silent_rank(PATIENT_RING, PATIENT_WAIT, PATIENT_WAIT))


@pytest.mark.slow
def test_three_ringers_two_waiters() -> None:
    ringers = [PATIENT_RING, PATIENT_RING, RING]
    assert check(model(ringers, [(PATIENT_WAIT, (0, 1)), (WAIT, (2,))])).violation is None
    assert check(model([RING] * 4, [(WAIT, (0, 1, 2, 3))])).violation is None


def test_patience_holds_out_of_order() -> None:
    assert check(model([PATIENT_RING], [(PATIENT_WAIT, (0,))], WEAK)).violation is None


LATE_COUNT = mutate(PATIENT_WAIT, "    seen = load acquire seq         # SYNC: word\n", "").replace(
    "store seq_cst wake_at", "seen = load acquire seq\nstore seq_cst wake_at"
)


@pytest.mark.parametrize(
    ("ring", "wait"),
    [
        (PATIENT_RING, mutate(PATIENT_WAIT, "seen + missing", "seen + missing + 1")),
        (mutate(PATIENT_RING, "if n < w", "if n <= w"), PATIENT_WAIT),
        (PATIENT_RING, LATE_COUNT),
    ],
    ids=["one-too-many", "one-too-late", "looked-before-seq"],
)
def test_an_impatient_count_loses_the_last_ring(ring: str, wait: str) -> None:
    assert is_lost(model([ring, ring], [(wait, (0, 1))]))


def test_patience_needs_the_cells_behind_seq() -> None:
    """A waiter that reads `seq` relaxed may miss a cell whose ring it has counted, and then wait for one ring
    too many."""
    hasty = PATIENT_WAIT.replace("load acquire seq", "load relaxed seq")
    assert is_lost(model([PATIENT_RING], [(hasty, (0,))], WEAK))


# ---------------------------------------------------------------- rings for sleepers only

QUIET_WAITS = [QUIET_WAIT, QUIET_WAIT_FOR_ALL]


@pytest.mark.parametrize("wait", QUIET_WAITS)
@pytest.mark.parametrize("num_ringers", [1, 2, 3])
def test_a_sleeper_is_rung_for_though_nobody_rings_otherwise(num_ringers: int, wait: str) -> None:
    words = tuple(range(num_ringers))
    assert check(model([QUIET_RING] * num_ringers, [(wait, words)])).violation is None


@pytest.mark.parametrize("wait", QUIET_WAITS)
def test_quiet_rings_and_those_of_others_do_no_harm(wait: str) -> None:
    """A rank that is not awaited, one of point-to-point, and another thread that sleeps for point-to-point."""
    assert check(model([QUIET_RING, QUIET_RING, RING], [(wait, (0, 1))])).violation is None
    assert check(model([QUIET_RING, RING], [(wait, (0,)), (WAIT, (1,))])).violation is None


@pytest.mark.parametrize("wait", QUIET_WAITS)
def test_quiet_rings_hold_out_of_order(wait: str) -> None:
    assert check(model([QUIET_RING], [(wait, (0,))], WEAK)).violation is None


QUIET_LOOK_ONCE = mutate(
    QUIET_WAIT, "    {look}\n    if missing == 0 goto awake\n", "    if missing == 0 goto awake\n"
)
LATE_QUIET_SEEN = mutate(
    QUIET_WAIT_FOR_ALL, "    seen = load acquire seq         # SYNC: word\n    {look}\n", "    {look}\n"
).replace("    store seq_cst wake_at", "    seen = load acquire seq\n    store seq_cst wake_at")


@pytest.mark.parametrize(
    ("ring", "wait"),
    [
        (QUIET_RING, QUIET_LOOK_ONCE),
        (mutate(QUIET_RING, "if n < w", "if n <= w"), QUIET_WAIT),
        (QUIET_RING, QUIET_WAIT.replace("seen + missing", "seen + missing + 1")),
        (mutate(QUIET_RING, "wake seq", ""), QUIET_WAIT),
        (QUIET_RING, LATE_QUIET_SEEN),
        (QUIET_RING, QUIET_WAIT_FOR_ALL.replace("if missing != before goto awake", "missing := before")),
    ],
    ids=[
        "no-look-behind-the-mark",
        "one-too-late",
        "one-too-many",
        "ringer-never-wakes",
        "looked-before-seq",
        "sleeps-for-all-although-one-has-come",
    ],
)
def test_a_quiet_mutant_loses_one(ring: str, wait: str) -> None:
    assert is_lost(model([ring] * 2, [(wait, (0, 1))]))


@pytest.mark.parametrize(
    ("ring", "wait"),
    [
        (mutate(QUIET_RING, "    fence seq_cst                   # SYNC: bell-quiet\n", ""), QUIET_WAIT),
        *[
            (
                QUIET_RING,
                mutate(wait, "    fence seq_cst                   # SYNC: bell-quiet\n", "").replace(
                    "add seq_cst sleepers 1 ", "add relaxed sleepers 1 "
                ),
            )
            for wait in QUIET_WAITS
        ],
    ],
    ids=["ringer-without-fence", "waiter-without-fence", "waiter-for-all-without-fence"],
)
def test_quiet_rings_need_a_fence_on_both_sides(ring: str, wait: str) -> None:
    weak = model([ring], [(wait, (0,))], WEAK)
    assert is_lost(weak)
    assert check(Model(weak.programs, weak.memory)).violation is None
