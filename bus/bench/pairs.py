"""What the sections of the ping-pong share: pairs are opened, take turns, and their figures are noted."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from bus.bench.peers.ours import ADAPTIVE, ZERO_COPY
from bus.bench.pingpong import HANDED_OVER
from bus.bench.session import Record, Session
from bus.bench.stats import figures, median_ratio, repetitions

WARM_UP, ROUNDS_MIN, ROUNDS_MAX = 20, 4, 2000

Samples = dict[tuple[str, int], list[list[float]]]  # (way, size) -> rounds of ns


def open_pairs(session: Session, section: str, size_max: int, *, pinned: bool) -> dict[str, list[str]]:
    """Return the ways of each group that is there."""
    ways = {}
    for name in list(session.groups):
        found = session.ask(
            section, name, what="open_pairs", size_max=size_max, pinned=pinned, options=session.options(name)
        )
        if found is not None:
            ways[name] = found[0]
    return ways


def calibrate(session: Session, section: str, name: str, ways: list[str], size: int, parts: int) -> list[int]:
    """Return how many rounds each way plays in a block, if a turn has `parts` blocks of it."""
    found = play(session, section, name, ways, size, [ROUNDS_MIN] * len(ways), 2)
    budget_s = session.plan.budget_s / parts
    return [
        repetitions(2 * float(np.median(found[way][-1])), budget_s, low=ROUNDS_MIN, high=ROUNDS_MAX // parts)
        for way in ways
        if way in found
    ]


def play(
    session: Session, section: str, name: str, ways: list[str], size: int, counts: list[int], blocks: int
) -> dict[str, list[list[float]]]:
    """Return one-way ns by way and block, of all pairs; nothing if the group has failed."""
    if name not in session.groups:
        return {}
    answers = session.ask(
        section, name, what="play", ways=ways, num_bytes=size, rounds=counts, warm_up=WARM_UP, blocks=blocks
    )
    if answers is None:
        return {}
    return {
        way: [[ns / 2 for side in answers[::2] for ns in side[way][block]] for block in range(blocks)]
        for way in ways
    }


def record(
    session: Session,
    section: str,
    scenario: str,
    samples: Samples,
    extras: Mapping[tuple[str, int], dict[str, float]],
) -> None:
    """Note what all ways have measured in a scenario. `extras` holds further figures of some."""
    for (way, size), rounds in samples.items():
        found, ours = figures(rounds), samples.get((ADAPTIVE, size))
        extra = dict(extras.get((way, size), {}))
        if ours is not None and len(ours) == len(rounds):
            extra["to_ours"] = median_ratio(rounds, ours)
        if way != ZERO_COPY and not way.endswith(HANDED_OVER):  # nothing moves
            extra["mb_per_s"] = size / found.p50_us
        session.records.append(Record(section, way, {"scenario": scenario, "size": size}, found, extra))
