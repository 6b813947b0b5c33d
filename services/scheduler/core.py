"""The scheduler of one DP group (the paper's DP master), as a pure state machine: events in,
instructions out.

Theory. `services/batching/batch.py` says what a step computes; this file says when, for whom, and what
becomes of the result. One step is outstanding at a time, or two when the second could be planned from counts.
Whenever none is and somebody can be served, the next plan goes out in the same call that made it possible, so
there is no state in which work waits for a nudge. A step's tokens go straight to the gateway that holds the
client. No clock, socket or randomness in here: `now_ns` comes in with each call.

States of a request and of the executor: see `services/batching`. Losing the executor costs
time only: every running request is preempted and computed again from prompt and output by the next
incarnation; results of an older incarnation or of a forgotten step are ignored. While there is none, requests
queue, each for a bounded time. A request under which several executors in a row are lost, without one step of
it done, is failed: it may be what kills them.

Where there is a prefill leader, whoever lacks many tokens is handed to it: see `services/batching/remote.py`.
Losing it, its workers or a transfer costs time only, too.

Requests are keyed by id. The same (gateway, id, attempt) again is accepted again and changes nothing; a later
attempt, or another gateway's, replaces the older one silently; an earlier one is ignored.

`check_invariants` asserts: every request is in exactly the collection that its state says; blocks are referred
to as often as requests hold them, and what is cached keeps its laws; a step outstanding belongs to the
connected executor; no request that is over is still known; and, with an executor connected, either nobody is
left or a step is outstanding.
"""

from __future__ import annotations

from bus.control.messages import (
    AbortPrefill,
    AbortRequest,
    AddPrefill,
    AddRequest,
    CancelFetch,
    ExecutorReady,
    FetchKv,
    KvFetched,
    PrefillCompleted,
    PrefillFailed,
    SampledToken,
    StepCompleted,
    StepFailed,
)
from services.batching.admission import Refusal, length_refusal, refusal, vocabulary_refusal
from services.batching.answers import complaint
from services.batching.batch import Batcher, ScheduledRequest
from services.batching.remote import FAILURES_MAX, RemotePrefill
from services.batching.request import AWAY, FINISHED, Request, RequestStatus
from services.batching.stepper import NUMBERS_PER_INCARNATION, Stepper
from services.scheduler import replies
from services.scheduler.events import (
    Event,
    ExecutorConnected,
    ExecutorLost,
    FromGateway,
    GatewayLost,
    Instruction,
    LeaderFound,
    LeaderLost,
    SendPlan,
    SendToLeader,
    SendTransfer,
    Tick,
)
from services.scheduler.settings import CoreSettings, Counters


class SchedulerCore:
    """See the module's docstring. `handle` is the only way to change it."""

    def __init__(self, settings: CoreSettings, *, now_ns: int) -> None:
        self.settings = settings
        self.counters = Counters()
        self.requests: dict[str, Request] = {}
        self.batch = Batcher(
            max_num_seqs=settings.max_num_seqs,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            enable_prefix_caching=settings.enable_prefix_caching,
            kv_identity=settings.kv_identity,
        )
        self.remote = RemotePrefill(
            self.batch,
            tokens_min=settings.prefill_tokens_min,
            first_task_id=settings.incarnation * NUMBERS_PER_INCARNATION + 1,
        )
        self._stepper = Stepper(
            self.batch,
            incarnation=settings.incarnation,
            step_timeout_ns=settings.step_timeout_ns,
            now_ns=now_ns,
            looks_ahead=settings.async_scheduling,
        )
        self.executor = self._stepper.executor
        self._limits = settings.limits
        self._instructions: list[Instruction] = []

    def handle(self, *events: Event, now_ns: int) -> list[Instruction]:
        """Take in what happened, in order, and return what to do, in order.

        Events that arrived together should be handed over together: the next step is planned after the last
        of them, so they share it. Never raises for what a peer sent.
        """
        for event in events:
            self._handle_one(event, now_ns)
        self._hand_over()
        self._start_fetches()
        self._start_step(now_ns)
        instructions, self._instructions = self._instructions, []
        return instructions

    @property
    def is_idle(self) -> bool:
        """Whether no request is known."""
        return not self.requests

    def snapshot(self) -> dict[str, int]:
        """Return gauges and counters for the heartbeat."""
        pool = self.batch.pool
        return {
            "num_running": len(self.batch.running),
            "num_waiting": len(self.batch.waiting) + self.remote.num_waiting,
            "num_prefilling": len(self.remote.prefilling),
            "num_transferring": len(self.remote.transferring),
            "num_blocks": pool.num_blocks if pool else 0,
            "num_free_blocks": pool.num_free if pool else 0,
            "num_cached_blocks": pool.num_cached if pool else 0,
            "prefix_cache_queries": self.batch.prefix_cache_queries,
            "prefix_cache_hits": self.batch.prefix_cache_hits,
            "external_prefix_cache_queries": self.batch.host_cache_queries,
            "external_prefix_cache_hits": self.batch.host_cache_hits,
            "num_copied_tokens": self.batch.num_copied_tokens,
            "num_host_blocks": pool.host.num_used if pool and pool.host else 0,
            "num_preemptions": self.batch.num_preemptions,
            "num_scheduled_tokens": self._stepper.num_scheduled_tokens,
            "num_steps_ahead": self._stepper.num_steps_ahead,
            **self.counters.as_dict(),
        }

    def _handle_one(self, event: Event, now_ns: int) -> None:
        match event:
            case FromGateway(gateway, AddRequest() as message):
                self._add(gateway, message, now_ns)
            case FromGateway(gateway, AbortRequest() as message):
                self._abort(gateway, message)
            case GatewayLost(gateway):
                for request in [r for r in self.requests.values() if r.gateway == gateway]:
                    self._drop(request)
            case ExecutorConnected(ready):
                self._connect(ready, now_ns)
            case ExecutorLost(incarnation, _, dead):
                # A connection that broke is nobody's fault: the plan has not even been sent.
                self._lose(incarnation, dead=dead, is_suspicious=dead, now_ns=now_ns)
            case StepCompleted():
                self._complete_step(event, now_ns)
            case StepFailed():
                self._fail_step(event, now_ns)
            case LeaderFound():
                self.remote.leader_found()
            case LeaderLost():
                for request in self.remote.leader_lost():
                    self.counters.num_prefills_failed += 1
                    request.num_prefill_failures += 1
            case PrefillCompleted():
                self._take_offer(event)
            case PrefillFailed():
                self._fail_prefill(event)
            case KvFetched():
                self._end_fetch(event)
            case Tick():
                self._check_deadlines(now_ns)

    # ---------------------------------------------------------------- requests

    def _add(self, gateway: str, message: AddRequest, now_ns: int) -> None:
        known = self.requests.get(message.request_id)
        if known is not None and known.gateway == gateway:
            if message.attempt < known.attempt:
                return
            if message.attempt == known.attempt:
                self._instructions.append(replies.accepted(known))
                return
        if known is not None:
            self._drop(known)
        refused = refusal(message, self._limits)
        if refused is None:
            request = Request.from_message(gateway, message, now_ns=now_ns)
            refused = self._admit(request)
        if refused is not None:
            self.counters.num_rejected_requests += 1
            self._instructions.append(replies.rejected(gateway, message, refused))

    def _admit(self, request: Request) -> Refusal | None:
        """Queue the request, or finish it when nothing is left to do; return why neither was possible."""
        finish = request.finish()
        num_waiting = len(self.batch.waiting) + self.remote.num_waiting
        most = self.settings.max_waiting_requests
        if finish is None and num_waiting >= most:
            return Refusal("queue_full", f"{num_waiting} requests wait; max_waiting_requests is {most}")
        self.counters.num_accepted_requests += 1
        self._instructions.append(replies.accepted(request))
        if finish is not None:
            self.counters.num_finished_requests += 1
            self._instructions.append(replies.generated(request, (), finish))
            return None
        self.requests[request.request_id] = request
        self.batch.enqueue(request)
        return None

    def _abort(self, gateway: str, message: AbortRequest) -> None:
        request = self.requests.get(message.request_id)
        if request is not None and request.gateway == gateway and message.attempt >= request.attempt:
            self._drop(request)

    def _drop(self, request: Request) -> None:
        """End a request that nobody listens to any more."""
        self._remove(request, RequestStatus.FINISHED_ABORT)
        self.counters.num_aborted_requests += 1

    def _fail(self, request: Request, code: str, text: str, *, retryable: bool) -> None:
        self._remove(request, RequestStatus.FINISHED_ERROR)
        self.counters.num_failed_requests += 1
        self._instructions.append(replies.failed(request, code, text, retryable=retryable))

    def _remove(self, request: Request, status: RequestStatus) -> None:
        del self.requests[request.request_id]
        if request.status in AWAY:
            self._cancel(request)
            self.remote.remove(request, status)
        else:
            self.batch.remove(request, status, step_under_way=self.executor.step is not None)

    # ---------------------------------------------------------------- executor

    def _connect(self, ready: ExecutorReady, now_ns: int) -> None:
        if min(ready.num_blocks, ready.block_tokens, ready.max_model_len, ready.vocab_size) < 1:
            self.counters.num_ignored_results += 1
            return
        if not self.executor.is_news(ready):
            return
        if self.executor.connected is not None:
            self._lose(self.executor.connected.incarnation, dead=True, is_suspicious=True, now_ns=now_ns)
        self._stepper.connect(ready)
        for fetch_id in self.remote.stale:
            self._cancel_fetch(fetch_id)  # unknown to a new incarnation, which does not mind
        self.remote.stale = []
        self._limits = self.settings.limits.narrowed_by(ready)
        for request in list(self.requests.values()):
            self._check_limits(request)

    def _check_limits(self, request: Request) -> None:
        """Fail a request that was accepted before the limits were known and does not keep them."""
        refused = length_refusal(
            request.num_prompt_tokens, request.sampling.max_tokens, self._limits
        ) or vocabulary_refusal(request.token_ids, self._limits)
        if refused is not None:
            self._fail(request, refused.code, refused.message, retryable=False)

    def _lose(self, incarnation: int, *, dead: bool, is_suspicious: bool, now_ns: int) -> None:
        """The executor is gone; `is_suspicious` = what it computed may be why."""
        if dead:
            self.executor.bury(incarnation)
        connected = self.executor.connected
        if connected is None or connected.incarnation > incarnation:
            return
        self.counters.num_executors_lost += 1
        for task_id in self.remote.transferring:
            self._abort_prefill(task_id)
        self.remote.executor_lost()
        step = self._stepper.disconnect(may_return=not dead, now_ns=now_ns)
        for scheduled in step if is_suspicious else ():
            self._count_loss(scheduled.request)

    def _count_loss(self, request: Request) -> None:
        request.num_losses += 1
        if request.num_losses >= self.settings.max_num_losses and request.status not in FINISHED:
            text = (
                f"{request.num_losses} attention workers in a row were lost while they computed this request"
            )
            self._fail(request, "executor_lost", text, retryable=False)

    def _check_deadlines(self, now_ns: int) -> None:
        connected = self.executor.connected
        if connected is not None:
            if self._stepper.is_overdue(now_ns):
                self._lose(connected.incarnation, dead=False, is_suspicious=True, now_ns=now_ns)
            return
        for request in list(self.requests.values()):
            waited_ns = now_ns - max(self.executor.absent_since_ns, request.arrived_at_ns)
            if waited_ns >= self.settings.executor_wait_ns:
                text = f"no attention worker for {waited_ns // 1_000_000} ms"
                self._fail(request, "executor_absent", text, retryable=True)

    # ---------------------------------------------------------------- prefill elsewhere

    def _hand_over(self) -> None:
        for request in self.remote.hand_over():
            self.counters.num_prefills_handed_over += 1
            num_prompt_tokens = request.num_prompt_tokens
            message = AddPrefill(
                task_id=request.task_id,
                request_id=request.request_id,
                prompt_token_ids=tuple(request.token_ids[:num_prompt_tokens]),
                output_token_ids=tuple(request.token_ids[num_prompt_tokens:]),
                sampling=request.sampling,
            )
            self._instructions.append(SendToLeader(message))

    def _abort_prefill(self, task_id: int) -> None:
        if self.remote.has_leader:
            self._instructions.append(SendToLeader(AbortPrefill(task_id=task_id)))

    def _cancel(self, request: Request) -> None:
        """Nobody needs its prefill any more, computed or not, fetched half or not at all."""
        self._abort_prefill(request.task_id)
        if request.status is RequestStatus.TRANSFERRING:
            self._cancel_fetch(request.task_id)

    def _cancel_fetch(self, fetch_id: int) -> None:
        connected = self.executor.connected
        assert connected is not None, "a transfer to nobody"
        cancel = CancelFetch(fetch_id=fetch_id, scheduler_incarnation=self.settings.incarnation)
        self._instructions.append(SendTransfer(connected.incarnation, cancel))

    def _take_offer(self, result: PrefillCompleted) -> None:
        """The first token goes out at once; the KV follows when there are blocks for it."""
        request = self.remote.prefilling.get(result.task_id)
        if request is None:
            self.counters.num_ignored_results += 1
            return
        sampled, num_tokens = result.sampled, request.num_tokens
        fault = complaint(
            ScheduledRequest(request, num_tokens, sample=request.samples), sampled, self._limits.vocab_size
        )
        if fault is not None or result.ticket.num_tokens != num_tokens:
            self._retry_prefill(request, times=FAILURES_MAX)
            return
        if sampled.error:
            self._fail(request, "no_token_left", sampled.error, retryable=False)
            return
        request.prompt_logprobs += sampled.prompt_logprobs
        self.batch.count_lookup(request, result.num_cached_tokens)
        self.remote.offered(request, result.ticket)
        self._emit(request, sampled)

    def _fail_prefill(self, result: PrefillFailed) -> None:
        away = (*self.remote.prefilling.values(), *self.remote.prefilled, *self.remote.transferring.values())
        for request in away:
            # A transfer goes on: what it reads may stand after all, and if not it will say so.
            if request.task_id == result.task_id and request.status is not RequestStatus.TRANSFERRING:
                self._retry_prefill(request, times=1 if result.retryable else FAILURES_MAX)
                return

    def _retry_prefill(self, request: Request, *, times: int) -> None:
        """Its prefill has come to nothing: again, or here if that has happened too often."""
        self.counters.num_prefills_failed += 1
        request.num_prefill_failures += times
        self._abort_prefill(request.task_id)
        self.remote.give_back(request)

    def _start_fetches(self) -> None:
        connected = self.executor.connected
        for request, first_block, block_ids in self.remote.start_fetches():
            self.counters.num_kv_fetches += 1
            ticket = request.ticket
            assert connected is not None and ticket is not None
            if not block_ids:  # all of it was cached here
                self._abort_prefill(request.task_id)
                self.remote.arrived(request)
                continue
            message = FetchKv(
                fetch_id=request.task_id,
                scheduler_incarnation=self.settings.incarnation,
                ticket=ticket,
                first_block=first_block,
                block_ids=tuple(block_ids),
            )
            self._instructions.append(SendTransfer(connected.incarnation, message))

    def _end_fetch(self, result: KvFetched) -> None:
        connected = self.executor.connected
        if connected is None or result.incarnation != connected.incarnation:
            self.counters.num_ignored_results += 1
            return
        request = self.remote.transferring.get(result.fetch_id)
        if request is None:
            return
        if not result.error:
            self.remote.arrived(request)
            return
        self.counters.num_kv_fetches_failed += 1
        self._retry_prefill(request, times=1)

    # ---------------------------------------------------------------- steps

    def _start_step(self, now_ns: int) -> None:
        for start in (self._stepper.start_step, self._stepper.start_ahead):
            plan = start(now_ns)
            if plan is not None and self.executor.connected is not None:
                self._instructions.append(SendPlan(self.executor.connected.incarnation, plan))

    def _take_step(self, result: StepCompleted | StepFailed, now_ns: int) -> list[ScheduledRequest]:
        """Return what `result` answers that still runs; then the step is over and its retired blocks free."""
        if self.executor.is_back(result) and self.executor.stalled is not None:
            self._connect(self.executor.stalled, now_ns)
        scheduled = self._stepper.take_step(result)
        if scheduled is None:
            self.counters.num_ignored_results += 1
            return []
        return [one for one in scheduled if one.request.status is RequestStatus.RUNNING]

    def _complete_step(self, result: StepCompleted, now_ns: int) -> None:
        sampled_by_id = {sampled.request_id: sampled for sampled in result.sampled}
        scheduled = self._take_step(result, now_ns)
        for one in scheduled:
            self._advance(one, sampled_by_id.get(one.request.request_id))
        self.counters.num_steps += bool(scheduled)

    def _advance(self, scheduled: ScheduledRequest, sampled: SampledToken | None) -> None:
        request = scheduled.request
        fault = complaint(scheduled, sampled, self._limits.vocab_size)
        if sampled is None or fault is not None:
            self._fail(request, "executor_protocol", fault or "", retryable=True)
            return
        if sampled.error:
            self._fail(request, "no_token_left", sampled.error, retryable=False)
            return
        request.num_losses = 0
        request.prompt_logprobs += sampled.prompt_logprobs
        request.num_computed_tokens += scheduled.num_tokens
        self.batch.publish(request)
        if request.num_computed_tokens == request.num_tokens:
            self._emit(request, sampled)

    def _emit(self, request: Request, sampled: SampledToken) -> None:
        """The request has caught up: hand out the token drawn, if it draws any, and the last word if due."""
        token_ids = (sampled.token_id,) if request.samples else ()
        request.token_ids += token_ids
        self.counters.num_generated_tokens += len(token_ids)
        prompt_logprobs = request.take_prompt_logprobs()
        finish = request.finish()
        self._instructions.append(
            replies.generated(
                request, token_ids, finish, logprob=sampled.logprob, prompt_logprobs=prompt_logprobs
            )
        )
        if finish is not None:
            stopped = finish.reason == "stop"
            self._remove(request, RequestStatus.FINISHED_STOP if stopped else RequestStatus.FINISHED_LENGTH)
            self.counters.num_finished_requests += 1

    def _fail_step(self, result: StepFailed, now_ns: int) -> None:
        step = self.executor.step
        for scheduled in self._take_step(result, now_ns):
            self._fail(scheduled.request, result.code, result.message, retryable=True)
        if step is not None and self.executor.step is not step and step.moves_tiers:
            # Blocks count as cached or stored that perhaps were never moved: begin anew with an empty cache.
            self._lose(result.incarnation, dead=False, is_suspicious=False, now_ns=now_ns)
            if self.executor.stalled is not None:
                self._connect(self.executor.stalled, now_ns)

    # ---------------------------------------------------------------- checks

    def check_invariants(self) -> None:
        """Assert everything that the module's docstring promises. O(tokens in use)."""
        batch, step = self.batch, self.executor.step
        self.remote.check_invariants()
        self.executor.check_invariants()
        away = [*self.remote.prefilling.values(), *self.remote.prefilled, *self.remote.transferring.values()]
        queued = {id(request) for request in [*batch.waiting, *batch.running, *away]}
        assert queued == {id(request) for request in self.requests.values()}, "a request is lost or left over"
        for request_id, request in self.requests.items():
            assert request.request_id == request_id and request.status not in FINISHED, request
            assert request.finish() is None, f"{request_id} is over and still known"
        ahead = self.executor.step_ahead
        for scheduled in (*(step.scheduled if step else ()), *(ahead.scheduled if ahead else ())):
            assert scheduled.request.status in FINISHED | {RequestStatus.RUNNING}, scheduled.request
        is_connected = self.executor.connected is not None
        assert (batch.pool is not None) == is_connected, "blocks without an executor, or the reverse"
        assert step is not None or not batch.num_retiring, "blocks retire from no step"
        at_work = step is not None or self.remote.prefilling or self.remote.transferring
        assert at_work or self.is_idle or not is_connected, "work waits for nothing"
        assert is_connected or not self.remote.transferring, "a transfer to nobody"
