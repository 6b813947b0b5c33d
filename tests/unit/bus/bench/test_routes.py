"""What the report says about the cost rule, and about INT8 beside float32."""

from __future__ import annotations

from dataclasses import replace

from bus.bench import machine, routes
from bus.bench.kinds import pairs_of
from bus.bench.plan import Plan
from bus.bench.report import Report
from bus.bench.routes import Measured, judged
from bus.bench.routing import A2E, DISPATCH, Shape
from bus.bench.session import Record
from bus.bench.stats import figures
from bus.bench.tables import render
from bus.config import XcclConfig
from bus.xccl.cost import UNMEASURED, CostRule, Route, RouteCost

CASE: dict[str, int | str] = {"ranks": 4, "form": A2E, "hidden": 256, "top_k": 4, "kind": "float32"}
ALWAYS_BY_TRAMPOLINE = CostRule(RouteCost(1.0, 0.0, 0.0), RouteCost(0.0, 0.0, 0.0))


def measured(direct: float, trampoline: float, batch: int = 1) -> list[Record]:
    case = {**CASE, "batch": batch}
    ways = {"ours": direct, "ours trampoline": trampoline}
    return [Record("moe", way, case, figures([[us * 1_000]])) for way, us in ways.items()]


def report(records: list[Record], costs: str = "") -> Report:
    plan = Plan(xccl=XcclConfig(route_costs_ns=costs))
    return Report(machine.facts(), plan, 1.0, [], records)


def batch(record: Record) -> str:
    return str(record.case["batch"])


def test_a_pick_is_compared_with_the_faster_way() -> None:
    one = Measured("x", 2, 4096, {Route.DIRECT: 50.0, Route.TRAMPOLINE: 40.0})
    assert one.loss(UNMEASURED) == 0.25 and one.loss(ALWAYS_BY_TRAMPOLINE) == 0.0
    two = Measured("y", 2, 8192, {Route.DIRECT: 40.0, Route.TRAMPOLINE: 60.0})
    text = judged("rule", UNMEASURED, [one, two])
    assert text == "rule: picks 0 trampolines; the faster way in 1 of 2 shapes; at worst 25 % slower (x)"
    assert judged("rule", ALWAYS_BY_TRAMPOLINE, [one]).endswith(
        "picks 1 trampolines; the faster way in 1 of 1 shapes"
    )


def test_both_rules_are_judged_by_the_shapes_that_were_measured_both_ways() -> None:
    records = [*measured(50, 40), *measured(100, 90, 8), *measured(300, 290, 32), measured(900, 1, 96)[0]]
    [text] = routes.moe_lines(report(records), batch)
    title, as_set, fitted = text.splitlines()
    assert "4 ranks" in title
    assert as_set.startswith('xccl.route_costs_ns = "": picks 0 trampolines; the faster way in 0 of 3 shapes')
    assert as_set.endswith("at worst 25 % slower (1)")
    assert "picks 3 trampolines; the faster way in 3 of 3 shapes" in fitted
    assert len(routes.moe_lines(report(records[:4], str(ALWAYS_BY_TRAMPOLINE)), batch)[0].splitlines()) == 2
    assert text.splitlines()[0] not in render(report(records[:1]))


def test_the_rule_is_asked_about_what_the_shape_moves() -> None:
    """One row to four slots at two expert ranks: five rows of 1 KiB."""
    costs = "0,0,1,5119,0,0"
    [text] = routes.moe_lines(report(measured(50, 40), costs), batch)
    assert "picks 1 trampolines" in text
    [text] = routes.moe_lines(report(measured(50, 40), "0,0,1,5121,0,0"), batch)
    assert "picks 0 trampolines" in text


def test_int8_is_set_beside_float32() -> None:
    shape = Shape(form=A2E, num_ranks=4, batch=1, hidden=256, top_k=4, kind="float32", num_experts=8)
    int8, other = replace(shape, kind="int8"), replace(shape, form=DISPATCH)
    assert list(pairs_of([shape, other, int8])) == [shape]
    case = {name: value for name, value in CASE.items() if name != "kind"} | {"batch": 8}
    extra = {"to_float32": 0.8, "to_float32_low": 0.75, "to_float32_high": 0.9}
    text = render(report([Record("kinds", "ours", case, figures([[1_000]]), extra)]))
    assert "batch   8 hidden   256 top-4  0.80 (0.75 to 0.90)" in text
