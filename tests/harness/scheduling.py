"""Factories for tests of the scheduler's core: small settings, requests, an executor that answers at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from bus.control.messages import (
    AddRequest,
    ExecutorReady,
    Message,
    PlannedSequence,
    SampledToken,
    SamplingParams,
    StepCompleted,
    StepPlan,
    TokenLogprob,
    TokensGenerated,
)
from services.batching.admission import Limits
from services.scheduler.core import SchedulerCore
from services.scheduler.events import Event, ExecutorConnected, FromGateway, Instruction, Reply, SendPlan
from services.scheduler.settings import CoreSettings

GATEWAY = "gateway-0.1"
VOCAB_SIZE = 1000


def create_core(**changes: Any) -> SchedulerCore:
    """Return a core without an executor."""
    settings: dict[str, Any] = {
        "incarnation": 1,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 16,
        "max_waiting_requests": 8,
        "limits": Limits(),
        "step_timeout_ns": 1000,
        "executor_wait_ns": 500,
        "enable_prefix_caching": False,
        "kv_identity": "toy",
    }
    return SchedulerCore(CoreSettings(**{**settings, **changes}), now_ns=0)


def create_ready(incarnation: int = 1, **changes: Any) -> ExecutorReady:
    """Return an executor's word: 16 blocks of 4 tokens."""
    numbers = {"num_blocks": 16, "block_tokens": 4, "max_model_len": 64, "vocab_size": VOCAB_SIZE}
    return ExecutorReady(index=0, incarnation=incarnation, **{**numbers, **changes})


def create_request(
    request_id: str = "a",
    prompt: Iterable[int] = (1, 2, 3),
    *,
    attempt: int = 0,
    outputs: Iterable[int] = (),
    **sampling: Any,
) -> AddRequest:
    """Return a greedy request for 4 tokens, unless told otherwise."""
    return AddRequest(
        request_id=request_id,
        attempt=attempt,
        prompt_token_ids=tuple(prompt),
        output_token_ids=tuple(outputs),
        sampling=SamplingParams(**{"max_tokens": 4, "temperature": 0.0, **sampling}),
    )


def add(message: AddRequest, gateway: str = GATEWAY) -> FromGateway:
    """Wrap a request as the event it arrives by."""
    return FromGateway(gateway, message)


class Driver:
    """Feeds a core, checks its invariants after every event and sorts what it says."""

    def __init__(self, core: SchedulerCore, *, num_blocks: int = 16) -> None:
        self.core = core
        self.num_blocks = num_blocks
        self.now_ns = 0
        self.plans: list[StepPlan] = []
        self.replies: list[Message] = []
        self.incarnation = 0

    def feed(self, *events: Event) -> list[Instruction]:
        """Hand over the events together."""
        instructions = self.core.handle(*events, now_ns=self.now_ns)
        self.core.check_invariants()
        self.plans += [i.message for i in instructions if isinstance(i, SendPlan)]
        self.replies += [i.message for i in instructions if isinstance(i, Reply)]
        return instructions

    def connect(self, incarnation: int = 1, **changes: Any) -> list[Instruction]:
        """Let an executor say that it is ready."""
        self.incarnation = incarnation
        ready = create_ready(incarnation, **{"num_blocks": self.num_blocks, **changes})
        return self.feed(ExecutorConnected(ready))

    def complete(self, token: Callable[[PlannedSequence], int] = lambda _: 7) -> list[Instruction]:
        """Answer the newest plan; `token` draws for each sequence that samples."""
        return self.feed(self.answer(self.plans[-1], token))

    def answer(self, plan: StepPlan, token: Callable[[PlannedSequence], int] = lambda _: 7) -> StepCompleted:
        """Return the answer to `plan`."""
        sampled = tuple(
            SampledToken(
                request_id=sequence.request_id,
                token_id=token(sequence) if sequence.sample else -1,
                prompt_logprobs=tuple(
                    TokenLogprob(token_id=token_id, logprob=-float(token_id))
                    for token_id in sequence.next_prompt_token_ids
                ),
            )
            for sequence in plan.sequences
        )
        return StepCompleted(step_id=plan.step_id, incarnation=self.incarnation, sampled=sampled)

    def generated(self, request_id: str = "a") -> list[TokensGenerated]:
        """Return the token messages about one request, in order."""
        return [m for m in self.replies if isinstance(m, TokensGenerated) and m.request_id == request_id]

    def scheduled(self) -> dict[str, int]:
        """Return request id -> number of tokens of the newest plan."""
        return {sequence.request_id: len(sequence.token_ids) for sequence in self.plans[-1].sequences}


def connected(**changes: Any) -> Driver:
    """Return a driver whose executor is ready; `num_blocks` is the executor's, the rest the core's."""
    driver = Driver(create_core(**{k: v for k, v in changes.items() if k != "num_blocks"}))
    driver.num_blocks = changes.get("num_blocks", driver.num_blocks)
    driver.connect()
    return driver
