"""A point-to-point link: what is received is what was sent, in order, once, whole; both ends end.

`SEND` and `RECEIVE` are one record per message with both doorbells, as `claim`, `commit` and `link_publish` of
bus/memory/_native_send.c and _native_link.c, and `next_record` and `release` of _native_recv.c. A cell is one
word here, which test_cell.py justifies; so are a slot's record and its payload two. `SEND_WHOLE` and
`RECEIVE_WHOLE` are messages of two records whose sender or receiver may give up at any moment: `is_taken` and
`advance`.
"""

from __future__ import annotations

import pytest

from tests.modelcheck.checker import Model, check
from tests.modelcheck.program import mutate, parse

SEND = """
next:
    if tail == {count} goto sent
claim:
    if tail - head < {slots} goto free
    seen = load acquire bell_s
    head = load acquire ack         # SYNC: ring-free
    if tail - head < {slots} goto free
    m = add seq_cst asleep_s 1
    now = load seq_cst bell_s
    if now != seen goto awake
    sleep bell_s == seen
awake:
    m = add seq_cst asleep_s -1
    goto claim
free:
    store relaxed payload[tail % {slots}] = tail + 1
    store relaxed record[tail % {slots}] = tail
    store release data = tail + 1   # SYNC: ring-data
    tail := tail + 1
    n = add seq_cst bell_r 1
    s = load seq_cst asleep_r
    if s == 0 goto next
    wake bell_r
    goto next
sent:
"""
RECEIVE = """
next:
    if head == {count} goto received
    if head < tail goto take
    seen = load acquire bell_r
    tail = load acquire data        # SYNC: ring-data
    if head < tail goto take
    m = add seq_cst asleep_r 1
    now = load seq_cst bell_r
    if now != seen goto awake
    sleep bell_r == seen
awake:
    m = add seq_cst asleep_r -1
    goto next
take:
    position = load relaxed record[head % {slots}]
    value = load relaxed payload[head % {slots}]
    assert position == head
    assert value == head + 1
    store release ack = head + 1    # SYNC: ring-free
    head := head + 1
    n = add seq_cst bell_s 1
    s = load seq_cst asleep_s
    if s == 0 goto next
    wake bell_s
    goto next
received:
"""


def link(slots: int, count: int, window: int = 1, send: str = SEND, receive: str = RECEIVE) -> Model:
    programs = [
        parse(name, text.format(slots=slots, count=count))
        for name, text in (("sender", send), ("receiver", receive))
    ]
    words = {"data": 0, "ack": 0, "bell_s": 0, "bell_r": 0, "asleep_s": 0, "asleep_r": 0}
    memory = {f"{part}[{i}]": -1 for part in ("payload", "record") for i in range(slots)} | words
    final = f"data == ack == {count}"
    return Model(tuple(programs), memory, window, final=final, progress=window == 1)


@pytest.mark.parametrize(("slots", "count"), [(1, 4), (2, 6), (3, 7)])
def test_records_arrive_once_and_in_order(slots: int, count: int) -> None:
    """Rings that wrap twice; with one slot the sender waits before every record, with three now and then."""
    assert check(link(slots, count)).violation is None


def test_records_arrive_out_of_order_too() -> None:
    """On a weak memory: the window holds a whole record, its cell and the look at the bell."""
    assert check(link(1, 2, 4)).violation is None


@pytest.mark.slow
def test_larger_bounds() -> None:
    assert check(link(4, 13)).violation is None
    assert check(link(2, 3, 5)).violation is None


RINGS_FIRST = mutate(SEND, "    store release data = tail + 1   # SYNC: ring-data\n", "").replace(
    "    if s == 0 goto next\n    wake bell_r\n",
    "    if s == 0 goto quiet\n    wake bell_r\nquiet:\n    store release data = tail\n",
)
PUBLISHES_FIRST = mutate(
    mutate(SEND, "    store relaxed payload[tail % {slots}] = tail + 1\n", ""),
    "    n = add seq_cst bell_r 1",
    "    store relaxed payload[(tail - 1) % {slots}] = tail\n    n = add seq_cst bell_r 1",
)
ACKS_FIRST = mutate(
    mutate(RECEIVE, "    store release ack = head + 1    # SYNC: ring-free\n", ""),
    "    position = load",
    "    store release ack = head + 1\n    position = load",
)


@pytest.mark.parametrize(
    ("send", "receive"),
    [
        (RINGS_FIRST, RECEIVE),
        (PUBLISHES_FIRST, RECEIVE),
        (SEND, ACKS_FIRST),
        (SEND.replace("tail - head < {slots}", "tail - head <= {slots}"), RECEIVE),
        (
            SEND,
            mutate(
                RECEIVE, "    tail = load acquire data        # SYNC: ring-data\n", "    tail := tail + 1\n"
            ),
        ),
        (SEND, RECEIVE.replace("    n = add seq_cst bell_s 1\n", "")),
        (
            mutate(
                SEND, "    if now != seen goto awake\n    sleep bell_s == seen", "    sleep bell_s == now"
            ),
            RECEIVE,
        ),
    ],
    ids=[
        "rings-before-it-publishes",
        "publishes-before-the-copy",
        "acknowledges-before-the-copy",
        "one-slot-too-many",
        "takes-what-is-not-published",
        "acknowledges-without-a-ring",
        "sleeps-without-comparing",
    ],
)
def test_a_mutant_is_caught(send: str, receive: str) -> None:
    assert check(link(2, 5, send=send, receive=receive)).violation is not None


@pytest.mark.parametrize(
    ("send", "receive"),
    [
        (mutate(SEND, "store release data", "store relaxed data"), RECEIVE),
        (SEND, mutate(RECEIVE, "load acquire data", "load relaxed data")),
        (SEND, mutate(RECEIVE, "store release ack", "store relaxed ack")),
    ],
    ids=["tail-relaxed", "tail-not-acquired", "head-relaxed"],
)
def test_a_weaker_order_is_caught(send: str, receive: str) -> None:
    """In program order each of these is right."""
    assert check(link(1, 2, 5, send, receive)).violation is not None
    assert check(link(1, 2, 1, send, receive)).violation is None


# ---------------------------------------------------------------- messages of two records, and giving up

SEND_WHOLE = """
message:
    event := event + 1
    if event > {messages} goto sent
    chunk := 0
push:
    if tail - head < {slots} goto free
    late = load relaxed give_up_s
    if late > used goto give_up
    a = load acquire ack
    head := a % 16
    goto push
free:
    store relaxed record[tail % {slots}] = event * 2 + chunk
    tail := tail + 1
    store release data = tail
    chunk := chunk + 1
    if chunk < 2 goto push
await:
    late = load relaxed give_up_s
    if late > used goto give_up
    a = load acquire ack            # head, tail at the end of the last message taken, drops
    head := a % 16
    if head < tail goto await
    if a // 16 % 16 == tail goto taken
    if a // 16 % 16 > tail and a // 256 == drops goto taken
    store relaxed told[event] = 2   # head alone at the tail: given up
    goto finish
taken:
    store relaxed told[event] = 1
finish:
    drops := a // 256
    goto message
give_up:
    used := late
    if head != tail goto message
    drops := a // 256
    goto message
sent:
    store relaxed told[0] = 1
"""
RECEIVE_WHOLE = """
call:
    begun := 0
advance:
    if position < tail goto record
    tail = load acquire data
    if position < tail goto record
    if fresh == 0 goto idle
    fresh := 0
    store release ack = position + 16 * end + 256 * drops
idle:
    late = load relaxed give_up_r
    if late > used goto give_up
    over = load acquire told[0]
    if over == 0 goto advance
    tail = load acquire data
    if position < tail goto record
    goto out
give_up:
    used := late
    goto call
record:
    if fresh < {half} goto look
    fresh := 0
    store release ack = position + 16 * end + 256 * drops
look:
    r = load relaxed record[position % {slots}]
    if begun == 1 goto continue
    if r % 2 == 0 goto begin
    drops := drops + 1              # left over from a send that gave up
    position := position + 1
    fresh := fresh + 1
    goto advance
begin:
    begun := 1
    pieces := 0
    event := r // 2
    chunk := 0
continue:
    if r == event * 2 + chunk goto take
    drops := drops + 1
    goto call
take:
    assert r == event * 2 + chunk   # nothing of another message
    position := position + 1
    fresh := fresh + 1
    chunk := chunk + 1
    pieces := pieces + 1
    if chunk < 2 goto advance
    assert event > last             # no message twice, none out of order
    assert pieces == 2              # nor half of one
    last := event
    store relaxed got[event] = 1
    end := position
    fresh := 0
    store release ack = position + 16 * end + 256 * drops
    goto call
out:
"""
MESSAGES = 2


def messages(slots: int, send: str = SEND_WHOLE, receive: str = RECEIVE_WHOLE) -> Model:
    values = {"slots": slots, "messages": MESSAGES, "half": max(1, slots // 2)}
    programs = (
        parse("sender", send.format(**values)),
        parse("receiver", receive.format(**values)),
        parse("clock_s", "store relaxed give_up_s = 1"),
        parse("clock_r", "store relaxed give_up_r = 1"),
    )
    memory = {f"record[{i}]": 0 for i in range(slots)} | {f"told[{i}]": 0 for i in range(MESSAGES + 1)}
    memory |= {f"got[{i}]": 0 for i in range(1, MESSAGES + 1)}
    memory |= {"data": 0, "ack": 0, "give_up_s": 0, "give_up_r": 0}
    return Model(programs, memory, final=TRUE_TO_WORD, progress=True)


# told: 1 = taken, 2 = given up, 0 = the sender itself gave up before it knew. got: 1 = received whole.
TRUE_TO_WORD = "all(told[i] == 0 or got[i] == (told[i] == 1) for i in got)"


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_the_sender_is_told_the_truth(slots: int) -> None:
    """Either side may give up once, at any moment; what the sender hears of a message is what became of it."""
    assert check(messages(slots)).violation is None


BEGINS_ANYWHERE = mutate(
    mutate(RECEIVE_WHOLE, "if r % 2 == 0 goto begin", "goto begin"), "chunk := 0", "chunk := r % 2"
)


@pytest.mark.parametrize(
    ("send", "receive"),
    [
        (SEND_WHOLE, mutate(RECEIVE_WHOLE, "if r == event * 2 + chunk goto take", "goto take")),
        (SEND_WHOLE, BEGINS_ANYWHERE),
        (mutate(SEND_WHOLE, "if a // 16 % 16 == tail goto taken", "goto taken"), RECEIVE_WHOLE),
        (SEND_WHOLE, mutate(RECEIVE_WHOLE, "end := position", "end := 0")),
    ],
    ids=["mixes-two-messages", "begins-in-the-middle", "head-alone-is-an-ack", "end-is-not-told"],
)
def test_a_false_word_is_caught(send: str, receive: str) -> None:
    assert check(messages(1, send, receive)).violation is not None
