"""The result of a run as JSON.

    {"schema": 1,
     "machine": {cores, cpu, kernel, architecture, memory, load at the start, python, versions},
     "plan": {the flags that were in force},
     "seconds": length of the run,
     "absent": [{section, way, is_failure, reason}],
     "records": [{section, way, case, p50_us, p99_us, mean_us, low_us, high_us, samples, ...}],
     "trampolines": what bus/bench/trampoline.py reports, one object per way and case}

section, and its case: `p2p` and `crowd` {scenario, size}, one-way times; `all-to-all` {ranks, size}; `moe` {ranks,
form, batch, hidden, top_k, kind}. In `p2p` a way rewrites its array before each message from 16 KiB on (ours pull and
ours zero-copy at all sizes), so that from 1 MiB on nearly everything has left the caches; ways "handed over" copy
nothing and leave the array as it is but for two bytes, which shows what a message costs by itself. p50_us is the
median of the rounds' medians, low_us and high_us their range, p99_us the 99th percentile of all samples, mean_us the
median of the rounds' means. Of the exchanges of a turn in `all-to-all`, `moe` and `kinds` the first four and the last
are not timed: ranks begin and end a turn one after the other. Further: to_limit, median over blocks of p50 relative to
the C limit's in the same milliseconds; to_ours and mean_to_ours, median over rounds of p50 and of the mean relative to
ours; mb_per_s, size / p50 (10^6 bytes); cpu_percent, CPU time of a waiter that sleeps; in collectives unevenness, the
99th percentile of samples in medians of their rounds, and bare_unevenness, that of loops as long that only compute,
played after each turn (bus/bench/bare.py). Section `kinds` {ranks, form, batch, hidden, top_k} has the figures of ours
with INT8 rows, and to_float32, its mean relative to that with float32 rows in the same seconds: median over pairs of
turns, with quartiles to_float32_low and to_float32_high.
Section `thresholds` {threshold, size} has both paths of a message: setting, from how many bytes on the second one is
chosen; to_other, of the path that is chosen: median over blocks of its p50 relative to the other path's in the same
milliseconds.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bus.bench.plan import Plan
from bus.bench.session import Absence, Record

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that a run found."""

    machine: dict[str, Any]
    plan: Plan
    seconds: float
    absences: list[Absence]
    records: list[Record]
    trampolines: list[dict[str, Any]] = field(default_factory=list)

    def of(self, section: str) -> list[Record]:
        """Return the records of a section."""
        return [record for record in self.records if record.section == section]


def as_json(report: Report) -> dict[str, Any]:
    """Return the report in the schema above."""
    plan = {name: value for name, value in _fields(report.plan) if name != "xccl"}
    settings = report.plan.xccl
    plan["xccl"] = {name: getattr(settings, name) for name in settings.__struct_fields__}
    return {
        "schema": SCHEMA,
        "machine": report.machine,
        "plan": plan,
        "seconds": round(report.seconds, 1),
        "absent": [asdict(absence) for absence in report.absences],
        "records": [_record(record) for record in report.records],
        "trampolines": report.trampolines,
    }


def write_json(report: Report, path: Path) -> None:
    """Write the report. OSError: the file cannot be written."""
    path.write_text(json.dumps(as_json(report), indent=1) + "\n", encoding="utf-8")


def _fields(plan: Plan) -> list[tuple[str, Any]]:
    return [(name, getattr(plan, name)) for name in plan.__slots__]


def _record(record: Record) -> dict[str, Any]:
    numbers = {**asdict(record.figures), **record.extra}
    rounded = {name: round(value, 3) for name, value in numbers.items()}
    return {"section": record.section, "way": record.way, "case": record.case, **rounded}
