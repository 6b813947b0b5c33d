"""The cost rule: it recovers what it was measured from, and picks the faster way."""

from __future__ import annotations

import pytest

from bus.config import load
from bus.xccl.cost import UNMEASURED, CostRule, Route, RouteCost, Sample, calibrate, fit

DIRECT = RouteCost(2_000, 300, 0.1)
TRAMPOLINE = RouteCost(20_000, 10, 0.3)


def run(route: Route, num_targets: int, num_bytes: int) -> int:
    cost = DIRECT if route is Route.DIRECT else TRAMPOLINE
    return int(cost.estimate_ns(num_targets, num_bytes))


def test_fit_recovers_the_coefficients() -> None:
    samples = [Sample(t, b, run(Route.DIRECT, t, b)) for t in (1, 8, 288) for b in (0, 4096, 1 << 20)]
    found = fit(samples)
    assert found.fixed_ns == pytest.approx(2_000, rel=0.02)
    assert found.per_target_ns == pytest.approx(300, rel=0.02)
    assert found.per_byte_ns == pytest.approx(0.1, rel=0.02)


def test_no_coefficient_is_negative() -> None:
    found = fit([Sample(t, b, max(1, 1000 - 100 * t)) for t in (1, 4, 8) for b in (0, 1000)])
    assert min(found.fixed_ns, found.per_target_ns, found.per_byte_ns) >= 0


@pytest.mark.parametrize("samples", [[], [Sample(1, 1, 1)] * 2, [Sample(1, 1, 0)] * 3])
def test_too_little_to_fit_is_refused(samples: list[Sample]) -> None:
    with pytest.raises(ValueError, match="samples"):
        fit(samples)


def test_the_calibrated_rule_picks_the_faster_way_between_its_grid_points() -> None:
    rule = calibrate(run, [1, 16, 288], [0, 65_536, 1 << 20], repeats=1)
    for targets in (1, 4, 32, 100, 288):
        for num_bytes in (100, 10_000, 500_000):
            faster = min(Route, key=lambda r: run(r, targets, num_bytes))
            picked = rule.choose(targets, num_bytes)
            assert run(picked, targets, num_bytes) <= 1.1 * run(faster, targets, num_bytes)


def test_without_measurements_and_when_equal_the_direct_way_is_taken() -> None:
    assert UNMEASURED.choose(288, 1 << 30) is Route.DIRECT
    assert CostRule(DIRECT, DIRECT).choose(10, 10) is Route.DIRECT


def test_a_rule_is_written_as_a_setting_takes_it() -> None:
    rule = CostRule(DIRECT, TRAMPOLINE)
    text = str(rule)
    assert text == "2000,300,0.1,20000,10,0.3" and CostRule.parse(text) == rule
    settings = load({"xccl.route_costs_ns": text}, None, {})
    assert CostRule.parse(settings.xccl.route_costs_ns) == rule
    assert CostRule.parse("") is UNMEASURED
    tiny = str(CostRule(RouteCost(1e-7, 0, 1e12), TRAMPOLINE))
    assert (
        CostRule.parse(load({"xccl.route_costs_ns": tiny}, None, {}).xccl.route_costs_ns).direct.fixed_ns
        == 1e-7
    )


@pytest.mark.parametrize("text", ["1", "1,2,3,4,5,x", "1,2,3,4,5,-6", "1,2,3,4,5,nan"])
def test_a_bad_rule_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        CostRule.parse(text)


def test_a_way_that_never_costs_more_is_known_without_counting() -> None:
    assert UNMEASURED.only is Route.DIRECT
    assert CostRule(TRAMPOLINE, RouteCost(1, 1, 0.1)).only is Route.TRAMPOLINE
    assert CostRule(DIRECT, TRAMPOLINE).only is None
