"""One prompt as the TE-shell sees it, and the worker that it belongs to.

    POOLED      in `ShellCore.pool`, belongs to no worker      WAITING or PREEMPTED
    ASSIGNED    in its worker's batch                          WAITING, PREEMPTED or RUNNING
    OFFERED     in its worker's `offers`, by serial            OFFERED

A task that nobody wants any more while a step computes it stays where it is until the step is over (`is_wanted`).
"""

from __future__ import annotations

from dataclasses import dataclass

from bus.control.messages import AddPrefill, AddRequest, PrefillCompleted, WithdrawOffers
from services.batching.batch import ScheduledRequest
from services.batching.request import Request
from services.batching.stepper import Stepper
from services.shell.batch import PrefillBatcher
from services.shell.policies.cost import prefill_cost
from services.shell.policies.views import PromptView, WorkerView
from services.shell.settings import ShellSettings
from services.shell.shares import OLDEST_SHARE

TaskKey = tuple[str, int]  # scheduler with its incarnation, task id


@dataclass(slots=True, eq=False)
class Task:
    """`request` is what the batch knows of it; its id there differs from the scheduler's, which need not be unique."""

    key: TaskKey
    number: int
    request_id: str
    request: Request
    is_long: bool
    completed: PrefillCompleted | None = None
    is_wanted: bool = True

    @property
    def scheduler(self) -> str:
        """Who asked for it."""
        return self.key[0]

    @property
    def view(self) -> PromptView:
        """What a policy sees of it."""
        return PromptView(self.number, self.request.num_tokens)


def to_request(request_id: str, message: AddPrefill) -> AddRequest:
    """Return the task as a request of its own."""
    return AddRequest(
        request_id=request_id,
        attempt=0,
        prompt_token_ids=message.prompt_token_ids,
        output_token_ids=message.output_token_ids,
        sampling=message.sampling,
    )


class Worker:
    """A prefill worker: its executor, its batch, its tasks by request id, and the offers that stand there by serial.

    `forgotten_serials` are offers of a worker that was lost and lives: they may stand, and are withdrawn when it is
    back.
    """

    def __init__(self, index: int, settings: ShellSettings, *, now_ns: int) -> None:
        self.index = index
        self.takes_long = index >= settings.num_workers - settings.long_workers
        self.batch = PrefillBatcher(
            max_num_seqs=settings.max_num_seqs,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            enable_prefix_caching=settings.enable_prefix_caching,
            enable_chunked_prefill=settings.enable_chunked_prefill,
            kv_identity=settings.kv_identity,
        )
        self.stepper = Stepper(
            self.batch,
            incarnation=settings.incarnation,
            step_timeout_ns=settings.step_timeout_ns,
            now_ns=now_ns,
        )
        self.executor = self.stepper.executor
        self.tasks: dict[str, Task] = {}
        self.offers: dict[int, Task] = {}
        self.forgotten_serials: set[int] = set()
        self._leader_incarnation = settings.incarnation

    def withdrawal(self, serials: set[int]) -> WithdrawOffers:
        """Return what to tell it."""
        return WithdrawOffers(scheduler_incarnation=self._leader_incarnation, serials=tuple(sorted(serials)))

    def step_has(self, request: Request) -> bool:
        """Tell whether the step under way computes it."""
        step = self.executor.step
        return step is not None and any(one.request is request for one in step.scheduled)

    def has_time(self) -> bool:
        """Tell whether it can take part in computing one more prompt soon.

        A prompt counts with what the shares grant it at least, so one long prompt does not close a worker to short
        ones.
        """
        batch = self.batch
        if len(batch.running) + len(batch.waiting) >= batch.max_num_seqs:
            return False
        share = max(1, batch.max_num_batched_tokens // OLDEST_SHARE)
        return sum(min(share, one) for one in self._num_missing()) < batch.max_num_batched_tokens

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no prompt has or is to get."""
        pool = self.batch.pool
        return pool.num_free - self.batch.num_promised_blocks if pool is not None else 0

    def has_room(self, task: Task) -> bool:
        """Tell whether there are blocks for it."""
        pool = self.batch.pool
        assert pool is not None
        return pool.blocks_for(task.request.num_tokens) <= self.num_free_blocks

    def view(self, task: Task) -> WorkerView:
        """Return what a policy sees of it."""
        load = sum(
            prefill_cost(one.num_tokens, one.num_computed_tokens)
            for one in (*self.batch.running, *self.batch.waiting)
        )
        num_cached_tokens = self.batch.num_cached_tokens(task.request)
        return WorkerView(self.index, num_cached_tokens, load, self.num_free_blocks)

    def _num_missing(self) -> list[int]:
        batch = self.batch
        return [one.num_tokens - one.num_computed_tokens for one in (*batch.running, *batch.waiting)]

    def task_of(self, scheduled: ScheduledRequest) -> Task:
        """Return the task that a step computes."""
        return self.tasks[scheduled.request.request_id]

    def check_invariants(self, *, waits_for_others: bool) -> None:
        """Assert that tasks, offers, batch and executor agree; `waits_for_others`: it begins no step alone."""
        self.batch.check_invariants()
        self.executor.check_invariants()
        is_connected = self.executor.connected is not None
        assert (self.batch.pool is not None) == is_connected, "blocks without a worker, or the reverse"
        assert is_connected or not (self.tasks or self.offers), "work without a worker"
        assert not self.batch.num_retiring, "what a step computes is kept until it is over"
        known = {id(task.request) for task in self.tasks.values()}
        assert known == {id(one) for one in (*self.batch.waiting, *self.batch.running)}
        assert {id(task.request) for task in self.offers.values()} == {id(one) for one in self.batch.offered}
        for task in self.offers.values():
            assert task.completed is not None or not task.is_wanted, task
        for request_id, task in self.tasks.items():
            assert request_id == task.request.request_id and task.completed is None, task
            assert task.is_wanted or self.step_has(task.request), "an unwanted prompt is kept"
        step = self.executor.step
        blocked = waits_for_others or not self.tasks or (not self.batch.running and bool(self.offers))
        assert step is not None or blocked or not is_connected, "prompts wait for nothing"
