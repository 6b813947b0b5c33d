"""A whole run."""

from __future__ import annotations

import time
from collections.abc import Callable

from bus.bench import collectives, crowd, machine, p2p, thresholds, trampoline
from bus.bench.plan import Plan
from bus.bench.report import Report
from bus.bench.session import OURS, Absence, Session, to_stderr
from bus.errors import BusError

TRAMPOLINE = "trampoline"


def run(plan: Plan, progress: Callable[[str], None] = to_stderr) -> Report:
    """Measure what `plan` says and return what was found; nothing of it is left on the machine.

    A way that is missing or fails is noted in `absences`, and the run goes on without it.
    """
    began, facts = time.monotonic(), machine.facts()
    with Session(plan, progress) as session:
        if p2p.SECTION in plan.sections:
            p2p.run(session)
        if crowd.SECTION in plan.sections:
            crowd.run(session)
        sections = tuple(s for s in (collectives.ALL_TO_ALL, collectives.MOE) if s in plan.sections)
        if sections:
            collectives.run(session, sections)
        if TRAMPOLINE in plan.sections:
            _run_trampolines(session)
        if thresholds.SECTION in plan.sections:
            thresholds.run(session)
        seconds = time.monotonic() - began
        return Report(facts, plan, seconds, session.absences, session.records, session.trampolines)


def _run_trampolines(session: Session) -> None:
    """Measure A2E/E2A at the paper's shape. Its processes are its own: each hosts many ranks."""
    plan = session.plan
    session.say(f"{TRAMPOLINE}: A2E/E2A of 160 attention and 288 expert ranks in 16 processes")
    loads = trampoline.LOADS if plan.all_trampolines else trampoline.LOADS[:1]
    try:
        trampoline.run(session.trampolines.append, loads=loads, rounds=plan.rounds)
    except (BusError, OSError, RuntimeError) as error:
        session.note(Absence(TRAMPOLINE, OURS, True, str(error)))
