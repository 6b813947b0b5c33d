"""Collectives: for each case every way is set up and checked, then they take turns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from bus.bench.bare import unevenness
from bus.bench.rows import PERSISTENT
from bus.bench.session import OURS, Case, Record, Session
from bus.bench.stats import figures, mean_ratio, median_ratio, repetitions

REPETITIONS_MIN, REPETITIONS_MAX, REPETITIONS_FIRST = 4, 4_000, 10


def open_rows(session: Session, section: str) -> dict[str, str]:
    """Connect the ranks of every group; return way -> group."""
    ways = {}
    for name in list(session.groups):
        found = session.ask(section, name, what="open_rows", options=session.options(name))
        if found is not None:
            ways.update(dict.fromkeys(found[0], name))
    if OURS in session.groups:
        session.ask(section, OURS, what="open_bare")
    return ways


def play_case(
    session: Session, section: str, ways: Mapping[str, str], shown: Case, case: Mapping[str, int | str]
) -> None:
    """Measure one case on every way that plays it, and note the records. `shown` is the case in the records."""
    samples: dict[str, list[list[float]]] = {}
    counts: dict[str, int] = {}
    for way in _supporting(session, section, ways, case):
        count = set_up(session, section, way, ways[way], case)
        if count is not None:
            counts[way], samples[way] = count, []
    bare: dict[str, list[list[float]]] = {way: [] for way in samples}
    for _ in range(session.plan.rounds):
        for way in list(samples):
            found = ask(session, section, ways[way], what="measure", way=way, repetitions=counts[way])
            if found is None:
                del samples[way]
            else:
                samples[way].append([ns for durations in found for ns in durations])
                bare[way] += _play_bare(session, section, float(np.median(samples[way][-1])))
    for way in samples:
        ask(session, section, ways[way], what="finish", way=way)
    for way, rounds in samples.items():
        ours = samples.get(f"{OURS} {PERSISTENT}" if way.endswith(PERSISTENT) else OURS)  # like with like
        extra = {}
        if ours is not None:
            extra = {"to_ours": median_ratio(rounds, ours), "mean_to_ours": mean_ratio(rounds, ours)}
        extra["unevenness"] = unevenness(rounds)
        if bare[way]:
            extra["bare_unevenness"] = unevenness(bare[way])
        session.records.append(Record(section, way, shown, figures(rounds), extra))


def _play_bare(session: Session, section: str, length_ns: float) -> list[list[float]]:
    """Return a turn of bare loops of that length in the processes of ours; nothing if they are gone."""
    count = repetitions(length_ns, session.plan.budget_s, low=REPETITIONS_MIN, high=REPETITIONS_MAX)
    found = ask(session, section, OURS, what="bare", length_ns=length_ns, repetitions=count)
    return [[float(ns) for ns in found[0]]] if found is not None else []


def _supporting(session: Session, section: str, ways: Mapping[str, str], case: object) -> list[str]:
    found: list[str] = []
    for name in list(session.groups):
        answers = session.ask(section, name, what="supports", case=case)
        if answers is not None:
            found += answers[0]
    return [way for way in ways if way in found]


def set_up(session: Session, section: str, way: str, name: str, case: object) -> int | None:
    """Prepare and check a way; return the repetitions of a turn, None if the group has failed."""
    if ask(session, section, name, what="prepare", way=way, case=case) is None:
        return None
    if ask(session, section, name, what="check", way=way) is None:
        return None
    found = ask(session, section, name, what="measure", way=way, repetitions=REPETITIONS_FIRST)
    if found is None:
        return None
    once_ns = figures([[ns for durations in found for ns in durations]]).p50_us * 1_000
    return repetitions(once_ns, session.plan.budget_s, low=REPETITIONS_MIN, high=REPETITIONS_MAX)


def ask(session: Session, section: str, name: str, **command: object) -> Sequence[list[int]] | None:
    """Ask a group that may be gone; None if it is, or fails now."""
    return session.ask(section, name, **command) if name in session.groups else None
