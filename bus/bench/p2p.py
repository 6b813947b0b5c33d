"""Section p2p: ping-pong of one pair, of four pairs alone and beside busy processes; CPU time of a sleeping waiter."""

from __future__ import annotations

from collections import defaultdict
from contextlib import nullcontext

import numpy as np

from bus.bench.busy import busy
from bus.bench.peers.ours import ADAPTIVE, BLOCKING, LIMIT, SPIN, ZERO_COPY
from bus.bench.session import OURS, Record, Session
from bus.bench.stats import figures, median_ratio, repetitions

SECTION = "p2p"
ONE_PAIR, FOUR_PAIRS = "one pair", "4 pairs"
IDLE = "sleeping waiter"
CROWD_SIZE, CROWD_RANKS = 64, 8
WARM_UP, ROUNDS_MIN, ROUNDS_MAX = 20, 4, 2000
BLOCKS = 4  # of our own ways and the limit in a turn: a few milliseconds each
IDLE_SECONDS = 0.4

Samples = dict[tuple[str, int], list[list[float]]]  # (way, size) -> rounds of ns


def run(session: Session) -> None:
    """Measure the section."""
    names = [OURS, *session.plan.peers]
    with session.open(SECTION, names, 2):
        ways = _open_pairs(session, max(session.plan.sizes), pinned=True)
        _measure_one_pair(session, ways)
        _measure_idle(session, ways)
    with session.open(SECTION, names, CROWD_RANKS):
        ways = _open_pairs(session, CROWD_SIZE, pinned=False)
        if OURS in ways:
            ways[OURS] = [ADAPTIVE, BLOCKING]
        count = session.plan.busy_processes
        for nice in (None, 19, 0):
            text = (
                FOUR_PAIRS if nice is None else f"{FOUR_PAIRS} beside {count} busy processes at nice {nice}"
            )
            with nullcontext() if nice is None else busy(count, nice):
                _measure_crowd(session, ways, text)


def _open_pairs(session: Session, size_max: int, *, pinned: bool) -> dict[str, list[str]]:
    """Return the ways of each group that is there."""
    ways = {}
    for name in list(session.groups):
        found = session.ask(
            SECTION, name, what="open_pairs", size_max=size_max, pinned=pinned, options=session.options()
        )
        if found is not None:
            ways[name] = found[0]
    return ways


def _measure_one_pair(session: Session, ways: dict[str, list[str]]) -> None:
    samples: Samples = defaultdict(list)
    blocks: Samples = defaultdict(list)
    counts: dict[tuple[str, int], list[int]] = {}
    for turn in range(session.plan.rounds):
        for size in session.plan.sizes:
            session.say(f"{SECTION}: {ONE_PAIR}, round {turn + 1} of {session.plan.rounds}, {size} bytes")
            for name in list(session.groups):
                parts = BLOCKS if name == OURS else 1
                if (name, size) not in counts:
                    counts[name, size] = _calibrate(session, name, ways[name], size, parts)
                found = _play(session, name, ways[name], size, counts[name, size], parts)
                for way, rounds in found.items():
                    samples[way, size].append([ns for block in rounds for ns in block])
                    blocks[way, size] += rounds
    limits = {size: blocks[LIMIT, size] for size in session.plan.sizes if (LIMIT, size) in blocks}
    for (way, size), rounds in samples.items():
        extra = {}
        if way.startswith(OURS) and size in limits:
            extra["to_limit"] = median_ratio(blocks[way, size], limits[size])
        _record(session, ONE_PAIR, way, size, rounds, samples, extra)


def _measure_crowd(session: Session, ways: dict[str, list[str]], scenario: str) -> None:
    samples: Samples = defaultdict(list)
    counts: dict[str, list[int]] = {}
    for turn in range(session.plan.rounds):
        session.say(f"{SECTION}: {scenario}, round {turn + 1} of {session.plan.rounds}")
        for name in list(session.groups):
            if name not in counts:
                counts[name] = _calibrate(session, name, ways[name], CROWD_SIZE, 1)
            found = _play(session, name, ways[name], CROWD_SIZE, counts[name], 1)
            for way, rounds in found.items():
                samples[way, CROWD_SIZE].append([ns for block in rounds for ns in block])
    for (way, size), rounds in samples.items():
        _record(session, scenario, way, size, rounds, samples, {})


def _record(
    session: Session,
    scenario: str,
    way: str,
    size: int,
    rounds: list[list[float]],
    samples: Samples,
    extra: dict[str, float],
) -> None:
    found, ours = figures(rounds), samples.get((ADAPTIVE, size))
    if ours is not None and len(ours) == len(rounds):
        extra["to_ours"] = median_ratio(rounds, ours)
    if way != ZERO_COPY:  # nothing moves
        extra["mb_per_s"] = size / found.p50_us
    session.records.append(Record(SECTION, way, {"scenario": scenario, "size": size}, found, extra))


def _calibrate(session: Session, name: str, ways: list[str], size: int, parts: int) -> list[int]:
    """Return how many rounds each way plays in a block."""
    found = _play(session, name, ways, size, [ROUNDS_MIN] * len(ways), 2)
    budget_s = session.plan.budget_s / parts
    return [
        repetitions(2 * float(np.median(found[way][-1])), budget_s, low=ROUNDS_MIN, high=ROUNDS_MAX // parts)
        for way in ways
        if way in found
    ]


def _play(
    session: Session, name: str, ways: list[str], size: int, counts: list[int], blocks: int
) -> dict[str, list[list[float]]]:
    """Return one-way ns by way and block, of all pairs; nothing if the group has failed."""
    if name not in session.groups:
        return {}
    answers = session.ask(
        SECTION, name, what="play", ways=ways, num_bytes=size, rounds=counts, warm_up=WARM_UP, blocks=blocks
    )
    if answers is None:
        return {}
    return {
        way: [[ns / 2 for side in answers[::2] for ns in side[way][block]] for block in range(blocks)]
        for way in ways
    }


def _measure_idle(session: Session, ways: dict[str, list[str]]) -> None:
    session.say(f"{SECTION}: {IDLE}")
    for name in list(session.groups):
        for way in ways[name]:
            if way in (LIMIT, SPIN):
                continue
            answers = session.ask(SECTION, name, what="idle", way=way, seconds=IDLE_SECONDS)
            if answers is None:
                break
            cpu_ns, wall_ns = answers[1]
            extra = {"cpu_percent": 100 * cpu_ns / wall_ns}
            session.records.append(Record(SECTION, way, {"scenario": IDLE}, figures([[wall_ns]]), extra))
