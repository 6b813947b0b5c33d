"""The other process of a litmus test: `python child.py ROLE ARGUMENT...`. Prints `ready`, acts, prints its findings."""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np

from bus.clock import NS_PER_S, Deadline, now_ns
from bus.memory import _native
from bus.memory.ring import Producer, RingLayout
from bus.memory.segment import Segment
from bus.memory.wait import Adaptive, Doorbell, wait_until

WAIT_NS = 10 * NS_PER_S
RING = RingLayout(num_slots=64, slot_bytes=64)


def say(*words: object) -> None:
    print(*words, flush=True)


def write_two_words(segment: Segment, count: int) -> None:
    """Message passing: `data` first, then `flag`."""
    buf, base = segment.buf, segment.layout.app_offset
    for i in range(1, count + 1):
        _native.store_u64(buf, base, i)
        _native.store_u64(buf, base + 64, i)


def write_cells(segment: Segment, count: int) -> None:
    """Seqlock: the words of a cell follow from its sequence word."""
    buf, offset = segment.buf, segment.cell_offset(0)
    for i in range(1, count + 1):
        _native.write_cell(buf, offset, i, i * 3, i * 5, i ^ 0xFFFFFFFF)


def store_buffer(segment: Segment, mine: int, count: int) -> None:
    """Store buffering: bump the own word, then read the other's; note down what was read."""
    buf, base = segment.buf, segment.layout.app_offset
    own, other = base + 64 * mine, base + 64 * (1 - mine)
    seen = segment.array(base + 4096 + mine * 8 * (count + 1), (count + 1,), np.uint64)
    for i in range(1, count + 1):
        _native.fetch_add_u64(buf, own, 1)
        seen[i] = _native.load_u64(buf, other)


def answer_rings(segment: Segment, bells: list[Doorbell], until_ns: int) -> tuple[int, int]:
    """Ping-pong: wait on bells[0], answer on bells[1]. Returns (rounds, wake-ups that came only by time-out)."""
    rounds = lost = 0
    while now_ns() < until_ns:
        spin_ns = (0, 0, 300, 3_000)[rounds % 4]
        start_ns = now_ns()
        seq = bells[0].wait(rounds, spin_ns, WAIT_NS)
        if seq != rounds + 1:
            break
        lost += now_ns() - start_ns >= WAIT_NS
        rounds += 1
        bells[1].ring()
    return rounds, lost


def ring_often(segment: Segment, count: int) -> None:
    """Many to one: announce work, then ring."""
    for _ in range(count):
        _native.fetch_add_u64(segment.buf, segment.layout.app_offset, 1)
        segment.ring_doorbell()


def produce(segment: Segment, source: int, count: int) -> None:
    """Fill a ring with records that name their source and number."""
    producer = Producer(segment.managed, RING)
    strategy, bell = Adaptive(20_000), Doorbell(segment.buf, segment.layout.app_offset)
    for seq in range(count):
        slot = wait_until(
            producer.try_claim,
            bell,
            strategy,
            Deadline.after_ms(20_000),
            check=lambda: None,
            check_interval_ns=NS_PER_S,
        )
        if slot is None:
            raise TimeoutError("the ring stayed full")
        np.frombuffer(slot, np.uint32)[:] = (source, seq) * 8
        producer.commit(64, event_id=seq)
        segment.ring_doorbell()


ROLES: dict[str, Callable[[list[str]], None]] = {}


def role(function: Callable[[list[str]], None]) -> Callable[[list[str]], None]:
    ROLES[function.__name__.replace("_", "-")] = function
    return function


@role
def two_words(args: list[str]) -> None:
    write_two_words(attached(args[0]), int(args[1]))


@role
def cells(args: list[str]) -> None:
    write_cells(attached(args[0]), int(args[1]))


@role
def store_buffering(args: list[str]) -> None:
    segment = attached(args[0])
    _native.store_u32(segment.buf, segment.layout.app_offset + 1024, 1)
    store_buffer(segment, 1, int(args[1]))


@role
def ping_pong(args: list[str]) -> None:
    segment = attached(args[0])
    base = segment.layout.app_offset
    bells = [Doorbell(segment.buf, base), Doorbell(segment.buf, base + 64)]
    say(*answer_rings(segment, bells, int(args[1])))


@role
def ringer(args: list[str]) -> None:
    ring_often(attached(args[0]), int(args[1]))


@role
def producer(args: list[str]) -> None:
    produce(attached(args[0]), int(args[1]), int(args[2]))


@role
def owner(args: list[str]) -> None:
    """Own a segment until stdin closes."""
    name, layout_peer = args
    template = Segment.attach(layout_peer)
    segment = Segment.create(name, template.layout, service="expert", index=9, incarnation=1)
    say("ready")
    sys.stdin.read()
    segment.close()


def attached(name: str) -> Segment:
    segment = Segment.attach(name)
    say("ready")
    return segment


if __name__ == "__main__":
    ROLES[sys.argv[1]](sys.argv[2:])
