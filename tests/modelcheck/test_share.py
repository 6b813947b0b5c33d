"""Sharing a copy: every unit is copied once, nobody writes to an array or reads one that was given back.

`RECEIVE` is `share_copy` of bus/memory/_native_share.c, `SEND` the wait of `send` and `share_help`. `shares` holds
front + 8 * back. Copying a unit is a load of the sender's array and a store to the receiver's: the receiver does both,
the sender stores what it knows. Afterwards each caller uses its own array for something else (9).
"""

from __future__ import annotations

import pytest

from tests.modelcheck.checker import Model, check
from tests.modelcheck.program import mutate, parse

SEND = """
    store relaxed source = 5
    store release data = 1
poll:
    i = load acquire invited        # SYNC: share-invite
    if i == 1 goto claim
    a = load acquire ack
    if a == 0 goto poll
    goto taken
claim:
    w = update relaxed shares (old - 8 if old % 8 < old // 8 else old)
    if w % 8 >= w // 8 goto full
    t = load relaxed target
    assert t == 1                   # it knows where to write
    u := w // 8 - 1
    store relaxed out[u] = 5
    claimed := 1
    goto claim
full:
    if claimed == 0 goto await
    store release helped = 1        # SYNC: share-done
await:
    a = load acquire ack
    if a == 0 goto await
taken:
    store relaxed source = 9
"""
RECEIVE = """
wait:
    d = load acquire data
    if d == 0 goto wait
    store relaxed target = 1
    store relaxed shares = 1 + 8 * {units}
    store release invited = 1       # SYNC: share-invite
    v = load relaxed source
    store relaxed out[0] = v
claim:
    w = update relaxed shares (old + 1 if old % 8 < old // 8 else old)
    if w % 8 >= w // 8 goto last
    v = load relaxed source
    store relaxed out[w % 8] = v
    goto claim
last:
    if w // 8 == {units} goto look
done:
    h = load acquire helped         # SYNC: share-done
    if h == 0 goto done
look:
    k := {units} - 1
each:
    v = load relaxed out[k]
    assert v == 5                   # the whole message, and nothing else
    k := k - 1
    if k >= 0 goto each
    store release ack = 1
    k := 0
reuse:
    store relaxed out[k] = 9
    k := k + 1
    if k < {units} goto reuse
"""


def sharing(units: int, window: int = 1, send: str = SEND, receive: str = RECEIVE) -> Model:
    programs = (parse("sender", send), parse("receiver", receive.format(units=units)))
    memory = {f"out[{i}]": 0 for i in range(units)}
    memory |= dict.fromkeys(("source", "data", "ack", "invited", "target", "shares", "helped"), 0)
    final = "all(value == 9 for value in out.values())"
    return Model(programs, memory, window, final=final, progress=window == 1)


@pytest.mark.parametrize("units", [1, 2, 3, 4])
def test_every_unit_is_copied_and_each_caller_has_its_array_back(units: int) -> None:
    assert check(sharing(units)).violation is None


@pytest.mark.parametrize("window", [3, 5])
def test_out_of_order_too(window: int) -> None:
    assert check(sharing(2, window)).violation is None


SAYS_FIRST = mutate(SEND, "    if claimed == 0 goto await\n", "").replace(
    "claim:\n", "claim:\n    store relaxed helped = 1\n"
)
CLAIMS_IN_TWO_STEPS = mutate(
    mutate(
        SEND, "w = update relaxed shares (old - 8 if old % 8 < old // 8 else old)", "w = load relaxed shares"
    ),
    "    claimed := 1\n",
    "    claimed := 1\n    store relaxed shares = w - 8\n",
)
NEVER_SAYS = mutate(
    SEND, "    if claimed == 0 goto await\n    store release helped = 1        # SYNC: share-done\n", ""
)
INVITES_FIRST = mutate(
    mutate(RECEIVE, "    store relaxed target = 1\n", ""),
    "    v = load relaxed source\n    store relaxed out[0]",
    "    store relaxed target = 1\n    v = load relaxed source\n    store relaxed out[0]",
)


@pytest.mark.parametrize(
    ("send", "receive"),
    [
        (SEND, mutate(RECEIVE, "    if h == 0 goto done\n", "")),
        (SEND, mutate(RECEIVE, "if w // 8 == {units} goto look", "goto look")),
        (SAYS_FIRST, RECEIVE),
        (CLAIMS_IN_TWO_STEPS, RECEIVE),
        (NEVER_SAYS, RECEIVE),
        (SEND, INVITES_FIRST),
    ],
    ids=[
        "does-not-wait",
        "never-waits",
        "says-done-first",
        "claims-in-two-steps",
        "never-says-done",
        "invites-first",
    ],
)
def test_a_mutant_is_caught(send: str, receive: str) -> None:
    assert check(sharing(3, send=send, receive=receive)).violation is not None


@pytest.mark.parametrize(
    ("send", "receive"),
    [
        (mutate(SEND, "store release helped", "store relaxed helped"), RECEIVE),
        (SEND, mutate(RECEIVE, "load acquire helped", "load relaxed helped")),
        (SEND, mutate(RECEIVE, "store release invited", "store relaxed invited")),
        (mutate(SEND, "load acquire invited", "load relaxed invited"), RECEIVE),
    ],
    ids=["done-relaxed", "done-not-acquired", "invite-relaxed", "invite-not-acquired"],
)
def test_a_weaker_order_is_caught(send: str, receive: str) -> None:
    assert check(sharing(2, 5, send, receive)).violation is not None
