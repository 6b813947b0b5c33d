"""One DP group in one process: a scheduler's core, toy executors, gateways, and all that may happen to them.

All randomness comes from one seed. A channel is the queue of one connection: first in, first out, as slow as
chance wants it, independent of the others. Whatever dies leaves behind what its sockets already held.

Faults: an executor dies (with or without notice, in mid-step) and its next incarnation connects; a step is
overdue; a step fails; a scheduler dies, and the executor, possibly busy with the old one's plan, connects to
the next; a gateway dies; requests arrive twice, are aborted, or are dispatched again while they run. Where prompts are
computed elsewhere: the prefill leader dies and comes back, gives tasks back, loses offers with their worker; fetches
take their time, write half of their blocks, fail.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from bus.control.messages import (
    AbortRequest,
    AddRequest,
    CancelFetch,
    ExecutorReady,
    FetchKv,
    KvFetched,
    RequestAccepted,
    RequestFailed,
    RequestRejected,
    SamplingParams,
    StepFailed,
    StepPlan,
    TokenLogprob,
    TokensGenerated,
)
from services.batching.admission import Limits
from services.scheduler.core import SchedulerCore
from services.scheduler.events import (
    Event,
    ExecutorConnected,
    ExecutorLost,
    FromGateway,
    GatewayLost,
    LeaderFound,
    LeaderLost,
    Reply,
    SendPlan,
    SendToLeader,
    SendTransfer,
    Tick,
    ToGateway,
)
from services.scheduler.settings import CoreSettings
from tests.harness.toy_executor import ToyExecutor, oracle_outputs, oracle_prompt_logprobs
from tests.harness.toy_leader import ToyLeader

STEP_TIMEOUT_NS = 1000
NUM_REQUESTS = 12
NUM_FAULTY_TURNS = 300
NUM_TURNS_MAX = 20_000


@dataclass
class Client:
    """One request as its gateway knows it, with what the oracle says it must become."""

    gateway: str
    request_id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams
    outputs: list[int]
    prompt_logprobs: list[TokenLogprob]
    attempt: int = 0
    received: list[int] = field(default_factory=list)
    num_prompt_logprobs: int = 0
    is_over: bool = False
    is_abandoned: bool = False

    def message(self) -> AddRequest:
        return AddRequest(
            request_id=self.request_id,
            attempt=self.attempt,
            prompt_token_ids=self.prompt,
            output_token_ids=tuple(self.received),
            sampling=self.sampling,
        )

    def take(self, message: TokensGenerated) -> None:
        """Assert that these are the oracle's next tokens, the last word exactly with the last."""
        assert message.first_index == len(self.received), "a token was repeated or skipped"
        self.received += message.token_ids
        assert self.received == self.outputs[: len(self.received)], "not the oracle's tokens"
        self.num_prompt_logprobs += len(message.prompt_logprobs)
        if message.prompt_logprobs:
            assert list(message.prompt_logprobs) == self.prompt_logprobs
        if message.finish_reason:
            self.is_over = True
            assert self.received == self.outputs
            assert self.num_prompt_logprobs == len(self.prompt_logprobs)
            stopped = message.finish_reason == "stop"
            assert message.stop_token_id == (self.outputs[-1] if stopped else -1)
            assert stopped or len(self.outputs) == self.sampling.max_tokens
        else:
            assert len(self.received) < self.sampling.max_tokens, "the last word is missing"


class World:
    """See the module's docstring. `run` is the whole test."""

    def __init__(self, seed: int, *, pressed: bool = False, **settings: object) -> None:
        """`pressed` = many requests that begin alike, blocks for hardly one of them, a host tier, fewer deaths."""
        self.random = random.Random(seed)
        chance = self.random
        self.pressed = pressed
        self.num_requests = 5 * NUM_REQUESTS if pressed else NUM_REQUESTS
        self.now_ns = 0
        self.vocab_size = chance.randint(6, 40)
        self.block_tokens = chance.randint(1, 4)
        self.num_blocks = chance.randint(20, 60) // self.block_tokens
        self.num_host_blocks = chance.choice((0, 3, 10, 40))
        if pressed:
            self.num_blocks = -(-20 // self.block_tokens)
            self.num_host_blocks = chance.choice((3, 10, 40))
        self.settings: dict[str, Any] = {
            "max_num_seqs": chance.randint(1, 6),
            "max_num_batched_tokens": chance.randint(1, 24),
            "max_waiting_requests": chance.randint(2, NUM_REQUESTS),
            "enable_prefix_caching": chance.random() < 0.8,
            "async_scheduling": chance.random() < 0.7,
            "prefill_tokens_min": chance.randint(1, 6) if chance.random() < 0.6 else 0,
            **settings,
        }
        self.gateways = {"gateway-0.1", "gateway-1.1"}
        self.clients: dict[str, Client] = {}
        self.to_scheduler: dict[str, deque[Event]] = {}
        self.scheduler_incarnation = 0
        self.executor_incarnation = 0
        self.num_replies = 0
        self.executor: ToyExecutor
        self.to_executor: deque[StepPlan | FetchKv | CancelFetch] = deque()  # one socket brings all, in order
        self.transfers: list[FetchKv] = []  # under way, between steps
        self.leader = ToyLeader(self.vocab_size, self.block_tokens)
        self.start_scheduler()
        self.start_executor()
        self.leader_says(LeaderFound())

    # ---------------------------------------------------------------- the run

    def run(self) -> None:
        """Live through the faults, then let everybody finish and look at what is left."""
        faults = [
            (30, self.deliver),
            (12, self.work),
            (20 if self.pressed else 4, self.add_request),
            (1, self.repeat_request),
            (1, self.dispatch_again),
            (1, self.abort_request),
            (0.1 if self.pressed else 1, self.kill_executor),
            (0.1 if self.pressed else 1, self.pass_step_timeout),
            (0.5, self.fail_step),
            (0.1 if self.pressed else 0.5, self.kill_scheduler),
            (0.2, self.kill_gateway),
            (8, self.prefill),
            (8, self.fetch),
            (0.7, self.give_task_back),
            (0.5, self.kill_leader),
            (0.5, self.kill_prefill_worker),
        ]
        weights, actions = zip(*faults, strict=True)
        for action in self.random.choices(actions, weights, k=NUM_FAULTY_TURNS):
            action()
        for _ in range(NUM_TURNS_MAX):
            if not (
                any(self.to_scheduler.values()) or self.to_executor or self.transfers or self.leader.queue
            ):
                break
            self.random.choice((self.deliver, self.work, self.prefill, self.fetch))()
        self.check_end()

    def check_end(self) -> None:
        for client in self.clients.values():
            assert client.is_over or client.is_abandoned, f"{client.request_id} never ended"
        snapshot = self.core.snapshot()
        assert self.core.is_idle and snapshot["num_running"] == snapshot["num_waiting"] == 0
        assert snapshot["num_free_blocks"] == snapshot["num_blocks"] == self.num_blocks
        assert not self.leader.offers, "an offer was forgotten"

    def feed(self, *events: Event) -> None:
        """Hand events to the core, check it, and carry out what it says."""
        self.now_ns += self.random.randint(0, 3)
        instructions = self.core.handle(*events, now_ns=self.now_ns)
        self.core.check_invariants()
        for instruction in instructions:
            match instruction:
                case SendPlan(incarnation, message) | SendTransfer(incarnation, message):
                    self.send_executor(incarnation, message)
                case SendToLeader(message):
                    if LeaderLost() not in self.channel(
                        "leader"
                    ):  # else it goes to a socket that nobody reads
                        self.leader.take(message)
                case Reply(gateway, message):
                    self.receive(gateway, message)

    def send_executor(self, incarnation: int, message: StepPlan | FetchKv | CancelFetch) -> None:
        if incarnation == self.executor_incarnation:
            self.to_executor.append(message)
        else:  # the socket finds nobody there
            self.channel("scheduler").append(ExecutorLost(incarnation, "unreachable", dead=False))

    def channel(self, sender: str) -> deque[Event]:
        return self.to_scheduler.setdefault(sender, deque())

    def say(self, client: Client, message: AddRequest | AbortRequest) -> None:
        self.channel(client.gateway).append(FromGateway(client.gateway, message))

    def deliver(self) -> None:
        """Let the scheduler hear what waits in one or more channels."""
        channels = [channel for channel in self.to_scheduler.values() if channel]
        self.random.shuffle(channels)
        events: list[Event] = []
        for channel in channels[: self.random.randint(1, 3)]:
            events += [channel.popleft() for _ in range(self.random.randint(1, len(channel)))]
        if events:
            self.feed(*events)

    # ---------------------------------------------------------------- executor

    def start_executor(self) -> None:
        self.executor_incarnation += 1
        self.to_executor.clear()
        self.transfers.clear()
        ready = ExecutorReady(
            index=0,
            incarnation=self.executor_incarnation,
            num_blocks=self.num_blocks,
            block_tokens=self.block_tokens,
            max_model_len=1000,
            vocab_size=self.vocab_size,
            num_host_blocks=self.num_host_blocks,
        )
        self.executor = ToyExecutor(ready)
        self.executor_says(*[ExecutorConnected(ready)] * self.random.randint(1, 3))

    def executor_says(self, *events: Event) -> None:
        self.channel(f"attention-0.{self.executor_incarnation}").extend(events)

    def work(self) -> None:
        """Let the executor take the next message; it may be from a scheduler that is dead by now."""
        if not self.to_executor:
            return
        match self.to_executor.popleft():
            case StepPlan() as plan:
                self.executor_says(self.executor.run(plan))
            case FetchKv() as fetch:
                self.transfers.append(fetch)
            case CancelFetch(fetch_id=fetch_id):
                for fetch in [one for one in self.transfers if one.fetch_id == fetch_id]:
                    self.end_fetch(fetch, "cancelled")

    def fail_step(self) -> None:
        if self.to_executor and isinstance(self.to_executor[0], StepPlan):
            step_id, incarnation = self.to_executor[0].step_id, self.executor_incarnation
            self.to_executor.popleft()
            self.executor_says(
                StepFailed(step_id=step_id, incarnation=incarnation, code="peer_died", message="expert-0")
            )

    def kill_executor(self) -> None:
        """End it; some of what it said is lost, the rest comes late; the news of its death comes whenever."""
        channel = self.channel(f"attention-0.{self.executor_incarnation}")
        for _ in range(self.random.randint(0, len(channel))):
            channel.pop()
        self.channel("locks").append(ExecutorLost(self.executor_incarnation, "owner lock is free"))
        self.start_executor()

    def pass_step_timeout(self) -> None:
        self.now_ns += STEP_TIMEOUT_NS
        self.feed(Tick())

    # ---------------------------------------------------------------- prefill elsewhere

    def leader_says(self, *events: Event) -> None:
        self.channel("leader").extend(events)

    def prefill(self) -> None:
        """Let the prefill side compute a task."""
        if self.leader.queue:
            self.leader_says(self.leader.work())

    def give_task_back(self) -> None:
        if self.leader.queue:
            self.leader_says(self.leader.fail(retryable=self.random.random() < 0.5))

    def kill_leader(self) -> None:
        """Its tasks are gone; its workers withdraw their offers when the next incarnation greets them."""
        self.leader.forget_all()
        self.leader_says(LeaderLost(), LeaderFound())

    def kill_prefill_worker(self) -> None:
        self.leader_says(*self.leader.lose_offers())

    def fetch(self) -> None:
        """Let the executor write some of a prompt's KV, or the rest of it, or find that it is not to be had."""
        if not self.transfers:
            return
        fetch = self.random.choice(self.transfers)
        if self.random.random() < 0.5:
            self.executor.receive(self.random.choice(fetch.block_ids), [(-1, -1, -1)] * self.block_tokens)
            return
        blocks = self.leader.read(fetch)
        for block_id, entries in zip(fetch.block_ids, blocks or (), strict=False):
            self.executor.receive(block_id, entries)
        self.end_fetch(fetch, "" if blocks is not None else "withdrawn")
        if blocks is not None:
            del self.leader.offers[fetch.ticket.serial]

    def end_fetch(self, fetch: FetchKv, error: str) -> None:
        self.transfers.remove(fetch)
        incarnation = self.executor_incarnation
        self.executor_says(KvFetched(fetch_id=fetch.fetch_id, incarnation=incarnation, error=error))

    # ---------------------------------------------------------------- scheduler

    def start_scheduler(self) -> None:
        self.scheduler_incarnation += 1
        settings = CoreSettings(
            incarnation=self.scheduler_incarnation,
            limits=Limits(),
            step_timeout_ns=STEP_TIMEOUT_NS,
            executor_wait_ns=2 * STEP_TIMEOUT_NS,
            max_num_losses=1_000_000,  # chance is cruel to the innocent
            kv_identity="toy",
            **self.settings,
        )
        self.core = SchedulerCore(settings, now_ns=self.now_ns)

    def kill_scheduler(self) -> None:
        """Everything in its sockets is lost; the executor connects anew, the gateways dispatch again."""
        self.start_scheduler()
        self.to_scheduler.clear()
        # At most the plan that it is busy with is still done; transfers end before it greets the next scheduler.
        keeps = self.random.random() < 0.5
        self.to_executor = deque([m for m in self.to_executor if isinstance(m, StepPlan) and keeps])
        self.transfers.clear()
        self.leader.forget_all()
        self.leader_says(LeaderFound())
        self.executor_says(ExecutorConnected(self.executor.ready))
        for client in self.living_clients():
            self.redispatch(client)

    # ---------------------------------------------------------------- gateways

    def living_clients(self) -> list[Client]:
        return [client for client in self.clients.values() if not client.is_over and not client.is_abandoned]

    def pick(self) -> Client | None:
        living = self.living_clients()
        return self.random.choice(living) if living else None

    def add_request(self) -> None:
        if len(self.clients) >= self.num_requests:
            return
        chance = self.random
        max_tokens = chance.randint(0, 8)
        prompt = self.draw_prompt()
        sampling = SamplingParams(
            max_tokens=max_tokens,
            min_tokens=chance.randint(0, max_tokens) if chance.random() < 0.3 else 0,
            seed=chance.randrange(1000),
            eos_token_ids=(0,),
            stop_token_ids=(1,) if chance.random() < 0.3 else (),
            ignore_eos=chance.random() < 0.3,
            prompt_logprobs=0 if chance.random() < 0.3 else -1,
            frequency_penalty=0.5 if chance.random() < 0.2 else 0.0,
            repetition_penalty=1.5 if chance.random() < 0.2 else 1.0,
        )
        client = Client(
            gateway=chance.choice(sorted(self.gateways)),
            request_id=f"request-{len(self.clients)}",
            prompt=prompt,
            sampling=sampling,
            outputs=oracle_outputs(prompt, sampling, self.vocab_size),
            prompt_logprobs=oracle_prompt_logprobs(prompt) if sampling.prompt_logprobs >= 0 else [],
        )
        self.clients[client.request_id] = client
        self.say(client, client.message())

    def draw_prompt(self) -> tuple[int, ...]:
        """Return up to 10 tokens; often they begin as another request's prompt and output do."""
        chance = self.random
        history: list[int] = []
        if self.clients and chance.random() < (0.9 if self.pressed else 0.6):
            others = list(self.clients.values())
            other = chance.choice(others[:5] if self.pressed else others)
            history = [*other.prompt, *other.outputs]
            history = history[: chance.randint(1, len(history))]
        tail = [chance.randrange(self.vocab_size) for _ in range(chance.randint(1, 10))]
        return tuple([*history, *tail][: max(1, min(10, len(history) + 3))] if history else tail)

    def repeat_request(self) -> None:
        """Send the same attempt again; it tells what the gateway has by now, but changes nothing."""
        if client := self.pick():
            self.say(client, client.message())

    def dispatch_again(self) -> None:
        if client := self.pick():
            self.redispatch(client)

    def redispatch(self, client: Client) -> None:
        client.attempt += 1
        self.say(client, client.message())

    def abort_request(self) -> None:
        if client := self.pick():
            client.is_abandoned = True
            self.say(client, AbortRequest(request_id=client.request_id, attempt=client.attempt))

    def kill_gateway(self) -> None:
        """Its clients are gone; the next incarnation takes new ones. What it said may come late."""
        dead = self.random.choice(sorted(self.gateways))
        name, incarnation = dead.split(".")
        self.gateways = self.gateways - {dead} | {f"{name}.{int(incarnation) + 1}"}
        for client in self.living_clients():
            client.is_abandoned |= client.gateway == dead
        self.channel("locks").append(GatewayLost(dead))

    def receive(self, gateway: str, message: ToGateway) -> None:
        """Do what a gateway does with the scheduler's word."""
        self.num_replies += 1
        if gateway not in self.gateways:
            self.channel("scheduler").append(GatewayLost(gateway))  # the socket finds nobody there
            return
        client = self.clients[message.request_id]
        if client.is_over or client.is_abandoned or message.attempt != client.attempt:
            return
        assert client.gateway == gateway
        match message:
            case RequestAccepted():
                return
            case TokensGenerated():
                client.take(message)
            case RequestFailed():
                assert message.retryable, message
                self.redispatch(client)
            case RequestRejected():
                assert message.code == "queue_full", message
                self.redispatch(client)
