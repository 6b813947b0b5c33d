"""The TE-shell of the prefill side, as a pure state machine: events in, instructions out (paper sections 6 and 7).

Theory. Schedulers hand tasks over: prompts to be computed, with the token that follows. Tasks wait in one pool that
all prefill workers share, and one is assigned to a worker only when that worker has time and blocks for it, so no
short prompt is bound to a busy worker while another one is idle. Which of them gets it is the policy's choice; only
while tasks wait is anything chosen. Each worker has a batch of its own and one step outstanding at a time.

A task whose prompt is computed is *offered*: its scheduler is told the token and where the KV lies, and the blocks
stay until the worker says that the offer has ended. `Worker` and `Task` state what belongs where.

Long prompts (from `long_tokens` on) go to the last `long_workers` workers and to no other, short ones never go
there. Without such workers all share all, and a step's budget is shared so that neither kind starves (`shares.py`).

The pool is first come, first served, with two exceptions: whoever finds no worker with time is passed, and whoever
finds time but no blocks keeps one worker closed to those behind it, so that blocks gather there.

With expert parallelism the workers share the experts, so all step together, those without work too; nobody steps
while one is away, and a step that failed for one of them is computed again.

A lost worker costs time only: what it was to compute goes back to the pool, in the old order; what it offered is
reported as failed, although whoever fetches at the time may still succeed. A task under which several workers in a
row are lost is failed for good. A lost scheduler's tasks are forgotten. While no worker
that could take a task has been there for `worker_wait_ns`, tasks fail soon after they come: a DP group then computes
its prompts itself.

`check_invariants` asserts: every task is in exactly one place; every worker's batch, offers and blocks agree; long
and short prompts are where they may be; with a worker connected, a step is outstanding, or there is nothing to do
there, or offers hold it back.
"""

from __future__ import annotations

import msgspec

from bus.control.messages import (
    AbortPrefill,
    AddPrefill,
    ExecutorReady,
    KvTicket,
    OffersEnded,
    PrefillCompleted,
    PrefillFailed,
    SampledToken,
    StepCompleted,
    StepFailed,
    StepPlan,
)
from services.batching.admission import Refusal, content_refusal, vocabulary_refusal
from services.batching.answers import complaint
from services.batching.batch import ScheduledRequest
from services.batching.request import Request, RequestStatus
from services.shell.events import (
    Event,
    FromScheduler,
    FromWorker,
    Instruction,
    Reply,
    SchedulerLost,
    Tick,
    ToWorker,
    WorkerConnected,
    WorkerLost,
)
from services.shell.settings import Counters, ShellSettings
from services.shell.tasks import Task, TaskKey, Worker, to_request


class ShellCore:
    """See the module's docstring. `handle` is the only way to change it."""

    def __init__(self, settings: ShellSettings, *, now_ns: int) -> None:
        self.settings = settings
        self.counters = Counters()
        self.tasks: dict[TaskKey, Task] = {}
        self.pool: list[Task] = []  # in order of their numbers
        self.workers = [Worker(index, settings, now_ns=now_ns) for index in range(settings.num_workers)]
        self._limits = settings.limits
        self._next_number = 0
        self._last_task_ids: dict[str, int] = {}  # by scheduler, whose numbers grow
        self._instructions: list[Instruction] = []

    def handle(self, *events: Event, now_ns: int) -> list[Instruction]:
        """Take in what happened, in order, and return what to do, in order.

        Events that arrived together should be handed over together: tasks are assigned and steps planned after the last
        of them. Never raises for what a peer sent.
        """
        for event in events:
            self._handle_one(event, now_ns)
        self._assign()
        self._start_steps(now_ns)
        instructions, self._instructions = self._instructions, []
        return instructions

    @property
    def is_idle(self) -> bool:
        """Whether no task is known and no offer stands."""
        return not self.tasks and not any(worker.tasks or worker.offers for worker in self.workers)

    @property
    def schedulers(self) -> set[str]:
        """Those that handed over tasks, and are not known to be gone."""
        return set(self._last_task_ids)

    def snapshot(self) -> dict[str, int]:
        """Return gauges and counters for the heartbeat."""
        batches = [worker.batch for worker in self.workers]
        pools = [batch.pool for batch in batches if batch.pool is not None]
        return {
            "num_waiting": len(self.pool),
            "num_running": sum(len(worker.tasks) for worker in self.workers),
            "num_offers": sum(len(worker.offers) for worker in self.workers),
            "num_workers": len(pools),
            "num_blocks": sum(pool.num_blocks for pool in pools),
            "num_free_blocks": sum(pool.num_free for pool in pools),
            "prefix_cache_queries": sum(batch.prefix_cache_queries for batch in batches),
            "prefix_cache_hits": sum(batch.prefix_cache_hits for batch in batches),
            **self.counters.as_dict(),
            "num_scheduled_tokens": sum(worker.stepper.num_scheduled_tokens for worker in self.workers),
        }

    def _handle_one(self, event: Event, now_ns: int) -> None:
        match event:
            case FromScheduler(scheduler, AddPrefill() as message):
                self._add(scheduler, message, now_ns)
            case FromScheduler(scheduler, AbortPrefill(task_id=task_id)):
                self._abort((scheduler, task_id))
            case SchedulerLost(scheduler):
                for key in [key for key in self.tasks if key[0] == scheduler]:
                    self._abort(key)
                self._last_task_ids.pop(scheduler, None)
            case WorkerConnected(ready):
                self._connect(ready, now_ns)
            case WorkerLost(index, incarnation, _, dead):
                # A connection that broke is nobody's fault: the plan has not even been sent.
                self._lose(self.workers[index], incarnation, dead=dead, is_suspicious=dead, now_ns=now_ns)
            case FromWorker(index, OffersEnded() as ended):
                self._end_offers(self.workers[index], ended)
            case FromWorker(index, StepCompleted() as result):
                self._complete_step(self.workers[index], result, now_ns)
            case FromWorker(index, StepFailed() as result):
                self._fail_step(self.workers[index], result, now_ns)
            case Tick():
                self._check_deadlines(now_ns)

    # ---------------------------------------------------------------- tasks

    def _add(self, scheduler: str, message: AddPrefill, now_ns: int) -> None:
        key = (scheduler, message.task_id)
        known = self.tasks.get(key)
        if known is not None:
            if known.completed is not None:
                self._instructions.append(Reply(scheduler, known.completed))
            return
        if message.task_id <= self._last_task_ids.get(scheduler, 0):
            return  # a repetition; the task is over
        self._last_task_ids[scheduler] = message.task_id
        self._next_number += 1
        request = to_request(f"prefill-{self._next_number}", message)
        num_tokens = len(message.prompt_token_ids) + len(message.output_token_ids)
        refused = content_refusal(request, self._limits) or self._refusal(num_tokens)
        if refused is not None:
            self._reply_failure(key, refused.code, refused.message, retryable=refused.code == "queue_full")
            return
        self.counters.num_accepted_tasks += 1
        task = Task(
            key=key,
            number=self._next_number,
            request_id=message.request_id,
            request=Request.from_message(scheduler, request, now_ns=now_ns),
            is_long=num_tokens >= self.settings.long_tokens,
        )
        self.tasks[key] = task
        self.pool.append(task)

    def _refusal(self, num_tokens: int) -> Refusal | None:
        num_waiting, most = len(self.pool), self.settings.max_waiting_tasks
        if num_waiting >= most:
            return Refusal("queue_full", f"{num_waiting} prompts wait; prefill.max_waiting_tasks is {most}")
        return self._length_refusal(num_tokens)

    def _length_refusal(self, num_tokens: int) -> Refusal | None:
        limits = self._limits
        for most, what in (
            (limits.max_model_len, "max_model_len"),
            (limits.cache_tokens, "a prefill worker's KV cache"),
        ):
            if 0 < most < num_tokens:
                return Refusal(
                    "too_long", f"a prompt of {num_tokens} tokens must not exceed {what} of {most}"
                )
        return None

    def _abort(self, key: TaskKey) -> None:
        """Nobody wants it any more, whatever has become of it."""
        task = self.tasks.pop(key, None)
        if task is None:
            return
        self.counters.num_aborted_tasks += 1
        task.is_wanted = False
        if task in self.pool:
            self.pool.remove(task)
            task.request.move_to(RequestStatus.FINISHED_ABORT)
            return
        for worker in self.workers:
            serials = {serial for serial, offered in worker.offers.items() if offered is task}
            if serials:
                self._withdraw(worker, serials)
            elif task.request.request_id in worker.tasks and not worker.step_has(task.request):
                self._take_out(worker, task, RequestStatus.FINISHED_ABORT)

    def _take_out(self, worker: Worker, task: Task, status: RequestStatus) -> None:
        """End a task that is assigned; the step under way does not compute it."""
        del worker.tasks[task.request.request_id]
        worker.batch.remove(task.request, status, step_under_way=False)

    def _fail(self, task: Task, code: str, text: str, *, retryable: bool) -> None:
        """Tell its scheduler that the task has come to nothing, and forget it; it is in no place any more."""
        if task.is_wanted:
            del self.tasks[task.key]
            self._reply_failure(task.key, code, text, retryable=retryable)

    def _reply_failure(self, key: TaskKey, code: str, text: str, *, retryable: bool) -> None:
        self.counters.num_failed_tasks += 1
        scheduler, task_id = key
        self._instructions.append(
            Reply(scheduler, PrefillFailed(task_id=task_id, code=code, message=text, retryable=retryable))
        )

    # ---------------------------------------------------------------- workers

    def _connect(self, ready: ExecutorReady, now_ns: int) -> None:
        is_usable = min(ready.num_blocks, ready.block_tokens, ready.max_model_len, ready.vocab_size) >= 1
        if not is_usable or not 0 <= ready.index < len(self.workers):
            self.counters.num_ignored_results += 1
            return
        worker = self.workers[ready.index]
        if not worker.executor.is_news(ready):
            return
        if worker.executor.connected is not None:
            self._lose(
                worker, worker.executor.connected.incarnation, dead=True, is_suspicious=True, now_ns=now_ns
            )
        was = worker.executor.stalled
        serials, worker.forgotten_serials = worker.forgotten_serials, set()
        worker.stepper.connect(ready)
        if serials and was is not None and was.incarnation == ready.incarnation:
            # Before any plan: their blocks are free as this side sees it.
            self._withdraw(worker, serials)
        self._limits = self.settings.limits.narrowed_by(ready)
        for task in list(self.pool):
            self._check_limits(task)

    def _check_limits(self, task: Task) -> None:
        """Fail a task that was accepted before the limits were known and does not keep them."""
        refused = self._length_refusal(task.request.num_tokens) or vocabulary_refusal(
            task.request.token_ids, self._limits
        )
        if refused is not None:
            self.pool.remove(task)
            task.request.move_to(RequestStatus.FINISHED_ERROR)
            self._fail(task, refused.code, refused.message, retryable=False)

    def _lose(
        self, worker: Worker, incarnation: int, *, dead: bool, is_suspicious: bool, now_ns: int
    ) -> None:
        """The worker is gone; `is_suspicious` = what it computed may be why."""
        if dead:
            worker.executor.bury(incarnation)
        connected = worker.executor.connected
        if connected is None or connected.incarnation > incarnation:
            return
        self.counters.num_workers_lost += 1
        worker.forgotten_serials = set() if dead else set(worker.offers)
        self._lose_offers(worker)
        scheduled = worker.stepper.disconnect(may_return=not dead, now_ns=now_ns)
        for one in scheduled if is_suspicious else ():
            one.request.num_losses += 1
        self._take_back(worker)

    def _lose_offers(self, worker: Worker) -> None:
        offers, worker.offers = worker.offers, {}
        for task in offers.values():
            worker.batch.end_offer(task.request)
            self._fail(task, "worker_lost", f"prefill worker {worker.index} was lost", retryable=True)

    def _take_back(self, worker: Worker) -> None:
        """What was assigned waits in the pool again."""
        for request in worker.batch.take_waiting():
            task = worker.tasks.pop(request.request_id)
            if not task.is_wanted:
                request.move_to(RequestStatus.FINISHED_ABORT)
            elif request.num_losses >= self.settings.max_num_losses:
                request.move_to(RequestStatus.FINISHED_ERROR)
                text = (
                    f"{request.num_losses} prefill workers in a row were lost while they computed this prompt"
                )
                self._fail(task, "executor_lost", text, retryable=False)
            else:
                self.pool.append(task)
        self.pool.sort(key=lambda task: task.number)

    def _check_deadlines(self, now_ns: int) -> None:
        for worker in self.workers:
            connected = worker.executor.connected
            if connected is not None and worker.stepper.is_overdue(now_ns):
                self._lose(worker, connected.incarnation, dead=False, is_suspicious=True, now_ns=now_ns)
        if self.settings.expert_parallel:
            self._check_group(now_ns)
            return
        for task in list(self.pool):
            workers = self._allowed(task)
            if any(worker.executor.connected is not None for worker in workers):
                continue
            absent_ns = now_ns - max(worker.executor.absent_since_ns for worker in workers)
            if absent_ns >= self.settings.worker_wait_ns:
                kind = "prefill worker for long prompts" if workers[0].takes_long else "prefill worker"
                self._fail_pooled(task, f"no {kind} for {absent_ns // 1_000_000} ms")

    def _fail_pooled(self, task: Task, text: str) -> None:
        self.pool.remove(task)
        task.request.move_to(RequestStatus.FINISHED_ERROR)
        self._fail(task, "worker_absent", text, retryable=True)

    def _check_group(self, now_ns: int) -> None:
        """Fail everything when a worker is away for too long without whom nobody can step."""
        missing = [worker for worker in self.workers if worker.executor.connected is None]
        absent_since_ns = min((worker.executor.absent_since_ns for worker in missing), default=now_ns)
        if now_ns - absent_since_ns < self.settings.worker_wait_ns:
            return
        away = ", ".join(f"prefill-{worker.index}" for worker in missing)
        text = f"{away} is away, without whom nobody computes prompts"
        for worker in self.workers:
            for task in [task for task in worker.tasks.values() if not worker.step_has(task.request)]:
                self._take_out(worker, task, RequestStatus.FINISHED_ERROR)
                self._fail(task, "worker_absent", text, retryable=True)
        for task in list(self.pool):
            self._fail_pooled(task, text)

    # ---------------------------------------------------------------- assignment

    def _allowed(self, task: Task) -> list[Worker]:
        """Return the workers that take prompts of this length."""
        if not self.settings.long_workers:
            return self.workers
        return [worker for worker in self.workers if worker.takes_long == task.is_long]

    def _assign(self) -> None:
        open_workers = {
            worker.index
            for worker in self.workers
            if self.pool and worker.executor.connected is not None and worker.has_time()
        }
        waiting: list[Task] = []
        for position, task in enumerate(self.pool):
            if not open_workers:
                waiting += self.pool[position:]
                break
            free = [worker for worker in self._allowed(task) if worker.index in open_workers]
            fitting = [worker for worker in free if worker.has_room(task)]
            if not fitting:
                waiting.append(task)
                if free:  # blocks shall gather there
                    open_workers.discard(max(free, key=lambda worker: worker.num_free_blocks).index)
                continue
            views = [worker.view(task) for worker in fitting]
            worker = self.workers[self.settings.policy(task.view, views)]
            worker.tasks[task.request.request_id] = task
            worker.batch.enqueue(task.request)
            if not worker.has_time():
                open_workers.discard(worker.index)
        self.pool = waiting

    # ---------------------------------------------------------------- steps

    def _start_steps(self, now_ns: int) -> None:
        if self.settings.expert_parallel:
            self._start_common_step(now_ns)
            return
        for worker in self.workers:
            self._send_plan(worker, worker.stepper.start_step(now_ns))

    def _start_common_step(self, now_ns: int) -> None:
        """Let all workers step together, those without work too: they have experts that the others need."""
        if not all(worker.stepper.is_free for worker in self.workers):
            return
        work = [worker.batch.schedule() for worker in self.workers]
        if any(work):
            for worker, scheduled in zip(self.workers, work, strict=True):
                self._send_plan(worker, worker.stepper.begin_step(scheduled, now_ns))

    def _send_plan(self, worker: Worker, plan: StepPlan | None) -> None:
        if plan is not None and worker.executor.connected is not None:
            self._instructions.append(ToWorker(worker.index, worker.executor.connected.incarnation, plan))

    def _take_step(
        self, worker: Worker, result: StepCompleted | StepFailed, now_ns: int
    ) -> list[ScheduledRequest]:
        if worker.executor.is_back(result) and worker.executor.stalled is not None:
            self._connect(worker.executor.stalled, now_ns)
        scheduled = worker.stepper.take_step(result)
        if scheduled is None:
            self.counters.num_ignored_results += 1
        return scheduled or []

    def _complete_step(self, worker: Worker, result: StepCompleted, now_ns: int) -> None:
        scheduled = self._take_step(worker, result, now_ns)
        self.counters.num_steps += bool(scheduled)
        sampled_by_id = {sampled.request_id: sampled for sampled in result.sampled}
        for one in scheduled:
            self._advance(worker, one, sampled_by_id.pop(one.request.request_id, None))
        connected = worker.executor.connected
        if connected is not None and connected.incarnation == result.incarnation:
            # What was offered for a step that was given up: nobody knows these offers, and the blocks are free.
            self._withdraw(worker, {one.ticket.serial for one in sampled_by_id.values() if one.ticket})

    def _advance(self, worker: Worker, scheduled: ScheduledRequest, sampled: SampledToken | None) -> None:
        task, request = worker.task_of(scheduled), scheduled.request
        fault = complaint(scheduled, sampled, self._limits.vocab_size)
        if fault is None and sampled is not None:
            fault = self._ticket_complaint(worker, scheduled, sampled)
        if sampled is None or fault is not None or sampled.error:
            if sampled is not None and sampled.ticket is not None:
                self._withdraw(worker, {sampled.ticket.serial} - worker.offers.keys())
            self._take_out(worker, task, RequestStatus.FINISHED_ERROR)
            if fault is not None:
                self._fail(task, "executor_protocol", fault, retryable=True)
            elif sampled is not None:
                self._fail(task, "no_token_left", sampled.error, retryable=False)
            return
        request.num_losses = 0
        request.prompt_logprobs += sampled.prompt_logprobs
        request.num_computed_tokens += scheduled.num_tokens
        if sampled.ticket is not None:
            self._offer(worker, task, sampled, sampled.ticket)
            return
        worker.batch.publish(request)
        if not task.is_wanted:
            self._take_out(worker, task, RequestStatus.FINISHED_ABORT)

    def _ticket_complaint(
        self, worker: Worker, scheduled: ScheduledRequest, sampled: SampledToken
    ) -> str | None:
        """Return what is wrong with the answer's ticket, None when it is there exactly if it should be, and right."""
        ticket, connected, request = sampled.ticket, worker.executor.connected, scheduled.request
        if sampled.error:
            return None
        if (ticket is not None) != scheduled.offer_kv:
            return f"the executor {'did not offer' if ticket is None else 'offered'} the KV of its prompt"
        if ticket is None or connected is None:
            return None
        told = (ticket.index, ticket.incarnation, ticket.num_tokens, ticket.block_ids)
        due = (worker.index, connected.incarnation, request.num_tokens, tuple(request.block_ids))
        if told != due or ticket.serial in worker.offers:
            return f"the executor's ticket {ticket.serial} is not for what it was to compute"
        return None

    def _offer(self, worker: Worker, task: Task, sampled: SampledToken, ticket: KvTicket) -> None:
        request = task.request
        worker.batch.offer(request)
        del worker.tasks[request.request_id]
        worker.offers[ticket.serial] = task
        if not task.is_wanted:
            self._withdraw(worker, {ticket.serial})
            return
        self.counters.num_completed_tasks += 1
        task.completed = PrefillCompleted(
            task_id=task.key[1],
            sampled=msgspec.structs.replace(
                sampled,
                request_id=task.request_id,
                prompt_logprobs=request.take_prompt_logprobs(),
                ticket=None,
            ),
            ticket=ticket,
            num_cached_tokens=max(0, request.num_cached_tokens),
        )
        self._instructions.append(Reply(task.scheduler, task.completed))

    def _fail_step(self, worker: Worker, result: StepFailed, now_ns: int) -> None:
        for one in self._take_step(worker, result, now_ns):
            task = worker.task_of(one)
            if self.settings.expert_parallel and task.is_wanted:  # another worker was lost, most likely
                self._back_to_pool(worker, task)
                continue
            self._take_out(worker, task, RequestStatus.FINISHED_ERROR)
            self._fail(task, result.code, result.message, retryable=True)

    def _back_to_pool(self, worker: Worker, task: Task) -> None:
        worker.batch.give_back(task.request)
        del worker.tasks[task.request.request_id]
        self.pool.append(task)
        self.pool.sort(key=lambda one: one.number)

    # ---------------------------------------------------------------- offers

    def _withdraw(self, worker: Worker, serials: set[int]) -> None:
        connected = worker.executor.connected
        if serials and connected is not None:
            self.counters.num_withdrawn_offers += len(serials)
            message = worker.withdrawal(serials)
            self._instructions.append(ToWorker(worker.index, connected.incarnation, message))

    def _end_offers(self, worker: Worker, ended: OffersEnded) -> None:
        connected, stalled = worker.executor.connected, worker.executor.stalled
        if stalled is not None and stalled.incarnation == ended.incarnation:
            worker.forgotten_serials -= set(ended.serials)
        if connected is None or connected.incarnation != ended.incarnation:
            return
        for serial in ended.serials:
            task = worker.offers.pop(serial, None)
            if task is not None:
                self.counters.num_ended_offers += 1
                worker.batch.end_offer(task.request)
                if task.is_wanted:
                    del self.tasks[task.key]

    # ---------------------------------------------------------------- checks

    def check_invariants(self) -> None:
        """Assert everything that the module's docstring promises. O(tokens in use)."""
        assert [task.number for task in self.pool] == sorted(task.number for task in self.pool)
        places = [*self.pool]
        for task in self.pool:
            assert task.is_wanted and task.completed is None, task
            assert task.request.status in (RequestStatus.WAITING, RequestStatus.PREEMPTED), task
        for worker in self.workers:
            worker.check_invariants(waits_for_others=self.settings.expert_parallel)
            here = [*worker.tasks.values(), *worker.offers.values()]
            places += here
            for task in here:
                assert worker in self._allowed(task), f"worker {worker.index} has {task}"
        assert len({id(task) for task in places}) == len(places), "a task is in two places"
        if self.settings.expert_parallel:
            is_blocked = not all(worker.stepper.is_free for worker in self.workers)
            is_idle = not any(worker.tasks for worker in self.workers)
            is_held = not any(worker.batch.running for worker in self.workers) and any(
                worker.offers for worker in self.workers
            )
            assert is_blocked or is_idle or is_held, "prompts wait for nothing"
        wanted = {task.key: task for task in places if task.is_wanted}
        assert wanted == self.tasks, "a task is lost or left over"
