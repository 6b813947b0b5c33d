"""Which way the cost rule picks, beside which way was faster: at the paper's shape, and in the MoE shapes.

In the MoE shapes two rules are judged: the one of the plan's settings, and the one fitted to these measurements.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bus.bench.collectives import MOE
from bus.bench.report import Report
from bus.bench.routing import A2E, Shape, inputs
from bus.bench.session import OURS, Record
from bus.xccl.cost import CostRule, Route, Sample, fit

SETTING = "xccl.route_costs_ns"
WAYS = {OURS: Route.DIRECT, "ours trampoline": Route.TRAMPOLINE}
SAMPLES_MIN = 3  # for the three numbers of a way


@dataclass(frozen=True, slots=True)
class Measured:
    """One MoE shape, both ways. num_targets, num_bytes: of the mean attention rank, as the rule counts them."""

    name: str
    num_targets: int
    num_bytes: int
    mean_us: dict[Route, float]

    def loss(self, rule: CostRule) -> float:
        """Return by how much the way that `rule` picks is slower than the faster one: 0.1 = ten percent."""
        picked = rule.choose(self.num_targets, self.num_bytes)
        return self.mean_us[picked] / min(self.mean_us.values()) - 1

    def sample(self, route: Route) -> Sample:
        """Return what `fit` takes."""
        return Sample(self.num_targets, self.num_bytes, int(self.mean_us[route] * 1_000))


def moe_lines(report: Report, name: Callable[[Record], str]) -> list[str]:
    """Return, for each number of ranks, how the rule did in the MoE shapes that were measured both ways."""
    return [
        "\n".join(_lines(report, ranks, name))
        for ranks in dict.fromkeys(r.case["ranks"] for r in report.of(MOE) if r.case["form"] == A2E)
        if _measured(report, ranks, name)
    ]


def _lines(report: Report, ranks: object, name: Callable[[Record], str]) -> list[str]:
    found = _measured(report, ranks, name)
    text = report.plan.xccl.route_costs_ns
    lines = [
        f"A2E + E2A, {ranks} ranks, means: how the way that the cost rule picks compares with the faster way",
        judged(f'{SETTING} = "{text}"', CostRule.parse(text), found),
    ]
    if len(found) >= SAMPLES_MIN:
        rule = CostRule(*(fit([one.sample(route) for one in found]) for route in Route))
        lines.append(judged(f'fitted to these: "{rule}"', rule, found))
    return lines


def judged(label: str, rule: CostRule, found: Sequence[Measured]) -> str:
    """Return a line about how `rule` did."""
    worst = max(found, key=lambda one: one.loss(rule))
    count = sum(one.loss(rule) == 0 for one in found)
    trampolines = sum(rule.choose(one.num_targets, one.num_bytes) is Route.TRAMPOLINE for one in found)
    text = f"{label}: picks {trampolines} trampolines; the faster way in {count} of {len(found)} shapes"
    if count == len(found):
        return text
    return f"{text}; at worst {100 * worst.loss(rule):.0f} % slower ({worst.name})"


def _measured(report: Report, ranks: object, name: Callable[[Record], str]) -> list[Measured]:
    by_name: dict[str, list[Record]] = {}
    for record in report.of(MOE):
        if record.way in WAYS and record.case["form"] == A2E and record.case["ranks"] == ranks:
            by_name.setdefault(name(record), []).append(record)
    found = []
    for label, records in by_name.items():
        if len(records) == len(WAYS):
            means = {WAYS[record.way]: record.figures.mean_us for record in records}
            found.append(Measured(label, *_demand(report, records[0]), means))
    return found


def _demand(report: Report, record: Record) -> tuple[int, int]:
    """Return expert ranks and bytes of a mean attention rank."""
    case: dict[str, Any] = {**record.case, "num_ranks": record.case["ranks"]}
    del case["ranks"]
    shape = Shape(num_experts=report.plan.num_experts, **case)
    owners = [inputs(shape, r).topk_idx // shape.num_local_experts for r in range(shape.first_expert_rank)]
    row_bytes = shape.hidden if shape.kind == "int8" else 4 * shape.hidden
    num_targets = round(float(np.mean([np.unique(owner).size for owner in owners])))
    return num_targets, shape.batch * (1 + shape.top_k) * row_bytes
