"""Deaths are told: nobody sleeps on for a dead rank, though no sleep has a time limit.

A waiter of quiet ringers, patient, as in bus/memory/_collectives_group.c, one rank that lives, and one that may be
killed anywhere; then the end of a link, as in bus/memory/_native_wait.c. The watcher thread of the waiter's process
(bus/memory/deaths.py) goes on once the mortal's lock is free, and sounds the alarm as `sound_alarm` of
bus/memory/_native.c does. A rank that is not killed ends, too, which frees its lock.
"""

from __future__ import annotations

import pytest

from tests.modelcheck.checker import Model, check
from tests.modelcheck.program import mutate, parse

LOOK = """
    a = load acquire word[0]
    b = load acquire word[1]
    missing := (a == 0) + (b == 0)
"""
WAITER = """
    looked := -1                    # the alarms before the last look at locks: nobody has looked yet
again:
    {look}
    if missing == 0 goto whole
    m = add seq_cst asleep 1        # SYNC: bell-quiet
    fence seq_cst                   # SYNC: bell-quiet
    seen = load acquire bell        # SYNC: word
    {look}
    if missing == 0 goto awake
    store seq_cst wake_at = seen + missing
    store seq_cst patient = 1
sleep:
    now = load seq_cst bell
    alarms = load acquire alarm     # SYNC: alarm
    if now >= seen + missing goto over
    if alarms != looked goto over
    sleep bell == now
    goto sleep
over:
    store seq_cst patient = 0
awake:
    m = add seq_cst asleep -1
    alarms = load acquire alarm
    if alarms == looked goto again
    looked := alarms                # before the look
    l = load acquire lock           # a system call
    if l == 1 goto again
    b = load acquire word[1]        # the dead rank's cell, once more
    if b == 1 goto again
    store relaxed outcome = 2
    end
whole:
    store relaxed outcome = 1
""".replace("{look}", LOOK)
RINGER = """
    store release word[{i}] = 1
    fence seq_cst                   # SYNC: bell-quiet
    s = load relaxed asleep         # SYNC: bell-quiet
    if s == 0 goto out
    n = add seq_cst bell 1
    p = load seq_cst patient
    if p == 0 goto call
    w = load seq_cst wake_at
    if n < w goto out
call:
    wake bell
out:
"""
WATCHER = """
    until lock == 0                 # the event, and the look at the lock
    n = add seq_cst alarm 1         # SYNC: alarm
    n = add seq_cst bell 1
    s = load seq_cst asleep
    if s == 0 goto out
    wake bell
out:
"""
FINAL = "outcome == 1 + (word[1] == 0) and asleep == 0 and patient == 0"


def tells(waiter: str = WAITER, watcher: str = WATCHER, window: int = 1) -> Model:
    programs = (
        parse("waiter", waiter),
        parse("living", RINGER.format(i=0)),
        parse("mortal", RINGER.format(i=1) + "    store seq_cst lock = 0\n"),
        parse("watcher", watcher),
    )
    words = ("bell", "asleep", "patient", "wake_at", "alarm", "outcome", "word[0]", "word[1]")
    memory = {**dict.fromkeys(words, 0), "lock": 1}
    return Model(programs, memory, window, kills={"mortal": {"lock": 0}}, final=FINAL, progress=window == 1)


def test_no_death_is_missed_and_no_sleep_needs_a_time_limit() -> None:
    assert check(tells()).violation is None


@pytest.mark.parametrize("window", [2, 3])
def test_nor_out_of_order(window: int) -> None:
    assert check(tells(window=window)).violation is None


ALARM_FIRST = "    n = add seq_cst alarm 1         # SYNC: alarm\n    n = add seq_cst bell 1\n"
RING_FIRST = "    n = add seq_cst bell 1\n    n = add seq_cst alarm 1\n"
LOOKED = "    looked := alarms                # before the look\n    l = load acquire lock           # a system call\n"
NOTED_LATE = "    l = load acquire lock\n    looked = load acquire alarm\n"


@pytest.mark.parametrize(
    ("waiter", "watcher"),
    [
        (WAITER, mutate(WATCHER, ALARM_FIRST, RING_FIRST)),
        (mutate(WAITER, "    if alarms != looked goto over\n", ""), WATCHER),
        (mutate(WAITER, LOOKED, NOTED_LATE), WATCHER),
        (mutate(WAITER, "    if b == 1 goto again\n", ""), WATCHER),
        (WAITER, mutate(WATCHER, "    n = add seq_cst bell 1\n", "")),
    ],
    ids=[
        "rings-before-it-counts",
        "sleeps-through-it",
        "notes-it-after-the-look",
        "no-last-look",
        "does-not-ring",
    ],
)
def test_a_careless_one_is_caught(waiter: str, watcher: str) -> None:
    assert check(tells(waiter, watcher)).violation is not None


# ---------------------------------------------------------------- the end of a link

END = """
    looked := -1
again:
    seen = load acquire bell        # SYNC: word
    d = load acquire data
    if d == 1 goto whole
    alarms = load acquire alarm     # SYNC: alarm
    if alarms != looked goto look
    m = add seq_cst asleep 1
    now = load seq_cst bell
    if now != seen goto awake
    sleep bell == seen
awake:
    m = add seq_cst asleep -1
    goto again
look:
    looked := alarms                # before the look
    l = load acquire lock           # a system call
    if l == 1 goto again
    d = load acquire data           # what it published before it died is still found
    if d == 1 goto again
    store relaxed outcome = 2
    end
whole:
    store relaxed outcome = 1
"""
SENDER = """
    store release data = 1
    n = add seq_cst bell 1
    s = load seq_cst asleep
    if s == 0 goto out
    wake bell
out:
    store seq_cst lock = 0
"""
SEEN = "    seen = load acquire bell        # SYNC: word\n"
READ = "    alarms = load acquire alarm     # SYNC: alarm\n"
EARLY = mutate(mutate(END, READ, ""), SEEN, READ + SEEN)


def hears(end: str = END, watcher: str = WATCHER, window: int = 1) -> Model:
    programs = (parse("receiver", end), parse("sender", SENDER), parse("watcher", watcher))
    memory = {**dict.fromkeys(("bell", "asleep", "alarm", "data", "outcome"), 0), "lock": 1}
    final = "outcome == 2 - data and asleep == 0"
    return Model(programs, memory, window, kills={"sender": {"lock": 0}}, final=final, progress=window == 1)


@pytest.mark.parametrize("window", [1, 2, 3, 4])
def test_the_end_of_a_link_hears_it_too(window: int) -> None:
    assert check(hears(window=window)).violation is None


@pytest.mark.parametrize(
    ("end", "watcher"),
    [
        (EARLY, WATCHER),
        (END, mutate(WATCHER, ALARM_FIRST, RING_FIRST)),
        (mutate(END, "    if d == 1 goto again\n", ""), WATCHER),
        (mutate(END, "    looked := -1\n", ""), "    end\n"),
    ],
    ids=[
        "reads-the-alarm-before-seq",
        "rings-before-it-counts",
        "no-last-look",
        "trusts-who-was-dead-before",
    ],
)
def test_a_careless_end_is_caught(end: str, watcher: str) -> None:
    assert check(hears(end, watcher)).violation is not None
