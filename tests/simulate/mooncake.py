"""A trace through the pure cores: what placement policies do to prefix hits, in virtual time.

    python -m tests.simulate.mooncake [--groups 4] [--policies round_robin,prefix] [--requests N] [--num-blocks N]
        [--num-host-blocks N]

The gateway's job executor and one scheduler per DP group are the real cores; the executor is the toy one, whose
tokens show every mistake, with a clock that charges each step for itself and for its tokens. Lengths are divided by
`--scale`, so that one of the trace's blocks (512 tokens, named by `hash_ids`; equal ids mean equal content) is one KV
block here. An ideal cache has everything that any earlier prompt held, wherever it was computed, at once. Its hits
are counted under the scheduler's rules: whole blocks, and never the last token.
"""

from __future__ import annotations

import argparse
import heapq
import json
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from bus.clock import NS_PER_MS
from bus.control.messages import ExecutorReady, SamplingParams, StepCompleted
from gateway.core import JobExecutor
from gateway.events import (
    ClientSubmitted,
    DeliverError,
    DeliverFinish,
    DeliverTokens,
    GroupsChanged,
    GroupView,
    SchedulerSaid,
    SendAbort,
    SendAddRequest,
    Tick,
)
from gateway.events import Event as GatewayEvent
from gateway.jobs import JobLimits
from gateway.placer import PlacementSettings
from services.batching.admission import Limits
from services.scheduler.core import SchedulerCore
from services.scheduler.events import Event, ExecutorConnected, FromGateway, Reply, SendPlan
from services.scheduler.settings import CoreSettings
from tests.harness.toy_executor import ToyExecutor

TRACE = Path(__file__).resolve().parents[3] / "shared" / "data" / "mooncake_conversation.jsonl"
TRACE_BLOCK_TOKENS = 512
GATEWAY = "gateway-0.1"
VOCAB_SIZE = 1 << 30
WINDOW_TOKENS = 1 << 20


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One line of the trace, lengths divided by the scale."""

    arrives_at_ns: int
    prompt_token_ids: tuple[int, ...]
    max_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """How large, and how fast."""

    num_groups: int = 4
    block_tokens: int = 8
    num_blocks: int = 260_000  # per group: more than the whole trace fills
    num_host_blocks: int = 0  # per group, besides
    max_num_seqs: int = 32
    max_num_batched_tokens: int = 64
    balance_tokens: int = 4096  # 256K tokens of the trace, about 20 of its prompts
    prefix_percent_min: int = 10
    step_us: int = 5_000
    token_us: int = 500

    @property
    def scale(self) -> int:
        """How many tokens of the trace are one here."""
        return TRACE_BLOCK_TOKENS // self.block_tokens


@dataclass(slots=True)
class Outcome:
    """What one run of one policy came to."""

    policy: str
    num_requests: int = 0
    num_failed: int = 0
    query_tokens: int = 0
    hit_tokens: int = 0
    ideal_hit_tokens: int = 0
    num_preemptions: int = 0
    requests_by_group: list[int] = field(default_factory=list)
    ttft_ns: list[int] = field(default_factory=list)

    def line(self) -> str:
        """Return one row of the table."""
        ttft_ms = [self.percentile_ns(share) / NS_PER_MS for share in (0.5, 0.9, 0.99)]
        hits, ideal = self.hit_tokens / self.query_tokens, self.ideal_hit_tokens / self.query_tokens
        return (
            f"{self.policy:12} {self.num_requests:8} {hits:8.2%} {ideal:8.2%} {hits / max(ideal, 1e-9):8.2%} "
            f"{ttft_ms[0]:9.0f} {ttft_ms[1]:9.0f} {ttft_ms[2]:9.0f} {self.num_preemptions:8}  {self.requests_by_group}"
        )

    def percentile_ns(self, share: float) -> int:
        """Return the TTFT that `share` of the requests do not exceed."""
        ordered = sorted(self.ttft_ns)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


HEADER = (
    f"{'policy':12} {'requests':>8} {'hits':>8} {'ideal':>8} {'of ideal':>8} "
    f"{'TTFT p50':>9} {'p90':>9} {'p99 ms':>9} {'preempt.':>8}  requests by group"
)


def read_trace(path: Path, world: World, num_requests: int | None = None) -> Iterator[TraceRequest]:
    """Yield the trace's requests in order of arrival."""
    with path.open() as lines:
        for line in islice(lines, num_requests):
            one = json.loads(line)
            size = world.block_tokens
            token_ids = tuple(block * size + n for block in one["hash_ids"] for n in range(size))
            num_tokens = max(1, one["input_length"] // world.scale)
            max_tokens = max(1, one["output_length"] // world.scale)
            yield TraceRequest(one["timestamp"] * NS_PER_MS, token_ids[:num_tokens], max_tokens)


def ideal_hit_tokens(prompts: Sequence[Sequence[int]], block_tokens: int) -> int:
    """Return what one infinite cache would have hit, each prompt being there as soon as it has arrived."""
    seen: set[tuple[int, int]] = set()
    num_tokens = 0
    for prompt in prompts:
        parent, is_hit = 0, True
        for end in range(block_tokens, len(prompt) + 1, block_tokens):
            parent = hash((parent, *prompt[end - block_tokens : end]))
            is_hit = is_hit and (end, parent) in seen
            num_tokens += block_tokens if is_hit and end < len(prompt) else 0
            seen.add((end, parent))
    return num_tokens


class Simulation:
    """One policy over one trace. Events happen in order of virtual time; nothing is random."""

    def __init__(self, policy: str, world: World) -> None:
        self.world = world
        self.outcome = Outcome(policy)
        self.now_ns = 0
        self._due: list[tuple[int, int, int, StepCompleted]] = []  # (when, tie, group, result)
        self._num_steps = 0
        self._arrived_ns: dict[str, int] = {}
        placing = PlacementSettings(
            policy=policy,
            output_reserve_tokens=512 // world.scale,
            balance_tokens=world.balance_tokens,
            prefix_percent_min=world.prefix_percent_min,
            max_num_seqs=world.max_num_seqs,
            block_tokens=world.block_tokens,
            cache_tokens=(world.num_blocks + world.num_host_blocks) * world.block_tokens,
        )
        self.gateway = JobExecutor(JobLimits(waiting_jobs_max=1 << 30), placing)
        self.cores = [self._scheduler() for _ in range(world.num_groups)]
        self.executors: list[ToyExecutor] = []
        for group in range(world.num_groups):
            ready = ExecutorReady(
                index=group,
                incarnation=1,
                num_blocks=world.num_blocks,
                block_tokens=world.block_tokens,
                max_model_len=WINDOW_TOKENS,
                vocab_size=VOCAB_SIZE,
                num_host_blocks=world.num_host_blocks,
            )
            self.executors.append(ToyExecutor(ready))
            self._tell_scheduler(group, ExecutorConnected(ready))
        views = {
            group: GroupView(1, serving=True, executor_incarnation=1) for group in range(world.num_groups)
        }
        self._tell_gateway(GroupsChanged(views))

    def run(self, trace: Sequence[TraceRequest]) -> Outcome:
        """Let all requests arrive and finish."""
        for number, request in enumerate(trace):
            self._pass_time(request.arrives_at_ns)
            request_id = str(number)
            self._arrived_ns[request_id] = self.now_ns
            sampling = SamplingParams(max_tokens=request.max_tokens, ignore_eos=True)
            self._tell_gateway(ClientSubmitted(request_id, request.prompt_token_ids, sampling))
        while self._due:
            self._pass_time(self._due[0][0])
        prompts = [request.prompt_token_ids for request in trace]
        self.outcome.ideal_hit_tokens = ideal_hit_tokens(prompts, self.world.block_tokens)
        return self._summary()

    def check_invariants(self) -> None:
        """Assert that all cores are well and nothing is left."""
        self.gateway.check_invariants()
        assert self.gateway.num_jobs() == 0
        for core in self.cores:
            core.check_invariants()
            assert core.is_idle

    def _scheduler(self) -> SchedulerCore:
        settings = CoreSettings(
            incarnation=1,
            max_num_seqs=self.world.max_num_seqs,
            max_num_batched_tokens=self.world.max_num_batched_tokens,
            max_waiting_requests=1 << 30,
            limits=Limits(),
            step_timeout_ns=1 << 60,
            executor_wait_ns=1 << 60,
            enable_prefix_caching=True,
            kv_identity="toy",
        )
        return SchedulerCore(settings, now_ns=0)

    def _pass_time(self, until_ns: int) -> None:
        while self._due and self._due[0][0] <= until_ns:
            self.now_ns, _, group, result = heapq.heappop(self._due)
            self._tell_scheduler(group, result)
        self.now_ns = max(self.now_ns, until_ns)
        wake_ns = self.gateway.next_wake_ns()
        if wake_ns is not None and wake_ns <= self.now_ns:
            self._tell_gateway(Tick())

    def _tell_gateway(self, *events: GatewayEvent) -> None:
        waiting = deque(events)
        while waiting:
            for instruction in self.gateway.handle(waiting.popleft(), self.now_ns):
                match instruction:
                    case SendAddRequest(group, message):
                        waiting += self._scheduler_replies(group, FromGateway(GATEWAY, message))
                    case SendAbort(group, message):
                        waiting += self._scheduler_replies(group, FromGateway(GATEWAY, message))
                    case DeliverTokens(request_id) if request_id in self._arrived_ns:
                        self.outcome.ttft_ns.append(self.now_ns - self._arrived_ns.pop(request_id))
                    case DeliverFinish():
                        self.outcome.num_requests += 1
                    case DeliverError():
                        self.outcome.num_failed += 1

    def _tell_scheduler(self, group: int, event: Event) -> None:
        self._tell_gateway(*self._scheduler_replies(group, event))

    def _scheduler_replies(self, group: int, event: Event) -> list[GatewayEvent]:
        replies: list[GatewayEvent] = []
        for instruction in self.cores[group].handle(event, now_ns=self.now_ns):
            match instruction:
                case Reply(_, message):
                    replies.append(SchedulerSaid(group, message))
                case SendPlan(_, plan):
                    num_tokens = sum(len(sequence.token_ids) for sequence in plan.sequences)
                    duration_us = self.world.step_us + num_tokens * self.world.token_us
                    self._num_steps += 1
                    result = self.executors[group].run(plan)
                    due_ns = self.now_ns + duration_us * 1000
                    heapq.heappush(self._due, (due_ns, self._num_steps, group, result))
        return replies

    def _summary(self) -> Outcome:
        outcome = self.outcome
        for group, core in enumerate(self.cores):
            counters = core.snapshot()
            outcome.query_tokens += counters["prefix_cache_queries"]
            outcome.hit_tokens += counters["prefix_cache_hits"] + counters["external_prefix_cache_hits"]
            outcome.num_preemptions += counters["num_preemptions"]
            route = self.gateway.placer.routes.get(group)
            outcome.requests_by_group.append(route.num_requests if route else 0)
        return outcome


def main() -> None:
    """Print one line per policy."""
    parser = argparse.ArgumentParser(
        description="Placement policies over the Mooncake trace, in virtual time."
    )
    parser.add_argument("--trace", type=Path, default=TRACE)
    parser.add_argument("--groups", type=int, default=World().num_groups)
    parser.add_argument("--policies", default="round_robin,least_loaded,kv_usage,prefix")
    parser.add_argument("--requests", type=int, help="so many from the beginning; default: all")
    parser.add_argument("--num-blocks", type=int, default=World().num_blocks, help="KV blocks of each group")
    parser.add_argument("--num-host-blocks", type=int, default=0, help="blocks of each group's host tier")
    parser.add_argument(
        "--balance-tokens", type=int, default=World().balance_tokens, help="gateway.balance_tokens"
    )
    parser.add_argument("--prefix-percent-min", type=int, default=World().prefix_percent_min, help="likewise")
    given = parser.parse_args()
    world = World(
        num_groups=given.groups,
        num_blocks=given.num_blocks,
        num_host_blocks=given.num_host_blocks,
        balance_tokens=given.balance_tokens,
        prefix_percent_min=given.prefix_percent_min,
    )
    trace = list(read_trace(given.trace, world, given.requests))
    print(HEADER)
    for policy in given.policies.split(","):
        simulation = Simulation(policy, world)
        print(simulation.run(trace).line(), flush=True)
        simulation.check_invariants()


if __name__ == "__main__":
    main()
