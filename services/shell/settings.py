"""What the TE-shell's core is told at its start, and what it counts."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from services.batching.admission import Limits
from services.shell.policies import Policy


@dataclass(frozen=True, slots=True, kw_only=True)
class ShellSettings:
    """What the core needs to know of the configuration."""

    incarnation: int
    num_workers: int
    long_workers: int  # so many of them, the last ones, take long prompts and nothing else; 0 = none
    long_tokens: int  # from how many tokens a prompt is long
    policy: Policy
    max_num_seqs: int
    max_num_batched_tokens: int
    max_waiting_tasks: int
    enable_prefix_caching: bool
    enable_chunked_prefill: bool
    expert_parallel: bool  # all workers step together
    limits: Limits  # as far as known before a worker says its own
    step_timeout_ns: int  # a step that takes longer is given up, its worker counts as stalled
    worker_wait_ns: int  # how long a task waits while there is no worker for it
    kv_identity: str  # says what besides its tokens decides about the bytes of a KV block
    max_num_losses: int = 8  # workers in a row that may die under one task without a step of it done


@dataclass(slots=True)
class Counters:
    """Work done since the start; whole numbers that only grow."""

    num_steps: int = 0
    num_accepted_tasks: int = 0
    num_completed_tasks: int = 0
    num_failed_tasks: int = 0
    num_aborted_tasks: int = 0
    num_ended_offers: int = 0
    num_withdrawn_offers: int = 0
    num_workers_lost: int = 0
    num_ignored_results: int = 0

    def as_dict(self) -> dict[str, int]:
        """Return name -> value."""
        return asdict(self)
