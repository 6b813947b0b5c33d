"""Plays the loads to the pods in turns."""

from __future__ import annotations

import asyncio
import contextlib
import resource
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import uvloop

from bus.config import PodConfig
from bus.errors import ConfigError
from services.bench.serve import workload
from services.bench.serve.client import Outcome
from services.bench.serve.driver import play
from services.bench.serve.figures import Figures, figures
from services.bench.serve.plan import ServePlan
from services.bench.serve.pods import STEP_GAUGES, Target, started
from services.bench.serve.workload import Load

WARM_UP = workload.closed_loop(2, 8, 16, 16)
WARM_UP_SEED = 1 << 40
COUNTERS_LAG_S = 1.2  # heartbeats bring a member's counters to the gateway
Result = TypeVar("Result")


@dataclass(slots=True)
class Played:
    """All rounds of one load on one pod. cpu_s: of the pod; generator_cpu_s: of this process, meanwhile."""

    load: str
    variant: str
    rounds: list[list[Outcome]] = field(default_factory=list)
    ideal_cached_tokens: int = 0
    num_left_out: int = 0
    cpu_s: float = 0.0
    generator_cpu_s: float = 0.0
    step_us: tuple[float, ...] = ()  # p50, p99, p99.9 of the newest decode steps; () = the pod does not say

    def figures(self, plan: ServePlan) -> Figures:
        """Return the figures."""
        return figures(self.rounds, plan.slo, self.ideal_cached_tokens)


def play_loads(plan: ServePlan, config: PodConfig, progress: Callable[[str], None]) -> list[Played]:
    """Measure every load on every pod. Raises ConfigError: flags, settings, trace; ResourceError: no pod."""
    played = []
    with targets(plan, config, progress) as pods:
        for load in _loads(plan, min(pod.window for pod in pods)):
            played += measure(load, pods, plan, config, progress)
    return played


@contextlib.contextmanager
def targets(plan: ServePlan, config: PodConfig, progress: Callable[[str], None]) -> Iterator[list[Target]]:
    """Yield the pods, warm; those started here end afterwards."""
    with contextlib.ExitStack() as stack:
        pods = []
        for variant in plan.variants:
            if plan.url:
                pod = Target(plan.url, plan.url.rstrip("/"))
                pod.connect(config.gateway.api_keys[0] if config.gateway.api_keys else "")
            else:
                progress(f"starting {variant.label}")
                pod = stack.enter_context(started(variant.label, config, variant.overrides))
            complete(play(pod.client, WARM_UP.make(WARM_UP_SEED)))
            pods.append(pod)
        yield pods


def measure(
    load: Load, pods: Sequence[Target], plan: ServePlan, config: PodConfig, progress: Callable[[str], None]
) -> list[Played]:
    """Play `load` to all pods, round by round in turns."""
    played = [Played(load.name, pod.label) for pod in pods]
    for number in range(plan.rounds):
        requests = load.make(plan.seed + number)
        for pod, one in zip(pods, played, strict=True):
            progress(f"{load.name}: {pod.label}, round {number + 1} of {plan.rounds}")
            pod_s, own_s = pod.cpu_s(), own_cpu_s()
            one.rounds.append(complete(play(pod.client, requests)))
            one.cpu_s += pod.cpu_s() - pod_s
            one.generator_cpu_s += own_cpu_s() - own_s
            one.num_left_out = requests.num_left_out
            one.ideal_cached_tokens += sum(workload.ideal_cached_tokens(requests, config.kv.block_tokens))
            one.step_us = step_times(pod)
    return played


def step_times(pod: Target) -> tuple[float, ...]:
    """Return p50, p99, p99.9 of the newest decode steps in us, of the worker where each is longest."""
    complete(asyncio.sleep(COUNTERS_LAG_S))
    found = pod.metrics()
    return tuple(found[name] for name in STEP_GAUGES) if all(name in found for name in STEP_GAUGES) else ()


def complete(work: Coroutine[Any, Any, Result]) -> Result:
    """Run a coroutine to its end in uvloop."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)


def own_cpu_s() -> float:
    """Return the CPU time of this process."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _loads(plan: ServePlan, window: int) -> list[Load]:
    shape = (plan.num_requests, plan.prompt_tokens, plan.output_tokens)
    loads = []
    if plan.trace is not None:
        kind, path = plan.trace
        rows = workload.read_trace(kind, path, plan.trace_requests)
        scale = plan.scale or workload.fitting_scale(rows, window)
        load = workload.replay(kind, rows, scale=scale, speed=plan.speed, window=window)
        if not load.make(plan.seed).requests:
            raise ConfigError(
                f"--scale {scale:g}: no request of the trace fits the window of {window} tokens"
            )
        loads.append(load)
    loads += [workload.poisson(rate, *shape) for rate in plan.rates]
    clients = plan.clients or (() if loads else (1, 8, 32))
    loads += [workload.closed_loop(count, *shape) for count in clients]
    if len(loads) > (plan.trace is not None) and plan.prompt_tokens + plan.output_tokens > window:
        total = plan.prompt_tokens + plan.output_tokens
        raise ConfigError(f"--prompt, --output-tokens: {total} tokens exceed the model's window of {window}")
    return loads
