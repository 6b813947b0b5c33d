"""Puts jobs into DP groups: which groups may take a job, what the policy is told of them, what came of it.

Long requests are isolated (paper section 7): the last `num_long_groups` groups take requests of at least
`long_tokens` tokens (prompt and `max_tokens`) and no others, and no other group takes one, so a long prompt never
shares a step with a short request.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from bus.block_hash import BlockHash
from gateway import placement
from gateway.jobs import Group, GroupTable, Job
from gateway.prefix_index import PromptHasher

_HASHED_TOKENS_MAX = 1 << 17  # of one prompt; what lies behind decides nothing


@dataclass(frozen=True, slots=True)
class PlacementSettings:
    """What placing needs to know of the configuration."""

    policy: str = "prefix"
    output_reserve_tokens: int = 512  # counted as used for each request's output to come, at most
    balance_tokens: int = 8192  # see `placement.Bounds`
    prefix_percent_min: int = 10  # of the prompt; a shorter prefix decides nothing
    max_num_seqs: int = 32  # requests that a group runs at once
    block_tokens: int = 16
    cache_tokens: int = 16384  # that one group keeps KV of; 0 = groups reuse no prefixes
    first_long_group: int = 1 << 31  # this group and those after it are for long requests
    long_tokens: int = 1 << 62  # so many prompt tokens + max_tokens make a request long


@dataclass(slots=True)
class RouteCounters:
    """Counts of one group since the gateway's start."""

    num_requests: int = 0  # dispatched to it
    num_by_prefix: int = 0  # those of them that were sent where a prefix of theirs is
    prefix_tokens: int = 0  # of these prefixes


class Placer:
    """Chooses groups for jobs. Event loop only; keeps counters, and the hashes of the latest prompt."""

    def __init__(self, settings: PlacementSettings) -> None:
        """Raises ConfigError when there is no such policy."""
        self.settings = settings
        self.routes: dict[int, RouteCounters] = {}
        self._policy = placement.policy(settings.policy)
        uses_prefix = self._policy.uses_prefix
        self.index_blocks = settings.cache_tokens // settings.block_tokens if uses_prefix else 0
        hashed_blocks = min(self.index_blocks, _HASHED_TOKENS_MAX // settings.block_tokens)
        self._hasher = PromptHasher(settings.block_tokens, hashed_blocks)
        self._num_dispatches = 0

    def of_kind(self, job: Job, dp_groups: Iterable[int]) -> list[int]:
        """Return those groups that serve jobs as long as this one."""
        is_long = len(job.prompt_token_ids) + job.sampling.max_tokens >= self.settings.long_tokens
        return [dp_group for dp_group in dp_groups if is_long == (dp_group >= self.settings.first_long_group)]

    def choose(self, job: Job, groups: Mapping[int, Group]) -> int:
        """Return the group for the job; one that it should avoid is chosen only if there is no other."""
        wanted = {dp_group: group for dp_group, group in groups.items() if dp_group != job.avoid_group}
        hashes = self._hashes(job)
        candidates = [self._candidate(job, hashes, *item) for item in (wanted or groups).items()]
        prefix_tokens_min = len(job.prompt_token_ids) * self.settings.prefix_percent_min // 100
        bounds = placement.Bounds(self.settings.balance_tokens, prefix_tokens_min)
        chosen = self._policy.choose(candidates, bounds)
        self._count(chosen, prefix_tokens_min)
        return chosen.dp_group

    def note(self, job: Job, group: Group) -> None:
        """The job goes to this group."""
        self._num_dispatches += 1
        group.last_dispatch = self._num_dispatches
        group.prefixes.add(self._hashes(job))

    def _hashes(self, job: Job) -> tuple[BlockHash, ...]:
        return self._hasher.hashes(job.prompt_token_ids) if self.index_blocks else ()

    def _candidate(
        self, job: Job, hashes: tuple[BlockHash, ...], dp_group: int, group: Group
    ) -> placement.Candidate:
        # A request for the prompt's log-probabilities computes all of it, wherever it goes.
        num_blocks = 0 if job.sampling.prompt_logprobs >= 0 else group.prefixes.match(hashes)
        return placement.Candidate(
            dp_group=dp_group,
            num_jobs=len(group.jobs),
            num_tokens=group.num_tokens,
            kv_tokens=group.kv_tokens,
            is_at_limit=len(group.jobs) >= self.settings.max_num_seqs,
            prefix_tokens=num_blocks * self.settings.block_tokens,
            last_dispatch=group.last_dispatch,
        )

    def _count(self, chosen: placement.Candidate, prefix_tokens_min: int) -> None:
        counters = self.routes.setdefault(chosen.dp_group, RouteCounters())
        counters.num_requests += 1
        if chosen.prefix_tokens > 0 and chosen.prefix_tokens >= prefix_tokens_min:
            counters.num_by_prefix += 1
            counters.prefix_tokens += chosen.prefix_tokens


def group_table(settings: PlacementSettings, placer: Placer) -> GroupTable:
    """Return an empty table of groups that counts and remembers what `placer` looks at."""
    return GroupTable(reserve_tokens=settings.output_reserve_tokens, index_blocks=placer.index_blocks)
