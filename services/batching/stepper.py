"""One executor and its batch in step: what whoever plans steps has to keep in mind about them.

A step is outstanding at a time, or two: with `looks_ahead`, the plan of the next one follows at once when it can be
made from counts (paper section 7, "async execution"), so that the executor does not wait for it. Numbers of steps grow
by one, and are never those that an earlier incarnation of the planner gave: an executor may still be busy with that
one's plan when it connects, and answer it.
"""

from __future__ import annotations

from bus.control.messages import ExecutorReady, StepCompleted, StepFailed, StepPlan
from services.batching.batch import Batcher, ScheduledRequest
from services.batching.executor import Executor, OutstandingStep
from services.cache.blocks import BlockPool
from services.cache.host_tier import HostTier
from services.cache.tier_cost import TierCost

NUMBERS_PER_INCARNATION = 1 << 20


class Stepper:
    """`executor` has a step or not; `batch` has its blocks exactly while it is connected.

    Args:
        batch: of this executor alone.
        incarnation: of the planner.
        step_timeout_ns: a step that takes longer is overdue.
        looks_ahead: whether `start_ahead` ever starts a step.
    """

    def __init__(
        self,
        batch: Batcher,
        *,
        incarnation: int,
        step_timeout_ns: int,
        now_ns: int,
        looks_ahead: bool = False,
    ) -> None:
        self.executor = Executor(now_ns=now_ns)
        self.num_scheduled_tokens = 0
        self.num_steps_ahead = 0
        self._looks_ahead = looks_ahead
        self._batch = batch
        self._incarnation = incarnation
        self._step_timeout_ns = step_timeout_ns
        self._next_step_id = incarnation * NUMBERS_PER_INCARNATION + 1

    def connect(self, ready: ExecutorReady) -> None:
        """Begin a session with empty blocks; nobody may be connected."""
        self.executor.connect(ready)
        host = HostTier(ready.num_host_blocks) if ready.num_host_blocks > 0 else None
        pool = BlockPool(num_blocks=ready.num_blocks, block_tokens=ready.block_tokens, host=host)
        cost = TierCost(
            block_tokens=ready.block_tokens,
            block_bytes=ready.block_bytes,
            bytes_per_s=ready.host_bytes_per_s,
            step_tokens=self._batch.max_num_batched_tokens,
        )
        self._batch.attach(pool, cost)

    def disconnect(self, *, may_return: bool, now_ns: int) -> list[ScheduledRequest]:
        """End the session: all who ran wait again. Return what the step under way was to compute."""
        step = self.executor.disconnect(may_return=may_return, now_ns=now_ns)
        self._batch.detach()
        return step.scheduled if step is not None else []

    def start_step(self, now_ns: int) -> StepPlan | None:
        """Return the next step's plan, outstanding from now on; None when there is no work or one is outstanding."""
        if not self.is_free:
            return None
        scheduled = self._batch.schedule()
        return self.begin_step(scheduled, now_ns) if scheduled else None

    @property
    def is_free(self) -> bool:
        """Whether a step can begin: somebody is connected, and none is outstanding."""
        return self.executor.connected is not None and self.executor.step is None

    def begin_step(self, scheduled: list[ScheduledRequest], now_ns: int) -> StepPlan:
        """Return the plan of a step that computes what the batch has scheduled, nothing perhaps."""
        plan = self._plan(scheduled)
        self.executor.step = OutstandingStep(
            plan.step_id,
            now_ns + self._step_timeout_ns,
            scheduled,
            moves_tiers=bool(plan.stores or plan.loads),
        )
        return plan

    def start_ahead(self, now_ns: int) -> StepPlan | None:
        """Return the plan of the step after the one under way; None when there is one already, or more to decide."""
        step = self.executor.step
        if not self._looks_ahead or step is None or self.executor.step_ahead is not None:
            return None
        scheduled = self._batch.schedule_ahead(step.scheduled)
        if not scheduled:
            return None
        plan = self._plan(scheduled)
        # The first may take its whole time before this one begins.
        self.executor.step_ahead = OutstandingStep(
            plan.step_id, now_ns + 2 * self._step_timeout_ns, scheduled
        )
        self.num_steps_ahead += 1
        return plan

    def _plan(self, scheduled: list[ScheduledRequest]) -> StepPlan:
        moves = self._batch.take_moves()
        plan = StepPlan(
            step_id=self._next_step_id,
            scheduler_incarnation=self._incarnation,
            sequences=tuple(one.planned() for one in scheduled),
            stores=moves.stores,
            loads=moves.loads,
            copies=moves.copies,
        )
        self._next_step_id += 1
        self.num_scheduled_tokens += sum(one.num_tokens for one in scheduled)
        return plan

    def take_step(self, result: StepCompleted | StepFailed) -> list[ScheduledRequest] | None:
        """Return what `result` answers, None when it answers nothing; retired blocks are then free."""
        step = self.executor.take_step(result)
        if step is None:
            return None
        self._batch.release_retired(step_follows=self.executor.step is not None)
        if isinstance(result, StepCompleted) and self._batch.cost is not None:
            num_tokens = sum(one.num_tokens for one in step.scheduled)
            self._batch.cost.observe(num_tokens, result.duration_us)
        return step.scheduled

    def is_overdue(self, now_ns: int) -> bool:
        """Tell whether the step under way takes too long."""
        step = self.executor.step
        return step is not None and now_ns >= step.deadline_ns
