"""What `xds bench serve` runs: the loads of its flags, or a scenario.

jitter: a closed loop of short requests, without and with what is done against jitter: garbage collected between steps,
the next step planned while one is under way. The figures are ITL and p99 / p50 of the decode step.

long-prompt: clients ask for short completions all the time; after a while one long prompt comes. The gaps between
tokens of the short ones (ITL) until its first token are compared with those before it came.
"""

from __future__ import annotations

import asyncio
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np

from bus.bench.machine import facts
from bus.config import DEMO_MODEL, PodConfig
from bus.errors import ConfigError
from services.bench.checkpoint import LONG_WINDOW, add_tokenizer, write_random
from services.bench.serve import workload
from services.bench.serve.client import Outcome
from services.bench.serve.driver import play_until
from services.bench.serve.figures import Percentiles, gaps_ms
from services.bench.serve.plan import ServePlan, Variant
from services.bench.serve.pods import Target
from services.bench.serve.report import (
    LoadReport,
    draw,
    joined,
    machine_line,
    number,
    ratios,
    table,
    values_of,
    write_json,
)
from services.bench.serve.run import complete, play_loads, targets
from services.bench.serve.workload import Request

Progress = Callable[[str], None]
SHORT_CLIENTS = 2
SHORT_PROMPT_TOKENS, SHORT_OUTPUT_TOKENS = 16, 64
SETTLE_S, ALONE_S = 1.0, 8.0
JITTER_CLIENTS = (8,)
JITTER_WAYS = ("gc-auto,sync", "gc-managed,async")


class Report(Protocol):
    """What the command prints and writes."""

    @property
    def has_failures(self) -> bool:
        """Whether a request failed."""
        ...

    def render(self) -> str:
        """Return the text."""
        ...

    def write_json(self, path: Path) -> None:
        """Write the figures."""
        ...

    def write_plot(self, path: Path) -> None:
        """Draw the figures."""
        ...


def run(plan: ServePlan, config: PodConfig, progress: Progress) -> Report:
    """Measure what the plan says. Raises ConfigError: flags, settings, trace; ResourceError: no pod."""
    if plan.scenario == "long-prompt":
        return _long_prompt(plan, config, progress)
    if plan.scenario == "jitter":
        plan = replace(_compared(plan, *JITTER_WAYS), clients=plan.clients or JITTER_CLIENTS)
    return LoadReport(plan, facts(), play_loads(plan, config, progress))


# --------------------------------------------------------------------------- long-prompt


@dataclass(slots=True)
class Episodes:
    """All rounds of one pod: gaps between tokens of the short requests, ms, and the long prompts' outcomes."""

    variant: str
    alone_ms: list[float] = field(default_factory=list)
    beside_ms: list[float] = field(default_factory=list)
    long: list[Outcome] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class LongPromptReport:
    """See the module's docstring."""

    plan: ServePlan
    machine: dict[str, Any]
    episodes: Sequence[Episodes]

    @property
    def has_failures(self) -> bool:
        """Whether a request failed."""
        return any(one.errors for one in self.episodes)

    def render(self) -> str:
        """Return the table: a column for each pod."""
        alone = [Percentiles.of(one.alone_ms) for one in self.episodes]
        beside = [Percentiles.of(one.beside_ms) for one in self.episodes]
        rows = [
            ("ITL alone, ms", [joined(values_of(p)) for p in alone]),
            ("ITL beside it, ms", [joined(values_of(p)) for p in beside]),
            (
                "ratio",
                [joined(ratios(values_of(b), values_of(a))) for a, b in zip(alone, beside, strict=True)],
            ),
            ("gaps alone, beside it", [f"{len(e.alone_ms)}, {len(e.beside_ms)}" for e in self.episodes]),
            ("TTFT of the long prompt, s", [number(_mean_ttft_s(one)) for one in self.episodes]),
        ]
        title = (
            f"{SHORT_CLIENTS} clients with short requests and one prompt of {self.plan.long_tokens} tokens, "
            f"{self.plan.rounds} rounds (p50 / p90 / p99)"
        )
        notes = [f"{one.variant}: {error}" for one in self.episodes for error in one.errors[:3]]
        text = table(title, [one.variant for one in self.episodes], rows)
        return "\n".join([f"{machine_line(self.machine)}\n", text, *notes]) + "\n"

    def write_json(self, path: Path) -> None:
        """Write percentiles and ratios."""
        pods = []
        for one in self.episodes:
            alone, beside = Percentiles.of(one.alone_ms), Percentiles.of(one.beside_ms)
            found = dict(zip(("p50", "p90", "p99"), ratios(values_of(beside), values_of(alone)), strict=True))
            pods.append(
                {
                    "variant": one.variant,
                    "alone_ms": asdict(alone),
                    "beside_ms": asdict(beside),
                    "ratio": found,
                }
                | {"long_ttft_s": _mean_ttft_s(one), "errors": one.errors}
            )
        tree = {"machine": self.machine, "long_tokens": self.plan.long_tokens, "rounds": self.plan.rounds}
        write_json({**tree, "pods": pods}, path)

    def write_plot(self, path: Path) -> None:
        """Draw the shares of gaps that were at most so long."""
        panels = [
            (f"{one.variant}: ITL of short requests, ms", {"alone": one.alone_ms, "beside": one.beside_ms})
            for one in self.episodes
        ]
        draw(panels, path, columns=len(panels))


def _long_prompt(plan: ServePlan, config: PodConfig, progress: Progress) -> LongPromptReport:
    if plan.url:
        raise ConfigError("--scenario long-prompt starts its own pods; leave --url out")
    plan = _compared(plan, "colocated", "disaggregated")
    with tempfile.TemporaryDirectory(prefix="xds-bench-") as scratch:
        config = _with_room(config, plan.long_tokens, Path(scratch))
        episodes = [Episodes(variant.label) for variant in plan.variants]
        with targets(plan, config, progress) as pods:
            for turn in range(plan.rounds):
                for pod, one in zip(pods, episodes, strict=True):
                    progress(f"long prompt: {pod.label}, round {turn + 1} of {plan.rounds}")
                    complete(_episode(pod, one, plan, plan.seed + turn))
    return LongPromptReport(plan, facts(), episodes)


def _compared(plan: ServePlan, *names: str) -> ServePlan:
    """Return the plan with these ways where it names none and starts its pods itself."""
    if plan.url or any(variant.overrides for variant in plan.variants):
        return plan
    return replace(plan, variants=tuple(map(Variant.parse, names)))


def _with_room(config: PodConfig, long_tokens: int, scratch: Path) -> PodConfig:
    """Return settings whose KV caches hold the long prompt; the demo model, whose window is short, is replaced."""
    if config.model == DEMO_MODEL:
        write_random(scratch / "model", changes=LONG_WINDOW)
        add_tokenizer(scratch / "model")
        config = msgspec.structs.replace(config, model=str(scratch / "model"))
    block = config.kv.block_tokens
    room = -(-(long_tokens + SHORT_CLIENTS * 1024) // block) * block
    kv = msgspec.structs.replace(config.kv, cache_tokens=max(room, config.kv.cache_tokens))
    prefill = msgspec.structs.replace(config.prefill, cache_tokens=max(room, config.prefill.cache_tokens))
    return msgspec.structs.replace(config, kv=kv, prefill=prefill)


async def _episode(pod: Target, episodes: Episodes, plan: ServePlan, seed: int) -> None:
    """Play one round: short requests alone, then beside a long prompt."""
    stop = asyncio.Event()
    shorts = asyncio.create_task(play_until(pod.client, _short_requests(seed), SHORT_CLIENTS, stop))
    await asyncio.sleep(SETTLE_S)
    begin_s = time.monotonic()
    await asyncio.sleep(ALONE_S)
    sent_s = time.monotonic()
    [long_request] = workload.closed_loop(1, 1, plan.long_tokens, 1).make(seed).requests
    long = await pod.client.stream(long_request, sent_s)
    stop.set()
    outcomes = await shorts
    for outcome in outcomes:
        episodes.alone_ms += gaps_ms(outcome, begin_s, sent_s)
        episodes.beside_ms += gaps_ms(outcome, sent_s, long.end_s)
    episodes.long.append(long)
    episodes.errors += [outcome.error for outcome in (*outcomes, long) if outcome.error]


def _short_requests(seed: int) -> Iterator[Request]:
    load = workload.closed_loop(1, 1, SHORT_PROMPT_TOKENS, SHORT_OUTPUT_TOKENS)
    for count in itertools.count():
        yield load.make((seed << 20) + count).requests[0]


def _mean_ttft_s(episodes: Episodes) -> float:
    found = [outcome.ttft_s for outcome in episodes.long if outcome.chunks_s]
    return float(np.mean(found)) if found else float("nan")
