"""Figures of a way: medians over rounds, so that a disturbed round does not decide."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Figures:
    """What the samples of all rounds say.

    p50_us: median over rounds of a round's median. p99_us: 99th percentile of all samples together. mean_us: median
    over rounds of a round's mean, so the time of one of many exchanges in a row: where ranks share a core, one of them
    comes late and the next at once, and the median falls on either. low_us, high_us: smallest and largest of the
    rounds' medians. samples: how many.
    """

    p50_us: float
    p99_us: float
    mean_us: float
    low_us: float
    high_us: float
    samples: int


def figures(rounds_ns: Sequence[Sequence[float]]) -> Figures:
    """Return the figures of rounds of samples in ns. ValueError: no round, or one without samples."""
    if not rounds_ns or not all(len(samples) for samples in rounds_ns):
        raise ValueError(f"rounds_ns: {[len(r) for r in rounds_ns]} samples; each round needs at least one")
    medians = [float(np.median(samples)) / 1_000 for samples in rounds_ns]
    pooled = np.concatenate([np.asarray(samples, np.float64) for samples in rounds_ns]) / 1_000
    return Figures(
        p50_us=float(np.median(medians)),
        p99_us=float(np.percentile(pooled, 99)),
        mean_us=float(np.median([np.mean(samples) for samples in rounds_ns])) / 1_000,
        low_us=min(medians),
        high_us=max(medians),
        samples=int(pooled.size),
    )


def median_ratio(ours_ns: Sequence[Sequence[float]], other_ns: Sequence[Sequence[float]]) -> float:
    """Return the median over rounds of (median of `ours_ns` / median of `other_ns`): both from the same seconds."""
    pairs = zip(ours_ns, other_ns, strict=True)
    return float(np.median([np.median(ours) / np.median(other) for ours, other in pairs]))


def mean_ratio(ours_ns: Sequence[Sequence[float]], other_ns: Sequence[Sequence[float]]) -> float:
    """Return the median over rounds of (mean of `ours_ns` / mean of `other_ns`)."""
    pairs = zip(ours_ns, other_ns, strict=True)
    return float(np.median([np.mean(ours) / np.mean(other) for ours, other in pairs]))


def repetitions(once_ns: float, budget_s: float, *, low: int, high: int) -> int:
    """Return how many repetitions of `once_ns` fit into the budget, in low..high."""
    return int(max(low, min(high, budget_s * 1e9 / max(once_ns, 1.0))))
