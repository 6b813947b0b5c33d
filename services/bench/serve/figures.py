"""What the outcomes of a load say: percentiles, throughput, goodput under an SLO, prefix hits."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from services.bench.serve.client import Outcome

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, slots=True)
class Slo:
    """What a request must keep to count as good. ms."""

    ttft_ms: float
    tpot_ms: float

    def holds(self, outcome: Outcome) -> bool:
        """Whether a finished request kept it."""
        return outcome.ttft_s * 1000 <= self.ttft_ms and outcome.tpot_s * 1000 <= self.tpot_ms


@dataclass(frozen=True, slots=True)
class Percentiles:
    """The 50th, 90th and 99th percentile; NaN without samples."""

    p50: float
    p90: float
    p99: float

    @staticmethod
    def of(values: Sequence[float]) -> Percentiles:
        """Return the percentiles of `values`, interpolated."""
        if not values:
            return Percentiles(float("nan"), float("nan"), float("nan"))
        return Percentiles(*(float(p) for p in np.percentile(values, PERCENTILES)))


@dataclass(frozen=True, slots=True)
class Figures:
    """One load on one pod, all rounds together. Latencies in ms.

    tokens_per_s: output tokens over the time from first due to last end, summed over rounds. goodput_per_s, good:
    requests that kept the SLO, per second and as a share of all. cached: share of the prompt's tokens, per request.
    cached_tokens, prompt_tokens, ideal_cached_tokens: sums, the last one of an infinite cache. lag: how late requests
    left here.
    """

    num_requests: int
    num_failed: int
    seconds: float
    tokens_per_s: float
    goodput_per_s: float
    good: float
    ttft_ms: Percentiles
    tpot_ms: Percentiles
    itl_ms: Percentiles
    e2e_ms: Percentiles
    cached: Percentiles
    prompt_tokens: int
    cached_tokens: int
    ideal_cached_tokens: int
    lag_ms: Percentiles
    errors: tuple[str, ...]

    @property
    def hit_rate(self) -> float:
        """Cached prompt tokens over all."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else float("nan")

    @property
    def ideal_hit_rate(self) -> float:
        """The same for an infinite cache in which each prompt is complete at once."""
        return self.ideal_cached_tokens / self.prompt_tokens if self.prompt_tokens else float("nan")


def figures(rounds: Sequence[Sequence[Outcome]], slo: Slo, ideal_cached_tokens: int) -> Figures:
    """Return the figures of all `rounds` together. ValueError: a round without requests."""
    outcomes = [outcome for outcomes in rounds for outcome in outcomes]
    done = [outcome for outcome in outcomes if not outcome.error]
    seconds = sum(max(o.end_s for o in one) - min(o.due_s for o in one) for one in rounds)
    num_good = sum(slo.holds(outcome) for outcome in done)
    return Figures(
        num_requests=len(outcomes),
        num_failed=len(outcomes) - len(done),
        seconds=seconds,
        tokens_per_s=sum(outcome.num_output_tokens for outcome in outcomes) / seconds,
        goodput_per_s=num_good / seconds,
        good=num_good / len(outcomes),
        ttft_ms=Percentiles.of([outcome.ttft_s * 1000 for outcome in done]),
        tpot_ms=Percentiles.of([outcome.tpot_s * 1000 for outcome in done if outcome.tpot_s]),
        itl_ms=Percentiles.of([ms for outcome in done for ms in gaps_ms(outcome)]),
        e2e_ms=Percentiles.of([(outcome.end_s - outcome.due_s) * 1000 for outcome in done]),
        cached=Percentiles.of(
            [o.num_cached_tokens / o.num_prompt_tokens for o in done if o.num_prompt_tokens]
        ),
        prompt_tokens=sum(outcome.num_prompt_tokens for outcome in done),
        cached_tokens=sum(outcome.num_cached_tokens for outcome in done),
        ideal_cached_tokens=ideal_cached_tokens,
        lag_ms=Percentiles.of([(outcome.sent_s - outcome.due_s) * 1000 for outcome in outcomes]),
        errors=tuple(dict.fromkeys(outcome.error for outcome in outcomes if outcome.error))[:5],
    )


def gaps_ms(outcome: Outcome, begin_s: float = float("-inf"), end_s: float = float("inf")) -> list[float]:
    """Return the times between chunks of which the later one came in `begin_s` .. `end_s`, in ms."""
    pairs = itertools.pairwise(outcome.chunks_s)
    return [(after - before) * 1000 for before, after in pairs if begin_s <= after <= end_s]
