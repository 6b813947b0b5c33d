"""INT8 rows beside float32 rows: the same exchange of ours in both kinds, turn by turn, in the same seconds.

The tables of the shapes cannot tell a difference of a few percent: minutes lie between the two kinds there, and a
virtual machine is not as fast minutes later.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace

import numpy as np

from bus.bench.plan import KINDS
from bus.bench.routing import Shape
from bus.bench.session import OURS, Case, Record, Session
from bus.bench.stats import figures
from bus.bench.turns import ask, set_up

SECTION = "kinds"
ROUNDS_MIN = 9  # quartiles of fewer ratios say little
FLOAT32, INT8 = KINDS


def pairs_of(shapes: list[Shape]) -> Iterator[Shape]:
    """Yield each shape that is there in both kinds, as float32."""
    there = set(shapes)
    for shape in shapes:
        if shape.kind == FLOAT32 and replace(shape, kind=INT8) in there:
            yield shape


def play(session: Session, ways: Mapping[str, str], shape: Shape) -> None:
    """Measure one shape in both kinds and note the record: figures of INT8, and what its mean is relative to float32's.

    extra: `to_float32` is the median over pairs of turns, `to_float32_low` and `to_float32_high` are its quartiles.
    """
    name = ways[OURS]
    cases = {kind: asdict(replace(shape, kind=kind)) for kind in KINDS}
    turns: dict[str, list[list[float]]] = {kind: [] for kind in KINDS}
    for number in range(max(ROUNDS_MIN, session.plan.rounds)):
        for kind in KINDS if number % 2 else reversed(KINDS):
            count = set_up(session, SECTION, OURS, name, cases[kind])
            if count is None:
                return
            found = ask(session, SECTION, name, what="measure", way=OURS, repetitions=count)
            if found is None or ask(session, SECTION, name, what="finish", way=OURS) is None:
                return
            turns[kind].append([ns for durations in found for ns in durations])
    ratios = [np.mean(b) / np.mean(a) for a, b in zip(turns[FLOAT32], turns[INT8], strict=True)]
    low, middle, high = (float(q) for q in np.percentile(ratios, (25, 50, 75)))
    extra = {"to_float32": middle, "to_float32_low": low, "to_float32_high": high}
    session.records.append(Record(SECTION, OURS, _shown(shape), figures(turns[INT8]), extra))


def _shown(shape: Shape) -> Case:
    return {
        "ranks": shape.num_ranks,
        "form": shape.form,
        "batch": shape.batch,
        "hidden": shape.hidden,
        "top_k": shape.top_k,
    }
