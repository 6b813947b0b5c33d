"""The job executor: which DP group computes a request, and what the client has of it.

Theory. A request is a prompt, sampling parameters and the output tokens that its client already has.
Tokens depend on nothing else, so any DP group can go on from any point: when a group's scheduler dies
(its incarnation changes, or it is gone), or gives a request back, the request is dispatched again as the
next *attempt*, with its tokens so far. What an older attempt says later is dropped, and output positions
seen before are trimmed, so the client gets every token exactly once. A group that merely stops serving
(its attention worker restarts) keeps its requests: the scheduler lives, and goes on by itself.

States of a job (a finished job is in no collection):

  WAITING     in `_waiting`: no group has it. Dispatched when one serves; an error after the retry window.
  DISPATCHED  in `_unanswered` and in its group: `AddRequest` was sent, without an answer yet. Sent again (the
              same attempt: idempotent) until answered; an error after the retry window.
  ACCEPTED    in its group only: queued or running there. No deadline: it ends by the scheduler's word or
              death. After a long silence it is sent again (the same attempt): a scheduler that still has it
              says so, one that has lost it, or whose last word was lost, goes on with it.

`check_invariants` asserts: every job is in the collections of its state and in no other; an attached
job's group is known at the job's incarnation, and of its kind; group loads are the sums over their jobs;
losses and tokens are within bounds.
"""

from __future__ import annotations

from itertools import chain

from bus.clock import NS_PER_MS
from bus.control.messages import (
    AbortRequest,
    AddRequest,
    FinishReason,
    RequestAccepted,
    RequestFailed,
    RequestRejected,
    TokensGenerated,
)
from gateway import events as ev
from gateway.jobs import Group, Job, JobCounters, JobLimits, JobState
from gateway.placer import PlacementSettings, Placer, group_table

_BACKOFF_DOUBLINGS_MAX = 5


class JobExecutor:
    """A pure state machine: `handle(event, now_ns)` returns the instructions. Nothing else changes it."""

    def __init__(self, limits: JobLimits | None = None, placement: PlacementSettings | None = None) -> None:
        """Raises ConfigError when there is no such placement policy."""
        self.limits = limits or JobLimits()
        self.counters = JobCounters()
        self.placer = Placer(placement or PlacementSettings())
        self._jobs: dict[str, Job] = {}
        self._waiting: dict[str, Job] = {}
        self._unanswered: dict[str, Job] = {}
        self._groups = group_table(self.placer.settings, self.placer)
        self._probe_ns = 0  # when to look for silent jobs; 0 = nothing was accepted since the last look

    # ------------------------------------------------------------------ views

    def job(self, request_id: str) -> Job | None:
        """Return the unfinished job of that id."""
        return self._jobs.get(request_id)

    def num_jobs(self) -> int:
        """Return the number of unfinished jobs."""
        return len(self._jobs)

    def num_waiting(self) -> int:
        """Return the number of jobs without a group."""
        return len(self._waiting)

    def groups(self) -> dict[int, Group]:
        """Return the known groups and what they hold, for reading."""
        return {dp_group: self._groups[dp_group] for dp_group in self._groups}

    def next_wake_ns(self) -> int | None:
        """Return when a `Tick` is due (monotonic ns), None while nothing waits for time to pass."""
        if not self._jobs:
            return None
        timed = chain(self._waiting.values(), self._unanswered.values())
        wake_ns = min((min(job.wake_ns, job.deadline_ns) for job in timed), default=self._probe_ns)
        return min(wake_ns, self._probe_ns or wake_ns)

    # ------------------------------------------------------------------ events

    def handle(self, event: ev.Event, now_ns: int) -> list[ev.Instruction]:
        """Take one event at monotonic time `now_ns`; return what to do, in order.

        Raises:
            ValueError: a submitted `request_id` is in use; nothing has changed.
        """
        out: list[ev.Instruction] = []
        match event:
            case ev.ClientSubmitted():
                self._on_submitted(event, now_ns, out)
            case ev.SchedulerSaid():
                self._on_scheduler(event, now_ns, out)
            case ev.SendRefused():
                job = self._current(event.request_id, event.attempt)
                if job is not None and job.state is JobState.DISPATCHED:
                    self._refused(job, now_ns, out)
            case ev.GroupsChanged():
                self._on_groups(event, now_ns, out)
            case ev.ClientLeft() | ev.StopStringMet():
                self._on_abandoned(event.request_id, out)
            case ev.Tick():
                self._on_tick(now_ns, out)
        return out

    def _on_submitted(self, event: ev.ClientSubmitted, now_ns: int, out: list[ev.Instruction]) -> None:
        if event.request_id in self._jobs:
            raise ValueError(f"request_id: {event.request_id!r} is in use")
        deadline_ns = now_ns + self.limits.retry_window_ms * NS_PER_MS
        job = Job(event.request_id, event.prompt_token_ids, event.sampling, deadline_ns)
        self._jobs[job.request_id] = job
        self._waiting[job.request_id] = job
        self._place(job, now_ns, out)
        if job.state is JobState.WAITING and len(self._waiting) > self.limits.waiting_jobs_max:
            self._fail(job, 429, "queue_full", "too many requests wait for a DP group", out)

    def _on_abandoned(self, request_id: str, out: list[ev.Instruction]) -> None:
        job = self._jobs.get(request_id)
        if job is not None:
            self._abort(job, out)
            self._forget(job)

    def _on_tick(self, now_ns: int, out: list[ev.Instruction]) -> None:
        for job in list(chain(self._waiting.values(), self._unanswered.values())):
            if job.deadline_ns <= now_ns:
                self._abort(job, out)
                self._fail(job, 503, "no_serving_group", "no DP group could take the request in time", out)
            elif job.wake_ns <= now_ns and job.state is JobState.WAITING:
                self._place(job, now_ns, out)
            elif job.wake_ns <= now_ns:
                self._send(job, now_ns, out)
        if self._probe_ns and self._probe_ns <= now_ns:
            self._probe(now_ns, out)

    def _probe(self, now_ns: int, out: list[ev.Instruction]) -> None:
        interval_ns = self.limits.probe_interval_ms * NS_PER_MS
        accepted = [job for job in self._jobs.values() if job.state is JobState.ACCEPTED]
        for job in accepted:
            if job.heard_ns + interval_ns <= now_ns:
                job.heard_ns = now_ns
                self._send(job, now_ns, out)
        self._probe_ns = now_ns + interval_ns if accepted else 0

    def _on_groups(self, event: ev.GroupsChanged, now_ns: int, out: list[ev.Instruction]) -> None:
        dead, orphans = self._groups.update(event.groups)
        for job in orphans:
            self._unanswered.pop(job.request_id, None)
            self._lost(job, now_ns, out)
        for job in self._jobs.values():
            job.full_groups -= dead  # the next incarnation starts with an empty queue
        for job in list(self._waiting.values()):
            paused = now_ns < job.wake_ns < job.deadline_ns
            if not paused:
                self._place(job, now_ns, out)

    # ------------------------------------------------------------------ the scheduler's words

    def _on_scheduler(self, event: ev.SchedulerSaid, now_ns: int, out: list[ev.Instruction]) -> None:
        message = event.message
        job = self._current(message.request_id, message.attempt)
        if job is None or job.dp_group != event.dp_group:
            self._on_stale(event, out)
            return
        match message:
            case RequestAccepted():
                self._accepted(job, now_ns, out)
            case RequestRejected(code="queue_full"):
                job.full_groups.add(job.dp_group)
                self._requeue(job, now_ns)
                self._place(job, now_ns, out)
            case RequestRejected(code="not_ready"):
                self._refused(job, now_ns, out)
            case RequestRejected():
                self._fail(job, 400, message.code, message.message, out)
            case TokensGenerated():
                self._on_tokens(job, message, now_ns, out)
            case RequestFailed(retryable=True):
                job.num_refusals += 1
                self._given_back(job, now_ns, out)
            case RequestFailed():
                self._fail(job, 500, message.code, message.message, out)

    def _on_stale(self, event: ev.SchedulerSaid, out: list[ev.Instruction]) -> None:
        """An older attempt, or a request that nobody waits for: if it still costs steps, end it."""
        self.counters.stale_messages += 1
        message = event.message
        if isinstance(message, TokensGenerated) and not message.finish_reason:
            abort = AbortRequest(request_id=message.request_id, attempt=message.attempt)
            out.append(ev.SendAbort(event.dp_group, abort))

    def _accepted(self, job: Job, now_ns: int, out: list[ev.Instruction]) -> None:
        self._unanswered.pop(job.request_id, None)
        job.state = JobState.ACCEPTED
        job.num_refusals = 0
        job.heard_ns = now_ns
        self._probe_ns = self._probe_ns or now_ns + self.limits.probe_interval_ms * NS_PER_MS
        job.full_groups.clear()
        if not job.was_accepted:
            job.was_accepted = True
            out.append(ev.DeliverAccepted(job.request_id))

    def _refused(self, job: Job, now_ns: int, out: list[ev.Instruction]) -> None:
        """The group cannot take it now: another at once, or this one after a pause. No loss is counted."""
        job.avoid_group = job.dp_group
        job.num_refusals += 1
        self._requeue(job, now_ns)
        self._place_or_pause(job, now_ns, out)

    def _given_back(self, job: Job, now_ns: int, out: list[ev.Instruction]) -> None:
        """The group cannot go on with it: another is preferred. Counts as a loss."""
        job.avoid_group = job.dp_group
        self._groups.detach(job)
        self._unanswered.pop(job.request_id, None)
        self._lost(job, now_ns, out)

    def _on_tokens(self, job: Job, message: TokensGenerated, now_ns: int, out: list[ev.Instruction]) -> None:
        overlap = len(job.output_token_ids) - message.first_index
        if message.finish_reason == "abort":  # nobody here asked for it: the scheduler is stopping
            self._given_back(job, now_ns, out)
        elif overlap < 0 or (message.finish_reason and overlap > len(message.token_ids)):
            # Messages were lost on the way. The client must not see a hole: compute from what it has.
            self.counters.token_gaps += 1
            self._abort(job, out)
            self._given_back(job, now_ns, out)
        else:
            self._accepted(job, now_ns, out)
            self._deliver(job, message, min(overlap, len(message.token_ids)), out)
            if message.finish_reason:
                self._finish(job, message.finish_reason, message.stop_token_id, out)

    def _deliver(self, job: Job, message: TokensGenerated, overlap: int, out: list[ev.Instruction]) -> None:
        known = job.output_token_ids[message.first_index : message.first_index + overlap]
        self.counters.trimmed_tokens += overlap
        self.counters.token_mismatches += tuple(known) != message.token_ids[:overlap]
        token_ids = message.token_ids[overlap:]
        prompt_logprobs = () if job.prompt_logprobs_done else message.prompt_logprobs
        only_last_word = bool(message.finish_reason) and not job.output_token_ids
        if not (token_ids or prompt_logprobs or only_last_word):
            return
        job.prompt_logprobs_done = True
        self._groups.grow(job, token_ids)
        logprobs, num_cached = message.logprobs[overlap:], message.num_cached_tokens
        out.append(ev.DeliverTokens(job.request_id, token_ids, logprobs, prompt_logprobs, num_cached))

    # ------------------------------------------------------------------ placing

    def _place(self, job: Job, now_ns: int, out: list[ev.Instruction]) -> None:
        """Dispatch a waiting job to the best serving group of its kind that has not said queue_full."""
        serving = self._serving(job)
        candidates = {d: self._groups[d] for d in serving if d not in job.full_groups}
        if candidates:
            self._dispatch(job, self.placer.choose(job, candidates), now_ns, out)
        elif not serving:
            job.wake_ns = job.deadline_ns  # a change of the groups wakes it
        elif job.was_accepted:
            job.full_groups.clear()
            job.num_refusals += 1
            job.wake_ns = now_ns + self._backoff_ns(job)
        else:
            self._fail(job, 429, "queue_full", "the queues of all DP groups are full", out)

    def _place_or_pause(self, job: Job, now_ns: int, out: list[ev.Instruction]) -> None:
        """Like `_place`, but pause when every group has had its turn, or only the avoided one is left."""
        others = set(self._serving(job)) - job.full_groups - {job.avoid_group}
        if others and job.num_refusals <= len(self._groups):
            self._place(job, now_ns, out)
        else:
            job.wake_ns = now_ns + self._backoff_ns(job)

    def _serving(self, job: Job) -> list[int]:
        return self.placer.of_kind(job, self._groups.serving())

    def _backoff_ns(self, job: Job) -> int:
        doublings = min(max(job.num_refusals - 1, 0), _BACKOFF_DOUBLINGS_MAX)
        return self.limits.backoff_ms * NS_PER_MS << doublings

    def _dispatch(self, job: Job, dp_group: int, now_ns: int, out: list[ev.Instruction]) -> None:
        del self._waiting[job.request_id]
        self._unanswered[job.request_id] = job
        self._groups.attach(job, dp_group)
        self.placer.note(job, self._groups[dp_group])
        job.state = JobState.DISPATCHED
        job.attempt += 1
        self._send(job, now_ns, out)

    def _send(self, job: Job, now_ns: int, out: list[ev.Instruction]) -> None:
        job.wake_ns = now_ns + self.limits.resend_interval_ms * NS_PER_MS
        message = AddRequest(
            request_id=job.request_id,
            attempt=job.attempt,
            prompt_token_ids=job.prompt_token_ids,
            output_token_ids=tuple(job.output_token_ids),
            sampling=job.sampling,
        )
        out.append(ev.SendAddRequest(job.dp_group, message))

    # ------------------------------------------------------------------ losing and ending

    def _lost(self, job: Job, now_ns: int, out: list[ev.Instruction]) -> None:
        """A detached job's group has died or given it back: try again elsewhere, within bounds."""
        self._enqueue(job, now_ns)
        reason = job.natural_end()
        if reason:
            self._finish(job, reason, job.output_token_ids[-1] if reason == "stop" else -1, out)
        elif job.num_losses == self.limits.retry_attempts_max:
            text = f"the request was lost {job.num_losses + 1} times; giving up"
            self._fail(job, 503, "retries_exhausted", text, out)
        else:
            job.num_losses += 1
            self.counters.redispatches += 1
            place = self._place_or_pause if job.num_refusals else self._place
            place(job, now_ns, out)

    def _requeue(self, job: Job, now_ns: int) -> None:
        self._groups.detach(job)
        self._unanswered.pop(job.request_id, None)
        self._enqueue(job, now_ns)

    def _enqueue(self, job: Job, now_ns: int) -> None:
        """Put a detached job among the waiting. Losing a group that had accepted it opens a new window."""
        if job.state is JobState.ACCEPTED:
            job.deadline_ns = now_ns + self.limits.retry_window_ms * NS_PER_MS
        job.state = JobState.WAITING
        job.wake_ns = job.deadline_ns
        self._waiting[job.request_id] = job

    def _abort(self, job: Job, out: list[ev.Instruction]) -> None:
        if job.state is not JobState.WAITING:
            abort = AbortRequest(request_id=job.request_id, attempt=job.attempt)
            out.append(ev.SendAbort(job.dp_group, abort))

    def _forget(self, job: Job) -> None:
        if job.state is JobState.WAITING:
            del self._waiting[job.request_id]
        else:
            self._groups.detach(job)
            self._unanswered.pop(job.request_id, None)
        del self._jobs[job.request_id]

    def _finish(self, job: Job, reason: FinishReason, stop_id: int, out: list[ev.Instruction]) -> None:
        self._forget(job)
        out.append(ev.DeliverFinish(job.request_id, reason, stop_id))

    def _fail(self, job: Job, status: int, code: str, text: str, out: list[ev.Instruction]) -> None:
        self._forget(job)
        retry_after_s = 1 if status in (429, 503) else 0
        out.append(ev.DeliverError(job.request_id, status, code, text, retry_after_s))

    def _current(self, request_id: str, attempt: int) -> Job | None:
        job = self._jobs.get(request_id)
        if job is None or job.attempt != attempt or job.state is JobState.WAITING:
            return None
        return job

    # ------------------------------------------------------------------ invariants

    def check_invariants(self) -> None:
        """Assert what the module's docstring promises. Cheap enough for tests after every event."""
        self._groups.check_invariants()
        for job in self._jobs.values():
            attached = job.dp_group in set(self._groups) and job.request_id in self._groups[job.dp_group].jobs
            assert (job.request_id in self._waiting) == (job.state is JobState.WAITING), job
            assert (job.request_id in self._unanswered) == (job.state is JobState.DISPATCHED), job
            assert attached == (job.state is not JobState.WAITING), job
            assert not attached or self.placer.of_kind(job, [job.dp_group]), job
            assert len(job.output_token_ids) <= job.sampling.max_tokens, job
            assert 0 <= job.num_losses <= self.limits.retry_attempts_max, job
        num_attached = sum(len(self._groups[dp_group].jobs) for dp_group in self._groups)
        assert num_attached + len(self._waiting) == len(self._jobs)
