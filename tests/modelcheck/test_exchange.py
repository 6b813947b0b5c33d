"""Exchanges of a group in which somebody gives up: nobody takes other bytes than were announced, or waits for nothing.

`GIVE` and `TAKE` are `alltoall_send`, `pull_pieces` and `alltoall_go_on` of bus/memory/_collectives_alltoall.c for
pieces that are staged in two halves in turn. `OWN` and `PULL` are the same for a piece in the sender's app area, and
the rows of a dispatch (`withdraw` and `find_withdrawn` of _collectives_dispatch.c), where the sender waits for an
answer: `has_left` of _collectives_group.c. A word stands for a cell, and is the event id, plus 16 if that is withdrawn.
"""

from __future__ import annotations

import pytest

from tests.modelcheck.checker import Model, check
from tests.modelcheck.program import mutate, parse

WEAK = 5
EVENTS = 3

# ---------------------------------------------------------------- two halves

GIVE = """
next:
    event := event + 1
    if event > {events} goto out
    store relaxed cell[event % 2] = 0
    fence release                   # SYNC: piece-torn
    store relaxed half[event % 2] = event
    store release cell[event % 2] = event
wait:
    late = load relaxed give_up
    if late > used goto withdraw
    t = load acquire other          # what the taker has announced
    if t < event goto wait
    goto next
withdraw:
    used := late
    store relaxed gave_up[event] = 1
    store relaxed cell[event % 2] = 0
    fence release
    store release cell[event % 2] = event + 16
    goto next
out:
"""
TAKE = """
next:
    event := event + 1
    if event > {events} goto out
    store release other = event
look:
    a = load acquire cell[0]
    b = load acquire cell[1]
    if a == event + 16 or b == event + 16 goto left
    lane := 0
    if a == event goto pull
    lane := 1
    if b == event goto pull
    if a % 16 <= event and b % 16 <= event goto look
    a = load acquire cell[0]        # has it published both since?
    b = load acquire cell[1]
    lane := 0
    if a == event goto pull
    lane := 1
    if b == event goto pull
left:
    store relaxed lost[event] = 1
    goto next
pull:
    v = load relaxed half[lane]
    fence acquire                   # SYNC: piece-torn
    w = load relaxed cell[lane]
    if w != event goto left
    assert v == event               # what was announced
    goto next
out:
"""


def halves(
    give: str = GIVE, take: str = TAKE, *, gives_up: bool, window: int = 1, events: int = EVENTS
) -> Model:
    programs = [parse("giver", give.format(events=events)), parse("taker", take.format(events=events))]
    if gives_up:
        programs.append(parse("clock", "store relaxed give_up = 1\nstore relaxed give_up = 2"))
    names = ["cell[0]", "cell[1]", "half[0]", "half[1]", "other", "give_up"]
    names += [f"{name}[{event}]" for name in ("lost", "gave_up") for event in range(1, events + 1)]
    memory, final = (
        dict.fromkeys(names, 0),
        "all(lost[e] <= gave_up[e] + gave_up.get(e + 1, 0) for e in lost)",
    )
    return Model(tuple(programs), memory, window, final=final, progress=window == 1)


def test_every_piece_arrives_though_halves_are_used_again() -> None:
    assert check(halves(gives_up=False, events=4)).violation is None


def test_who_gives_up_costs_others_that_exchange_and_perhaps_the_one_before() -> None:
    """A taker that has announced the one before may not have pulled yet, and the giver waits for nobody in between."""
    assert check(halves(gives_up=True)).violation is None


@pytest.mark.parametrize(("gives_up", "window"), [(False, WEAK), (True, 2), (True, 3)])
def test_halves_hold_out_of_order(gives_up: bool, window: int) -> None:
    assert check(halves(gives_up=gives_up, window=window)).violation is None


@pytest.mark.parametrize(
    ("give", "take", "gives_up"),
    [
        (GIVE.replace("half[event % 2]", "half[0]"), TAKE, False),
        (GIVE.replace("half[event % 2]", "half[0]"), TAKE.replace("half[lane]", "half[0]"), False),
        (GIVE, mutate(TAKE, "if w != event goto left\n", ""), True),
        (mutate(GIVE, "if t < event goto wait", "if t < event - 1 goto wait"), TAKE, False),
    ],
    ids=["wrong-half", "one-half", "no-second-look", "does-not-wait"],
)
def test_a_mutant_of_halves_is_caught(give: str, take: str, gives_up: bool) -> None:
    assert check(halves(give, take, gives_up=gives_up)).violation is not None


# ---------------------------------------------------------------- a piece that stays where it is, and its answer

OWN = """
    store relaxed piece = 1
    store release cell = 1
wait:
    a = load acquire answer
    if a == 1 goto answered
    late = load relaxed give_up_g
    if late == 1 goto withdraw
    t = load acquire other          # the taker's own announcement: it has left if that says so
    if t == 1 goto wait
    a = load acquire answer
    if a == 1 goto answered
    store relaxed told = 2
    goto withdraw
answered:
    store relaxed told = 1
    store relaxed piece = 2         # the caller's next use of it
    end
withdraw:
    store relaxed cell = 0
    fence release                   # SYNC: cell-torn
    store release cell = 17
    store relaxed piece = 2
"""
PULL = """
look:
    late = load relaxed give_up_t
    if late == 1 goto leave
    c = load acquire cell
    if c == 0 goto look
    if c != 1 goto leave
    v = load relaxed piece
    fence acquire                   # SYNC: piece-torn
    w = load relaxed cell
    if w != 1 goto leave
    assert v == 1                   # what was announced
    store relaxed taken = 1
    store release answer = 1
    store release other = {next}    # it goes on at once
    end
leave:
    store release other = {left}
"""
# told: 0 = gave up itself, 1 = answered, 2 = the taker has left.
TRUE = "told == 0 or told == 1 + (taken == 0)"


def piece(own: str = OWN, pull: str = PULL, *, window: int = 1, left: int = 17, clocks: str = "gt") -> Model:
    """A taker that leaves withdraws (17), or announces its next event (2)."""
    programs = [parse("giver", own), parse("taker", pull.format(next=2, left=left))]
    programs += [parse(f"clock_{c}", f"store relaxed give_up_{c} = 1") for c in clocks]
    names = ("piece", "cell", "answer", "told", "taken", "give_up_g", "give_up_t")
    memory = dict.fromkeys(names, 0) | {"other": 1}
    return Model(tuple(programs), memory, window, final=TRUE, progress=window == 1)


@pytest.mark.parametrize("left", [2, 17])
@pytest.mark.parametrize("clocks", ["gt", "g", "t", ""])
def test_a_piece_is_taken_as_announced_and_its_owner_is_told_the_truth(left: int, clocks: str) -> None:
    """Each side may give up at any moment; without clocks nobody does, so everybody ends by the other's words."""
    assert check(piece(left=left, clocks=clocks)).violation is None


@pytest.mark.parametrize("clocks", ["g", "t"])
def test_a_piece_is_taken_as_announced_out_of_order(clocks: str) -> None:
    assert check(piece(window=WEAK, clocks=clocks)).violation is None


WITHDRAWS = "    store relaxed cell = 0\n    fence release                   # SYNC: cell-torn\n"


@pytest.mark.parametrize(
    ("own", "pull", "clocks"),
    [
        (mutate(OWN, WITHDRAWS + "    store release cell = 17\n", ""), PULL, "g"),
        (OWN, mutate(PULL, "    if w != 1 goto leave\n", ""), "g"),
        (OWN, mutate(mutate(PULL, "    if c != 1 goto leave\n", ""), "if w != 1", "if w != c"), "g"),
        (mutate(OWN, "    t = load acquire other ", "    t := 1 "), PULL, "t"),
        (
            mutate(
                OWN,
                "    if t == 1 goto wait\n    a = load acquire answer\n    if a == 1 goto answered\n",
                "    if t == 1 goto wait\n",
            ),
            PULL,
            "",
        ),
        (
            OWN,
            mutate(PULL, "    store release answer = 1\n", "").replace(
                "    end\n", "    store release answer = 1\n    end\n"
            ),
            "",
        ),
    ],
    ids=[
        "does-not-withdraw",
        "no-second-look",
        "takes-what-is-withdrawn",
        "waits-for-who-has-left",
        "takes-who-is-ahead-for-gone",
        "goes-on-before-it-answers",
    ],
)
def test_a_mutant_of_a_piece_is_caught(own: str, pull: str, clocks: str) -> None:
    assert check(piece(own, pull, clocks=clocks)).violation is not None


@pytest.mark.parametrize(
    ("own", "pull", "clocks"),
    [
        (mutate(OWN, "    fence release                   # SYNC: cell-torn\n", ""), PULL, "g"),
        (mutate(OWN, WITHDRAWS, ""), PULL, "g"),
        (OWN, mutate(PULL, "    fence acquire                   # SYNC: piece-torn\n", ""), "g"),
        (OWN, mutate(PULL, "c = load acquire cell", "c = load relaxed cell"), ""),
        (mutate(OWN, "store release cell = 1\n", "store relaxed cell = 1\n"), PULL, ""),
        (OWN, mutate(PULL, "store release other = {next} ", "store relaxed other = {next} "), ""),
        (mutate(OWN, "t = load acquire other", "t = load relaxed other"), PULL, ""),
    ],
    ids=[
        "no-release-fence",
        "a-release-store-alone",
        "no-acquire-fence",
        "cell-not-acquired",
        "cell-relaxed",
        "next-event-relaxed",
        "next-event-not-acquired",
    ],
)
def test_a_weaker_order_is_caught(own: str, pull: str, clocks: str) -> None:
    """In program order each of these is right."""
    assert check(piece(own, pull, window=WEAK, clocks=clocks)).violation is not None
    assert check(piece(own, pull, clocks=clocks)).violation is None
