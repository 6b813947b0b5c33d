"""A2E/E2A at the paper's shape, directly and through trampolines, and whether the cost rule picks the faster way.

160 attention and 288 expert ranks live in 16 processes. For every (targets, bytes) of the grid all attention ranks
exchange with that many expert ranks each, at once, now directly, now through trampolines; the cost rule is then fitted
to all that was measured, as a deployment would calibrate it. A duration is one rank's, from the begin of its send to
its last row.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from bus.memory.segment import segment_prefix, sweep
from bus.xccl.cost import UNMEASURED, CostRule, Route, Sample, fit
from bus.xccl.relay_layout import RelayShape

NUM_SLOTS = 8
NUM_COEFFICIENTS = 3  # of a way's cost: fewer cases cannot be fitted
EXIT_TIMEOUT_S = 20

Report = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class Load:
    """What an attention rank sends: so many rows of so many float32, each to 8 expert slots."""

    num_rows: int
    hidden: int

    @property
    def num_bytes(self) -> int:
        """Bytes of rows, as the cost rule counts them: out once per row, back once per slot."""
        return self.num_rows * (1 + NUM_SLOTS) * 4 * self.hidden


TARGETS = (8, 32, 96, 288)
LOADS = (Load(36, 32), Load(36, 512), Load(288, 32))


@dataclass(slots=True)
class _Case:
    targets: int
    load: Load
    durations: dict[Route, list[int]] = field(default_factory=lambda: {route: [] for route in Route})
    send_durations: dict[Route, list[int]] = field(default_factory=lambda: {route: [] for route in Route})
    cell_writes: dict[Route, float] = field(default_factory=dict)


class _Hosts:
    """The processes."""

    def __init__(self, num_processes: int) -> None:
        self.pod = f"bench{uuid.uuid4().hex[:12]}"
        command = [sys.executable, "-P", "-m", "bus.bench.trampoline_host", self.pod]
        env = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        self._processes = [
            subprocess.Popen(
                [*command, str(index), str(num_processes)],
                env=env,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for index in range(num_processes)
        ]

    def ask(self, **command: Any) -> list[Any]:
        """Send a command to all and return their answers; RuntimeError if a process has ended."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(json.dumps(command) + "\n")
            process.stdin.flush()
        return [self._answer(process) for process in self._processes]

    @staticmethod
    def _answer(process: subprocess.Popen[str]) -> Any:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"a host of ranks has ended with status {process.wait(EXIT_TIMEOUT_S)}")
        return json.loads(line)

    def close(self) -> None:
        """End the processes; nothing of them is left."""
        for process in self._processes:
            assert process.stdin is not None
            with suppress(BrokenPipeError):
                process.stdin.close()
        for process in self._processes:
            assert process.stdout is not None
            try:
                process.wait(EXIT_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()
        sweep(segment_prefix(self.pod))


def run(
    report: Report,
    *,
    attention_ranks: int = 160,
    expert_ranks: int = 288,
    processes: int = 16,
    targets: Sequence[int] = TARGETS,
    loads: Sequence[Load] = LOADS,
    rounds: int = 3,
    repeats: int = 2,
) -> CostRule:
    """Measure the grid and give `report` one dict per way and case; return the rule fitted to them (3 or more).

    Args:
        report: takes {way, targets, num_bytes, p50_us, p99_us, send_p50_us, a2e_cell_writes_per_rank, picked,
        pick_to_winner (p50 of the way that the rule picks in this case, relative to the faster one's), route_costs_ns}.
        targets, loads: the grid; targets are at most the slots of a load. rounds: turns of each way in each case.
        repeats: exchanges of every attention rank in a turn.
    """
    hosts = _Hosts(processes)
    cases: list[_Case] = []
    try:
        for life, hidden in enumerate(sorted({load.hidden for load in loads}), 1):
            some = [load for load in loads if load.hidden == hidden]
            shape = RelayShape(
                num_attention_ranks=attention_ranks,
                num_expert_ranks=expert_ranks,
                rows_max=max(load.num_rows for load in some),
                num_slots=NUM_SLOTS,
                hidden=hidden,
            )
            hosts.ask(do="open", life=life, shape=asdict(shape))
            for load in some:
                cases += [
                    _measure(hosts, _Case(count, load), attention_ranks, rounds, repeats) for count in targets
                ]
            hosts.ask(do="close")
    finally:
        hosts.close()
    return _judge(cases, report)


def _measure(hosts: _Hosts, case: _Case, attention_ranks: int, rounds: int, repeats: int) -> _Case:
    for number in range(rounds + 1):
        for route in Route:
            answers = hosts.ask(
                do="play", route=route.value, targets=case.targets, rows=case.load.num_rows, repeats=repeats
            )
            hosts.ask(do="halt")
            writes = sum(answer["cell_writes"] for answer in answers)
            case.cell_writes[route] = round(writes / (attention_ranks * repeats), 2)
            if number == 0:  # maps segments and touches pages
                continue
            for answer in answers:
                case.durations[route] += answer["durations"]
                case.send_durations[route] += answer["send_durations"]
    return case


def _judge(cases: Sequence[_Case], report: Report) -> CostRule:
    rule = UNMEASURED
    if len(cases) >= NUM_COEFFICIENTS:
        rule = CostRule(*(fit([_sample(case, route) for case in cases]) for route in Route))
    for case in cases:
        picked = rule.choose(case.targets, case.load.num_bytes)
        medians = {route: float(np.median(case.durations[route])) for route in Route}
        for route in Route:
            p50, p99 = np.percentile(case.durations[route], (50, 99)) / 1_000
            report(
                {
                    "way": route.value,
                    "targets": case.targets,
                    "num_bytes": case.load.num_bytes,
                    "p50_us": round(float(p50), 1),
                    "p99_us": round(float(p99), 1),
                    "send_p50_us": round(float(np.median(case.send_durations[route])) / 1_000, 1),
                    "a2e_cell_writes_per_rank": case.cell_writes[route],
                    "picked": route is picked,
                    "pick_to_winner": round(medians[picked] / min(medians.values()), 3),
                    "route_costs_ns": str(rule),
                }
            )
    return rule


def _sample(case: _Case, route: Route) -> Sample:
    return Sample(case.targets, case.load.num_bytes, int(np.median(case.durations[route])))
