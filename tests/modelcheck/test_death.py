"""Owner death at every step: the survivor notices, loses nothing that was published, and takes nothing of the
dead for new.

The receiver lives; the sender's first incarnation may be killed anywhere, which frees its owner lock at that
moment (the kernel does it), and leaves half-written slots, an unrung bell, or its mark on a bell. The survivor
sleeps at most a poll interval (`or timeout`), looks at the lock, and then once more at its cell:
`link_await_news` and `poll_peer` of bus/memory/_native_wait.c. The next incarnation begins when it holds the
rank's lock, has an own segment without a grant, and writes after the survivor has granted it the ring anew:
`_renew` of bus/xccl/channel.py. A cell is one word here, its stamp the incarnation.
"""

from __future__ import annotations

from functools import partial

import pytest

from tests.modelcheck.bells import PATIENT_RING, PATIENT_WAIT, QUIET_RING, QUIET_WAIT, look
from tests.modelcheck.checker import Model, check
from tests.modelcheck.program import mutate, parse

# Two slots and as many messages, so that no incarnation waits for an ack; the next one sends one.
SENDER = """
    until lock_{before} == 0        # the rank's lock
    store seq_cst lock_{me} = 1
    until grant[{me}] == 1          # in its own segment
send:
    if tail == {count} goto sent
    store relaxed payload[tail] = {me} * 16 + tail
    store relaxed record[tail] = tail
    tail := tail + 1
    store release data = {me} * 16 + tail
    n = add seq_cst bell 1
    s = load seq_cst asleep
    if s == 0 goto send
    wake bell
    goto send
sent:
"""
SURVIVOR = """
    peer := 1
open:
    head := 0
    heard := 0
    store release grant[peer] = 1
next:
    if head == 2 goto received
    seen = load acquire bell
    d = load acquire data
    if d // 16 == peer and d % 16 > head goto take
    m = add seq_cst asleep 1
    now = load seq_cst bell
    if now != seen goto awake
    sleep bell == seen or timeout
awake:
    m = add seq_cst asleep -1
    l = load relaxed lock_1         # F_OFD_GETLK
    if l == 1 or peer == 2 goto next
    d = load acquire data           # what it published before it died is still found
    if d // 16 == peer and d % 16 > head goto take
    store relaxed noticed = 1
    g = load relaxed data           # ghost: nothing published was left behind
    assert g // 16 != 1 or g % 16 == head
    peer := 2
    goto open
take:
    position = load relaxed record[head]
    value = load relaxed payload[head]
    assert position == head
    assert value == peer * 16 + head
    head := head + 1
    heard := heard + 1
    goto next
received:
    assert heard == 2
    store relaxed whole = peer
"""
MEMORY = {
    "payload[0]": -1,
    "payload[1]": -1,
    "record[0]": -1,
    "record[1]": -1,
    "grant[1]": 0,
    "grant[2]": 0,
    "lock_0": 0,
    "lock_1": 1,
    "lock_2": 0,
    "data": 0,
    "bell": 0,
    "asleep": 0,
    "noticed": 0,
    "whole": 0,
}
# The first incarnation lived long enough, or its death was noticed and the next one was heard to the end.
HEARD = "whole == 1 or whole == 2 and noticed == 1"


def lives(sender: str = SENDER, survivor: str = SURVIVOR, first: str = "", then: str = "") -> Model:
    programs = (
        parse("first", (first or sender).format(before=0, me=1, count=2)),
        parse("next", (then or sender).format(before=1, me=2, count=2)),
        parse("survivor", survivor),
    )
    kills = {"first": {"lock_1": 0}}
    may_wait = frozenset({"next"})  # for ever, when the first one is not killed
    return Model(programs, MEMORY, kills=kills, may_wait=may_wait, final=HEARD, progress=True)


def test_a_death_is_noticed_and_the_next_life_begins_clean() -> None:
    assert check(lives()).violation is None


NO_INCARNATION = SENDER.replace("store release data = {me} * 16 + tail", "store release data = 16 + tail")
STOPPED = mutate(SENDER, "until lock_{before} == 0 ", "until lock_{before} <= 1 ")


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"survivor": mutate(SURVIVOR, "sleep bell == seen or timeout", "sleep bell == seen")}, "for ever"),
        ({"survivor": mutate(SURVIVOR, "l = load relaxed lock_1 ", "l := 1 ")}, "no end"),
        (
            {
                "survivor": mutate(
                    SURVIVOR,
                    "    d = load acquire data           # what it published before it died is still found\n"
                    "    if d // 16 == peer and d % 16 > head goto take\n",
                    "",
                )
            },
            "g // 16 != 1",
        ),
        ({"survivor": SURVIVOR.replace("d // 16 == peer and ", "")}, "assert"),
        ({"survivor": mutate(SURVIVOR, "open:\n    head := 0", "open:")}, ""),
    ],
    ids=[
        "sleeps-without-poll",
        "never-asks-for-the-lock",
        "no-last-look",
        "no-incarnation-in-the-stamp",
        "goes-on",
    ],
)
def test_a_careless_survivor_is_caught(changes: dict[str, str], what: str) -> None:
    violation = check(lives(**changes)).violation
    assert violation is not None
    assert what in violation.what


LOOKS_FOR_THE_NEXT = "    b = load relaxed lock_2\n    if peer == 2 goto next\n    if b == 0 goto next\n"
IMPATIENT = mutate(SURVIVOR, "    if l == 1 or peer == 2 goto next\n", LOOKS_FOR_THE_NEXT)


def test_a_stopped_process_that_wakes_up_needs_the_rank_s_lock() -> None:
    """Were the next incarnation let in while the first one is merely stopped, its late writes would meet the new ones.

    Its stamps keep its words from being taken for news, but it writes over the cell and the slots of the new one. So
    what fences it off is that a rank's incarnation begins only when it holds the rank's lock: the one before has ended.
    """
    late = mutate(IMPATIENT, "assert g // 16 != 1 or g % 16 == head", "assert g >= 0")
    violation = check(lives(survivor=late, then=STOPPED)).violation
    assert violation is not None


# ---------------------------------------------------------------- the receiver dies

WAITING_SENDER = """
again:
    seen = load acquire bell
    head = load acquire ack
    if head == 1 goto taken
    m = add seq_cst asleep 1
    now = load seq_cst bell
    if now != seen goto awake
    sleep bell == seen or timeout
awake:
    m = add seq_cst asleep -1
    l = load relaxed lock
    if l == 1 goto again
    head = load acquire ack
    if head == 1 goto taken
    store relaxed outcome = 2
    end
taken:
    store relaxed outcome = 1
"""
TAKER = """
    until data == 1
    store release ack = 1
    n = add seq_cst bell 1
    s = load seq_cst asleep
    if s == 0 goto out
    wake bell
out:
"""


def waits_for_ack(sender: str) -> Model:
    programs = (parse("sender", sender), parse("receiver", TAKER))
    memory = {"data": 1, "ack": 0, "bell": 0, "asleep": 0, "lock": 1, "outcome": 0}
    final = "outcome == (1 if ack == 1 else 2)"
    return Model(programs, memory, kills={"receiver": {"lock": 0}}, final=final, progress=True)


def test_a_sender_learns_what_became_of_its_message() -> None:
    """Taken if the ack was written, dead otherwise; also when the receiver died between the ack and the ring."""
    assert check(waits_for_ack(WAITING_SENDER)).violation is None
    blind = mutate(
        WAITING_SENDER, "    head = load acquire ack\n    if head == 1 goto taken\n    store", "    store"
    )
    assert check(waits_for_ack(blind)).violation is not None
    deaf = mutate(WAITING_SENDER, " or timeout", "")
    assert check(waits_for_ack(deaf)).violation is not None


# ---------------------------------------------------------------- a collective's waiter lacks a dead rank

LOOK = look(0, 1)
# Behind each sleep the lock, and then what the dead rank may have published before.
ASKS_FOR_THE_LOCK = """
    l = load {order} lock
    if l == 1 goto again
    x1 = load acquire word[1]       # the dead rank's cell, once more
    if x1 == 1 goto again
    store relaxed outcome = 2
    end
out:
    store relaxed outcome = 1
"""
PATIENT_SURVIVOR = mutate(
    mutate(PATIENT_WAIT, "    goto again\nout:\n", ASKS_FOR_THE_LOCK.format(order="relaxed")),
    "sleep seq == seen",
    "sleep seq == seen or timeout",
).replace("{look}", LOOK)


def lacks_a_rank(survivor: str, window: int = 1, *, ring: str = PATIENT_RING, mortal: bool = True) -> Model:
    """Both ranks ring by `ring`; one may be killed anywhere. No mark of the survivor is left at the end."""
    programs = (
        parse("survivor", survivor),
        parse("living", ring.format(i=0)),
        parse("mortal", ring.format(i=1)),
    )
    words = ("seq", "sleepers", "patient", "wake_at", "outcome", "word[0]", "word[1]")
    memory = {**dict.fromkeys(words, 0), "lock": 1}
    final = "outcome == 1 + (word[1] == 0) and sleepers == 0 and patient == 0"
    kills = {"mortal": {"lock": 0}} if mortal else {}
    return Model(programs, memory, window, kills=kills, final=final, progress=window == 1)


def test_a_rank_that_dies_before_it_rings_is_noticed() -> None:
    """The living rank's ring alone does not wake a patient waiter: the poll interval does.

    The last look is what the failure rules ask for: what a rank published whole before it died counts. A waiter
    that goes by the lock alone reports a dead rank whose cell has come.
    """
    assert check(lacks_a_rank(PATIENT_SURVIVOR)).violation is None
    assert check(lacks_a_rank(mutate(PATIENT_SURVIVOR, " or timeout", ""))).violation is not None
    blind = mutate(PATIENT_SURVIVOR, "    if x1 == 1 goto again\n", "")
    assert check(lacks_a_rank(blind)).violation is not None


# ---------------------------------------------------------------- the same where only sleepers are rung for

QUIET_SURVIVOR = mutate(
    mutate(QUIET_WAIT, "    goto again\nout:\n", ASKS_FOR_THE_LOCK.format(order="acquire")),  # a system call
    "    sleep seq == now\n    goto check\n",
    "    sleep seq == now or timeout\n",
).replace("{look}", LOOK)


lacks_a_quiet_rank = partial(lacks_a_rank, ring=QUIET_RING)


def test_a_patient_waiter_of_quiet_ringers_notices_a_death() -> None:
    """Killed before its cell, between cell and ring, between ring and wake-up, or while the other one rings."""
    assert check(lacks_a_quiet_rank(QUIET_SURVIVOR)).violation is None


def test_while_both_live_no_ring_of_theirs_is_missed() -> None:
    """So it is the death that the poll interval is for."""
    deaf = mutate(QUIET_SURVIVOR, " or timeout", "")
    assert check(lacks_a_quiet_rank(deaf, mortal=False)).violation is None
    assert check(lacks_a_quiet_rank(deaf)).violation is not None


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ("    if x1 == 1 goto again\n", "", "at the end"),
        ("l = load acquire lock", "l := 1", "no end"),
        ("    store seq_cst patient = 0\n", "", "at the end"),
        (
            "awake:\n    m = add seq_cst sleepers -1",
            "    m = add seq_cst sleepers -1\nawake:",
            "at the end",
        ),
    ],
    ids=["no-last-look", "never-asks-for-the-lock", "stays-patient", "leaves-its-mark"],
)
def test_a_careless_waiter_of_quiet_ringers_is_caught(old: str, new: str, what: str) -> None:
    violation = check(lacks_a_quiet_rank(mutate(QUIET_SURVIVOR, old, new))).violation
    assert violation is not None
    assert what in violation.what


@pytest.mark.parametrize("window", [2, 3, 4])
def test_a_death_is_noticed_out_of_order_too(window: int) -> None:
    assert check(lacks_a_quiet_rank(QUIET_SURVIVOR, window)).violation is None


def test_the_last_look_comes_behind_the_lock() -> None:
    """Which a system call sees to; in program order it would not matter."""
    hasty = mutate(QUIET_SURVIVOR, "l = load acquire lock", "l = load relaxed lock")
    assert check(lacks_a_quiet_rank(hasty, 3)).violation is not None
    assert check(lacks_a_quiet_rank(hasty)).violation is None
