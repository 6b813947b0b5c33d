"""What the job executor keeps: jobs, the DP groups that hold them, limits and counters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum

from bus.control.messages import FinishReason, SamplingParams
from gateway.events import GroupView
from gateway.prefix_index import PrefixIndex


@dataclass(frozen=True, slots=True)
class JobLimits:
    """Bounds of one job executor."""

    retry_attempts_max: int = 20  # re-dispatches of one request after losses
    retry_window_ms: int = 60_000  # how long a request may be without a group that accepts it
    waiting_jobs_max: int = 512  # requests without a group, all together
    resend_interval_ms: int = 1_000  # an unanswered AddRequest is sent again after so long
    probe_interval_ms: int = 10_000  # an accepted request is sent again after such a silence
    backoff_ms: int = 50  # doubles with each refusal in a row, five times at most


@dataclass(slots=True)
class JobCounters:
    """Counts since start, for `/metrics`."""

    redispatches: int = 0
    stale_messages: int = 0
    trimmed_tokens: int = 0
    token_gaps: int = 0
    token_mismatches: int = 0  # a repeated position held another token: determinism is broken


class JobState(Enum):
    """See `gateway.core`."""

    WAITING = "waiting"
    DISPATCHED = "dispatched"
    ACCEPTED = "accepted"


@dataclass(slots=True)
class Job:
    """One request. `attempt` is the number of the latest dispatch, from 0; -1 = none yet."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    deadline_ns: int  # monotonic; by when a group must have accepted it
    output_token_ids: list[int] = field(default_factory=list)
    state: JobState = JobState.WAITING
    attempt: int = -1
    dp_group: int = -1
    incarnation: int = 0  # of the group's scheduler, at the dispatch
    num_losses: int = 0
    num_refusals: int = 0  # in a row, for the back-off
    full_groups: set[int] = field(default_factory=set)  # have said queue_full
    avoid_group: int = -1  # gave the request back; any other is preferred
    was_accepted: bool = False
    prompt_logprobs_done: bool = False
    heard_ns: int = 0  # ACCEPTED: when the scheduler last spoke of it, or was asked
    wake_ns: int = 0  # WAITING: not before; DISPATCHED: send again

    @property
    def num_tokens(self) -> int:
        """Tokens that a group must hold to go on."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    def kv_tokens(self, reserve_tokens: int) -> int:
        """Tokens so far, and those to come, of which `reserve_tokens` are counted at most."""
        num_to_come = self.sampling.max_tokens - len(self.output_token_ids)
        return self.num_tokens + min(num_to_come, reserve_tokens)

    def natural_end(self) -> FinishReason:
        """Tell whether the tokens so far end the request (only the scheduler's last word was lost)."""
        sampling, outputs = self.sampling, self.output_token_ids
        if not outputs:
            return ""
        eos_token_ids = () if sampling.ignore_eos else sampling.eos_token_ids
        if outputs[-1] in sampling.stop_token_ids + eos_token_ids and len(outputs) > sampling.min_tokens:
            return "stop"
        return "length" if len(outputs) >= sampling.max_tokens else ""


@dataclass(slots=True)
class Group:
    """One DP group: its view, the jobs that it holds, by request id, and what it probably has cached."""

    view: GroupView
    prefixes: PrefixIndex
    jobs: dict[str, Job] = field(default_factory=dict)
    num_tokens: int = 0
    kv_tokens: int = 0  # with reserved output
    last_dispatch: int = 0  # number of the latest dispatch to it; 0 = none


class GroupTable:
    """The known DP groups. A job is attached to at most one."""

    def __init__(self, *, reserve_tokens: int = 0, index_blocks: int = 0) -> None:
        """`reserve_tokens` of a job's output to come count as used; a group's prefix index has `index_blocks`."""
        self._groups: dict[int, Group] = {}
        self._reserve_tokens = reserve_tokens
        self._index_blocks = index_blocks

    def __getitem__(self, dp_group: int) -> Group:
        return self._groups[dp_group]

    def __iter__(self) -> Iterator[int]:
        return iter(self._groups)

    def __len__(self) -> int:
        return len(self._groups)

    def serving(self) -> list[int]:
        """Return the groups that can take requests."""
        return [dp_group for dp_group, group in self._groups.items() if group.view.serving]

    def update(self, views: Mapping[int, GroupView]) -> tuple[set[int], list[Job]]:
        """Take new views; return the groups whose scheduler died and their jobs, now detached."""
        dead = {
            dp_group
            for dp_group, group in self._groups.items()
            if dp_group not in views or views[dp_group].incarnation != group.view.incarnation
        }
        orphans = [job for dp_group in sorted(dead) for job in self._groups[dp_group].jobs.values()]
        kept = {dp_group: group for dp_group, group in self._groups.items() if dp_group not in dead}
        self._groups = {}
        for dp_group, view in sorted(views.items()):
            group = kept.get(dp_group) or Group(view, PrefixIndex(self._index_blocks))
            if group.view.executor_incarnation != view.executor_incarnation:
                group.prefixes.clear()
            group.view = view
            self._groups[dp_group] = group
        return dead, orphans

    def attach(self, job: Job, dp_group: int) -> None:
        """Give the job to a group."""
        group = self._groups[dp_group]
        group.jobs[job.request_id] = job
        group.num_tokens += job.num_tokens
        group.kv_tokens += job.kv_tokens(self._reserve_tokens)
        job.dp_group, job.incarnation = dp_group, group.view.incarnation

    def detach(self, job: Job) -> None:
        """Take the job from its group."""
        group = self._groups[job.dp_group]
        del group.jobs[job.request_id]
        group.num_tokens -= job.num_tokens
        group.kv_tokens -= job.kv_tokens(self._reserve_tokens)

    def grow(self, job: Job, token_ids: tuple[int, ...]) -> None:
        """Append output tokens to an attached job."""
        group = self._groups[job.dp_group]
        group.kv_tokens -= job.kv_tokens(self._reserve_tokens)
        job.output_token_ids += token_ids
        group.num_tokens += len(token_ids)
        group.kv_tokens += job.kv_tokens(self._reserve_tokens)

    def check_invariants(self) -> None:
        """Assert that loads are sums over jobs and that every job is where it says."""
        for dp_group, group in self._groups.items():
            jobs = group.jobs.values()
            assert group.num_tokens == sum(job.num_tokens for job in jobs), group
            assert group.kv_tokens == sum(job.kv_tokens(self._reserve_tokens) for job in jobs), group
            assert len(group.prefixes) <= self._index_blocks, group
            for job in group.jobs.values():
                assert (job.dp_group, job.incarnation) == (dp_group, group.view.incarnation), job
