"""Sections all-to-all and moe, for each number of ranks with the same processes.

all-to-all: every rank sends so many bytes to every rank. moe: dispatch + combine, and A2E + E2A (half of the ranks hold
attention, half experts), in every shape of the plan; the times are of whole exchanges at each rank that holds tokens.
With both kinds of rows in the plan ours is then measured in both, turn by turn (`kinds`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

from bus.bench import kinds
from bus.bench.plan import Plan
from bus.bench.routing import A2E, DISPATCH, Shape
from bus.bench.rows import PLAIN
from bus.bench.session import OURS, Absence, Session
from bus.bench.turns import open_rows, play_case

ALL_TO_ALL, MOE = "all-to-all", "moe"
NO_ROWS = ("pipe", "iceoryx2")  # no collectives of their own: only pairs are measured
MEMORY_SHARE = 0.5  # of what is available: the most that the buffers of all ways may take together


def run(session: Session, sections: tuple[str, ...]) -> None:
    """Measure the sections for every number of ranks."""
    plan = session.plan
    names = [OURS, *(name for name in plan.peers if name not in NO_ROWS)]
    label = " and ".join(sections)
    for num_ranks in plan.ranks:
        with session.open(label, names, num_ranks):
            ways = open_rows(session, label)
            if ALL_TO_ALL in sections:
                _play_plain(session, ways, num_ranks)
            if MOE in sections:
                _play_moe(session, ways, num_ranks)


def _play_plain(session: Session, ways: Mapping[str, str], num_ranks: int) -> None:
    for size in session.plan.sizes:
        # Every way's blocks out and in, and what one transport may hold inside meanwhile.
        needed = (2 * len(session.groups) + 4) * num_ranks**2 * size
        room = MEMORY_SHARE * available_bytes()
        if needed > room:
            text = f"skipped: the buffers need {needed >> 20} MiB, {int(room) >> 20} MiB may be used"
            session.note(Absence(ALL_TO_ALL, f"{num_ranks} ranks, {size} bytes", False, text))
            continue
        session.say(f"{ALL_TO_ALL}: {num_ranks} ranks, {size} bytes per pair")
        shown: dict[str, int | str] = {"ranks": num_ranks, "size": size}
        play_case(session, ALL_TO_ALL, ways, shown, {"form": PLAIN, "size": size})


def _play_moe(session: Session, ways: Mapping[str, str], num_ranks: int) -> None:
    shapes = list(moe_shapes(session.plan, num_ranks))
    for number, shape in enumerate(shapes, 1):
        text = f"batch {shape.batch}, hidden {shape.hidden}, top-{shape.top_k}, {shape.kind}"
        session.say(f"{MOE}: {num_ranks} ranks, {number} of {len(shapes)}: {shape.form}, {text}")
        case = asdict(shape)
        shown = {
            "ranks": num_ranks,
            **{k: v for k, v in case.items() if k not in ("num_ranks", "num_experts")},
        }
        play_case(session, MOE, ways, shown, case)
    for number, shape in enumerate(pairs := list(kinds.pairs_of(shapes)), 1):
        text = f"batch {shape.batch}, hidden {shape.hidden}, top-{shape.top_k}"
        session.say(f"{kinds.SECTION}: {num_ranks} ranks, {number} of {len(pairs)}: {shape.form}, {text}")
        if OURS in ways and OURS in session.groups:
            kinds.play(session, ways, shape)


def moe_shapes(plan: Plan, num_ranks: int) -> Iterator[Shape]:
    """Yield every shape of the plan."""
    for form in (DISPATCH, A2E):
        for kind in plan.kinds:
            for hidden in plan.hidden:
                for top_k in plan.top_k:
                    for batch in plan.batch:
                        yield Shape(
                            form=form,
                            num_ranks=num_ranks,
                            batch=batch,
                            hidden=hidden,
                            top_k=top_k,
                            kind=kind,
                            num_experts=plan.num_experts,
                        )


def available_bytes() -> int:
    """Return the memory that is available."""
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    return 0
