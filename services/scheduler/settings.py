"""What the scheduler's core is told at its start, and what it counts."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from services.batching.admission import Limits


@dataclass(frozen=True, slots=True, kw_only=True)
class CoreSettings:
    """What the core needs to know of the configuration."""

    incarnation: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_waiting_requests: int
    limits: Limits  # as far as known before an executor says its own
    step_timeout_ns: int  # a step that takes longer is given up, its executor counts as stalled
    executor_wait_ns: int  # how long a request waits while there is no executor
    enable_prefix_caching: bool
    kv_identity: str  # says what besides its tokens decides about the bytes of a KV block
    async_scheduling: bool = False  # plan the next step while one is under way
    prefill_tokens_min: int = 0  # who lacks fewer tokens is not handed to the prefill leader; 0 = nobody is
    max_num_losses: int = 8  # executors in a row that may die under one request without a step of it done


@dataclass(slots=True)
class Counters:
    """Work done since the start; whole numbers that only grow."""

    num_steps: int = 0
    num_generated_tokens: int = 0
    num_accepted_requests: int = 0
    num_rejected_requests: int = 0
    num_finished_requests: int = 0
    num_failed_requests: int = 0
    num_aborted_requests: int = 0
    num_executors_lost: int = 0
    num_ignored_results: int = 0
    num_prefills_handed_over: int = 0
    num_prefills_failed: int = 0
    num_kv_fetches: int = 0
    num_kv_fetches_failed: int = 0

    def as_dict(self) -> dict[str, int]:
        """Return name -> value."""
        return asdict(self)
