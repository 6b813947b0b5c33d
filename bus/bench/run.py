"""A whole run."""

from __future__ import annotations

import time
from collections.abc import Callable

from bus.bench import collectives, machine, p2p
from bus.bench.plan import Plan
from bus.bench.report import Report
from bus.bench.session import Session, to_stderr


def run(plan: Plan, progress: Callable[[str], None] = to_stderr) -> Report:
    """Measure what `plan` says and return what was found; nothing of it is left on the machine.

    A way that is missing or fails is noted in `absences`, and the run goes on without it.
    """
    began, facts = time.monotonic(), machine.facts()
    with Session(plan, progress) as session:
        if p2p.SECTION in plan.sections:
            p2p.run(session)
        sections = tuple(s for s in (collectives.ALL_TO_ALL, collectives.MOE) if s in plan.sections)
        if sections:
            collectives.run(session, sections)
        return Report(facts, plan, time.monotonic() - began, session.absences, session.records)
