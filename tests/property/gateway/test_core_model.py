"""The job executor against a simple model: whatever dies, repeats or gets lost, every client gets its tokens once.

The model knows the true output of every request. Simulated schedulers produce it; their messages are delivered late,
twice, or not at all, and schedulers die. The client's side may only ever see the true tokens, in order, and exactly
one last word.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from bus.clock import NS_PER_MS
from bus.control.messages import (
    AddRequest,
    RequestAccepted,
    RequestFailed,
    RequestRejected,
    SamplingParams,
    TokensGenerated,
)
from gateway.core import JobExecutor
from gateway.events import (
    ClientLeft,
    ClientSubmitted,
    DeliverAccepted,
    DeliverError,
    DeliverFinish,
    DeliverTokens,
    Event,
    GroupsChanged,
    GroupView,
    SchedulerMessage,
    SchedulerSaid,
    SendAbort,
    SendAddRequest,
    SendRefused,
    Tick,
)
from gateway.jobs import JobLimits
from gateway.placer import PlacementSettings

MAX_TOKENS = 6
GROUPS = (0, 1, 2)
HOW = st.sampled_from(["once", "once", "once", "twice", "never"])


def truth(request_id: str, position: int) -> int:
    """The token that every scheduler computes at that position."""
    return zlib.crc32(f"{request_id}/{position}".encode()) % 1000


@dataclass
class Running:
    request_id: str
    attempt: int
    num_tokens: int


@dataclass
class Scheduler:
    incarnation: int
    serving: bool = True
    running: dict[str, Running] = field(default_factory=dict)
    wire: list[SchedulerMessage] = field(default_factory=list)  # said, not yet heard


@dataclass
class Client:
    token_ids: list[int] = field(default_factory=list)
    num_accepted: int = 0
    ended: bool = False
    left: bool = False


class Pod(RuleBasedStateMachine):
    """Rules are what the world does; `_do` feeds the core and checks its instructions."""

    def __init__(self) -> None:
        super().__init__()
        limits = JobLimits(retry_attempts_max=8, retry_window_ms=20_000, waiting_jobs_max=3)
        # Group 2 is for long requests, every third; blocks of one token, so that prefixes match.
        placing = PlacementSettings(
            block_tokens=1, cache_tokens=3, first_long_group=2, long_tokens=2 + MAX_TOKENS + 1
        )
        self.core = JobExecutor(limits, placing)
        self.now_ms = 0
        self.clients: dict[str, Client] = {}
        self.schedulers: dict[int, Scheduler] = {}
        self.num_incarnations = 0
        self.ghosts: list[tuple[int, SchedulerMessage]] = []  # from the dead, heard late
        self.refuse_next = False

    # ---------------------------------------------------------------- the world

    @initialize()
    def two_groups(self) -> None:
        self.start(0)
        self.start(1)
        self.submit()

    @rule()
    def submit(self) -> None:
        request_id = f"r{len(self.clients)}"
        number = len(self.clients)
        self.clients[request_id] = Client()
        prompt = (1, 2, 3)[: 3 if number % 3 == 2 else 2]
        self._do(ClientSubmitted(request_id, prompt, SamplingParams(max_tokens=MAX_TOKENS)))

    @rule(data=st.data())
    @precondition(lambda self: self.clients)
    def leave(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.clients)))
        self.clients[request_id].left = True
        self._do(ClientLeft(request_id))

    @rule(dp_group=st.sampled_from(GROUPS))
    @precondition(lambda self: self.now_ms % 2 == 1)  # half of the time, so that requests get somewhere
    def restart(self, dp_group: int) -> None:
        self.start(dp_group)

    def start(self, dp_group: int) -> None:
        """Also kills: the next incarnation may be the first sign of a death."""
        self._bury(dp_group)
        self.num_incarnations += 1
        self.schedulers[dp_group] = Scheduler(self.num_incarnations)
        self._groups()

    @rule(dp_group=st.sampled_from(GROUPS))
    @precondition(lambda self: self.now_ms % 2 == 1)
    def kill(self, dp_group: int) -> None:
        self._bury(dp_group)
        self._groups()

    @rule(dp_group=st.sampled_from(GROUPS), serving=st.booleans())
    def attention_comes_or_goes(self, dp_group: int, serving: bool) -> None:
        if dp_group in self.schedulers:
            self.schedulers[dp_group].serving = serving
            self._groups()

    @rule(num_tokens=st.integers(1, 2), hows=st.lists(HOW, max_size=4))
    def work(self, num_tokens: int, hows: list[str]) -> None:
        for dp_group in GROUPS:
            self.step(num_tokens, dp_group)
            for how in hows:
                self.hear(dp_group, how)

    @rule(num_tokens=st.integers(1, 3), dp_group=st.sampled_from(GROUPS))
    def step(self, num_tokens: int, dp_group: int) -> None:
        scheduler = self.schedulers.get(dp_group)
        for running in list(scheduler.running.values()) if scheduler else []:
            assert scheduler is not None
            first = running.num_tokens
            last = min(first + num_tokens, MAX_TOKENS)
            running.num_tokens = last
            scheduler.wire.append(
                TokensGenerated(
                    request_id=running.request_id,
                    attempt=running.attempt,
                    first_index=first,
                    token_ids=tuple(truth(running.request_id, n) for n in range(first, last)),
                    finish_reason="length" if last == MAX_TOKENS else "",
                )
            )
            if last == MAX_TOKENS:
                del scheduler.running[running.request_id]

    @rule(dp_group=st.sampled_from(GROUPS), retryable=st.booleans())
    def fail_one(self, dp_group: int, retryable: bool) -> None:
        scheduler = self.schedulers.get(dp_group)
        if scheduler and scheduler.running:
            running = scheduler.running.pop(sorted(scheduler.running)[0])
            scheduler.wire.append(
                RequestFailed(
                    request_id=running.request_id,
                    attempt=running.attempt,
                    code="x",
                    message="x",
                    retryable=retryable,
                )
            )

    @rule(dp_group=st.sampled_from(GROUPS), how=HOW)
    def hear(self, dp_group: int, how: str) -> None:
        scheduler = self.schedulers.get(dp_group)
        if scheduler and scheduler.wire:
            message = scheduler.wire.pop(0)
            for _ in range({"once": 1, "twice": 2, "never": 0}[how]):
                self._do(SchedulerSaid(dp_group, message))

    @rule()
    @precondition(lambda self: self.ghosts)
    def hear_a_ghost(self) -> None:
        self._do(SchedulerSaid(*self.ghosts.pop(0)))

    @rule(after_ms=st.sampled_from([1, 61, 61, 1_000, 6_000]))
    def wait(self, after_ms: int) -> None:
        self.now_ms += after_ms
        self._do(Tick())

    @rule()
    def refuse_the_next_send(self) -> None:
        self.refuse_next = True

    # ---------------------------------------------------------------- the shell and the client

    def _bury(self, dp_group: int) -> None:
        scheduler = self.schedulers.pop(dp_group, None)
        if scheduler is not None:
            self.ghosts += [(dp_group, message) for message in scheduler.wire]

    def _groups(self) -> None:
        self._do(GroupsChanged({d: GroupView(s.incarnation, s.serving) for d, s in self.schedulers.items()}))

    def _do(self, event: Event) -> None:
        events = [event]
        while events:
            for instruction in self.core.handle(events.pop(0), self.now_ms * NS_PER_MS):
                match instruction:
                    case SendAddRequest(dp_group, message):
                        if self.refuse_next:
                            self.refuse_next = False
                            events.append(SendRefused(message.request_id, message.attempt))
                        else:
                            self._add(self.schedulers[dp_group], message)
                    case SendAbort(dp_group, message):
                        scheduler = self.schedulers.get(dp_group)
                        running = scheduler.running.get(message.request_id) if scheduler else None
                        if scheduler and running and running.attempt == message.attempt:
                            del scheduler.running[message.request_id]
                    case _:
                        self._deliver(instruction)

    def _add(self, scheduler: Scheduler, message: AddRequest) -> None:
        known = scheduler.running.get(message.request_id)
        answer = {"request_id": message.request_id, "attempt": message.attempt}
        if known is None and len(scheduler.running) >= 2:
            scheduler.wire.append(RequestRejected(**answer, code="queue_full", message="full"))  # type: ignore[arg-type]
            return
        if known is None or known.attempt < message.attempt:
            outputs = message.output_token_ids
            assert list(outputs) == [truth(message.request_id, n) for n in range(len(outputs))]
            assert len(outputs) < MAX_TOKENS
            scheduler.running[message.request_id] = Running(message.request_id, message.attempt, len(outputs))
        scheduler.wire.append(RequestAccepted(**answer))  # type: ignore[arg-type]

    def _deliver(self, instruction: object) -> None:
        assert isinstance(instruction, DeliverAccepted | DeliverTokens | DeliverFinish | DeliverError)
        request_id = instruction.request_id
        client = self.clients[request_id]
        assert not client.ended and not client.left, f"{request_id} hears after the last word: {instruction}"
        match instruction:
            case DeliverAccepted():
                client.num_accepted += 1
                assert client.num_accepted == 1 and not client.token_ids
            case DeliverTokens():
                assert client.num_accepted == 1
                client.token_ids += instruction.token_ids
                expected = [truth(request_id, n) for n in range(len(client.token_ids))]
                assert client.token_ids == expected
            case DeliverFinish():
                assert len(client.token_ids) == MAX_TOKENS and instruction.reason == "length"
                client.ended = True
            case DeliverError():
                client.ended = True

    @invariant()
    def core_is_consistent(self) -> None:
        self.core.check_invariants()
        unfinished = {r for r, client in self.clients.items() if not client.ended and not client.left}
        assert unfinished == {r for r in self.clients if self.core.job(r) is not None}
        if self.core.num_waiting():
            assert self.core.next_wake_ns() is not None

    def teardown(self) -> None:
        """With a scheduler that works and time that passes, every client gets its last word."""
        self.refuse_next = False
        self.attention_comes_or_goes(0, True) if 0 in self.schedulers else self.start(0)
        for _ in range(100):
            if not self.core.num_jobs():
                return
            self.wait(1_000)
            for dp_group, scheduler in self.schedulers.items():
                self.step(MAX_TOKENS, dp_group)
                while scheduler.wire:
                    self.hear(dp_group, "once")
        raise AssertionError("a client waits for ever")


TestPod = Pod.TestCase
TestPod.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
