"""Factories for tests of the TE-shell's core: small settings, tasks, a driver with toy prefill workers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from bus.control.messages import (
    AddPrefill,
    ExecutorReady,
    Message,
    OffersEnded,
    PrefillCompleted,
    PrefillFailed,
    SamplingParams,
    StepPlan,
    WithdrawOffers,
)
from services.batching.admission import Limits
from services.shell.core import ShellCore
from services.shell.events import Event, FromScheduler, FromWorker, Reply, ToWorker, WorkerConnected
from services.shell.policies import POLICIES
from services.shell.settings import ShellSettings
from tests.harness.toy_offers import ToyPrefillWorker

SCHEDULER = "scheduler-0.1"
VOCAB_SIZE = 1000


def create_shell(**changes: Any) -> ShellCore:
    """Return a core without workers."""
    settings: dict[str, Any] = {
        "incarnation": 1,
        "num_workers": 1,
        "long_workers": 0,
        "long_tokens": 30,
        "policy": POLICIES["cost"],
        "max_num_seqs": 4,
        "max_num_batched_tokens": 16,
        "max_waiting_tasks": 8,
        "enable_prefix_caching": True,
        "enable_chunked_prefill": True,
        "expert_parallel": False,
        "limits": Limits(),
        "step_timeout_ns": 1000,
        "worker_wait_ns": 500,
        "kv_identity": "toy",
    }
    return ShellCore(ShellSettings(**{**settings, **changes}), now_ns=0)


def prefill_ready(index: int = 0, incarnation: int = 1, **changes: Any) -> ExecutorReady:
    """Return a prefill worker's word: 16 blocks of 4 tokens."""
    numbers = {"num_blocks": 16, "block_tokens": 4, "max_model_len": 64, "vocab_size": VOCAB_SIZE}
    return ExecutorReady(index=index, incarnation=incarnation, **{**numbers, **changes})


def create_task(task_id: int = 1, prompt: Iterable[int] = (1, 2, 3), **sampling: Any) -> AddPrefill:
    """Return a greedy task."""
    return AddPrefill(
        task_id=task_id,
        request_id=f"request-{task_id}",
        prompt_token_ids=tuple(prompt),
        sampling=SamplingParams(**{"max_tokens": 4, "temperature": 0.0, **sampling}),
    )


class ShellDriver:
    """Feeds a core, checks its invariants after every event, and plays workers that do only what they are told to."""

    def __init__(self, core: ShellCore, **ready: Any) -> None:
        self.core = core
        self.now_ns = 0
        self.replies: list[Message] = []
        self.told: list[tuple[int, StepPlan | WithdrawOffers]] = []
        self.workers: dict[int, ToyPrefillWorker] = {}
        for index in range(core.settings.num_workers):
            self.connect(index, **ready)

    def connect(self, index: int = 0, incarnation: int = 1, **ready: Any) -> None:
        """Let a prefill worker say that it is ready."""
        self.workers[index] = ToyPrefillWorker(prefill_ready(index, incarnation, **ready))
        self.feed(WorkerConnected(self.workers[index].ready))

    def feed(self, *events: Event) -> None:
        """Hand over the events together."""
        for instruction in self.core.handle(*events, now_ns=self.now_ns):
            match instruction:
                case ToWorker(index, _, message):
                    self.told.append((index, message))
                case Reply(_, message):
                    self.replies.append(message)
        self.core.check_invariants()

    def add(self, *tasks: AddPrefill, scheduler: str = SCHEDULER) -> None:
        """Let a scheduler hand over tasks, all at once."""
        self.feed(*(FromScheduler(scheduler, task) for task in tasks))

    def plan(self, index: int = 0) -> StepPlan:
        """Return the newest plan of a worker."""
        return next(
            message for at, message in reversed(self.told) if at == index and isinstance(message, StepPlan)
        )

    def step(self, index: int = 0) -> None:
        """Let a worker do its newest plan."""
        self.feed(FromWorker(index, self.workers[index].run(self.plan(index))))

    def shares(self, index: int = 0) -> list[int]:
        """Return how many tokens of each prompt the newest plan computes."""
        return [len(sequence.token_ids) for sequence in self.plan(index).sequences]

    def end(self, *serials: int, index: int = 0) -> None:
        """Let a worker say that offers have ended."""
        ended = self.workers[index].withdraw(serials)
        incarnation = self.workers[index].ready.incarnation
        self.feed(FromWorker(index, OffersEnded(incarnation=incarnation, serials=ended)))

    def withdrawn(self) -> list[int]:
        """Return the serials that workers were told to withdraw."""
        told = [message.serials for _, message in self.told if isinstance(message, WithdrawOffers)]
        return [serial for serials in told for serial in serials]

    def completed(self) -> list[PrefillCompleted]:
        """Return what was completed, in order."""
        return [message for message in self.replies if isinstance(message, PrefillCompleted)]

    def failed(self) -> list[tuple[int, str, bool]]:
        """Return (task, code, retryable) of what failed, in order."""
        return [
            (message.task_id, message.code, message.retryable)
            for message in self.replies
            if isinstance(message, PrefillFailed)
        ]
