"""Which way an A2E/E2A exchange goes: directly to every expert rank, or through a trampoline. Pure.

Theory. The direct way costs the attention rank one metadata write, and one answer to look at, per expert rank that it
needs; the trampoline costs it one of each, and in return two more hops and one more copy of every byte each
way. Both are close to

    time = fixed + per_target * expert ranks + per_byte * bytes moved

so three numbers per way, fitted to measurements on the machine at hand, decide. On the paper's hardware the
writer of metadata is a weak scalar unit, so per_target is large and trampolines win at 288 targets. On a CPU whose
cores all ranks share they were never faster (bus/README.md).
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median

import numpy as np


class Route(enum.Enum):
    """The way of an exchange."""

    DIRECT = "direct"
    TRAMPOLINE = "trampoline"


@dataclass(frozen=True, slots=True)
class RouteCost:
    """Coefficients of one way, in nanoseconds; none is negative."""

    fixed_ns: float
    per_target_ns: float
    per_byte_ns: float

    def estimate_ns(self, num_targets: int, num_bytes: int) -> float:
        """Return the expected duration of an exchange with `num_targets` expert ranks and `num_bytes` both ways."""
        return self.fixed_ns + self.per_target_ns * num_targets + self.per_byte_ns * num_bytes

    def never_exceeds(self, other: RouteCost) -> bool:
        """Tell whether this way costs at most as much as the other, whatever the exchange."""
        return (
            self.fixed_ns <= other.fixed_ns
            and self.per_target_ns <= other.per_target_ns
            and self.per_byte_ns <= other.per_byte_ns
        )


@dataclass(frozen=True, slots=True)
class Sample:
    """One measured exchange."""

    num_targets: int
    num_bytes: int
    duration_ns: int


@dataclass(frozen=True, slots=True)
class CostRule:
    """Picks the way that is expected to be faster; the direct one when they are equal."""

    direct: RouteCost
    trampoline: RouteCost
    only: Route | None = field(init=False)  # the way of every exchange, where one way never costs less

    def __post_init__(self) -> None:
        only = None
        if self.direct.never_exceeds(self.trampoline):
            only = Route.DIRECT
        elif self.trampoline.never_exceeds(self.direct):
            only = Route.TRAMPOLINE
        object.__setattr__(self, "only", only)

    @classmethod
    def parse(cls, text: str) -> CostRule:
        """Return the rule that `str` wrote, `UNMEASURED` for "". Raises ValueError."""
        if not text:
            return UNMEASURED
        numbers = [float(word) for word in text.split(",")]
        if len(numbers) != 6 or not all(math.isfinite(n) and n >= 0 for n in numbers):
            raise ValueError(f"{text!r} must be six numbers, separated by commas, none negative")
        return cls(RouteCost(*numbers[:3]), RouteCost(*numbers[3:]))

    def __str__(self) -> str:
        """Return what the setting `xccl.route_costs_ns` takes: fixed, per target, per byte; direct, then trampoline."""
        ways = (self.direct, self.trampoline)
        return ",".join(f"{n:.6g}" for w in ways for n in (w.fixed_ns, w.per_target_ns, w.per_byte_ns))

    def choose(self, num_targets: int, num_bytes: int) -> Route:
        """Return the way for an exchange with `num_targets` expert ranks and `num_bytes` both ways."""
        direct_ns = self.direct.estimate_ns(num_targets, num_bytes)
        if self.trampoline.estimate_ns(num_targets, num_bytes) < direct_ns:
            return Route.TRAMPOLINE
        return Route.DIRECT


# What the direct way and a trampoline cost where nothing was measured: always direct.
UNMEASURED = CostRule(RouteCost(0.0, 0.0, 0.0), RouteCost(1.0, 0.0, 0.0))


def fit(samples: Sequence[Sample]) -> RouteCost:
    """Return the coefficients that fit `samples` with the least relative error, none of them negative.

    Raises:
        ValueError: fewer than three samples, or one without duration.
    """
    if len(samples) < 3 or any(s.duration_ns <= 0 for s in samples):
        raise ValueError(f"samples: {len(samples)} must be at least 3, each with a positive duration")
    measured = np.array([s.duration_ns for s in samples], np.float64)
    columns = np.array([(1.0, s.num_targets, s.num_bytes) for s in samples]) / measured[:, None]
    kept = [0, 1, 2]
    while True:
        found = np.linalg.lstsq(columns[:, kept], np.ones(len(samples)), rcond=None)[0]
        if (found >= 0).all():
            break
        kept.remove(kept[int(np.argmin(found))])
        if not kept:
            return RouteCost(float(measured.mean()), 0.0, 0.0)
    values = [0.0, 0.0, 0.0]
    for column, value in zip(kept, found, strict=True):
        values[column] = float(value)
    return RouteCost(*values)


def calibrate(
    run: Callable[[Route, int, int], int],
    targets: Iterable[int],
    num_bytes: Iterable[int],
    *,
    repeats: int = 9,
) -> CostRule:
    """Measure both ways on a grid and return the rule.

    Args:
        run: (way, expert ranks, bytes both ways) -> duration of one exchange, ns.
        targets, num_bytes: the grid; repeats: of each point, of which the median counts. The two ways alternate, so
        that a disturbance hits both.
    """
    sizes = list(num_bytes)
    samples: dict[Route, list[Sample]] = {route: [] for route in Route}
    for count in targets:
        for size in sizes:
            durations: dict[Route, list[int]] = {route: [] for route in Route}
            for _ in range(repeats):
                for route in Route:
                    durations[route].append(run(route, count, size))
            for route in Route:
                samples[route].append(Sample(count, size, int(median(durations[route]))))
    return CostRule(fit(samples[Route.DIRECT]), fit(samples[Route.TRAMPOLINE]))
