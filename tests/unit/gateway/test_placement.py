"""Policies as functions of lists, the prefix index, and what the job executor makes of both."""

from __future__ import annotations

from typing import Any

import pytest

from bus.clock import NS_PER_S
from bus.config import GatewayConfig, PodConfig, TopologyConfig
from bus.control.messages import RequestAccepted, SamplingParams, TokensGenerated
from bus.errors import ConfigError
from gateway import process
from gateway.core import JobExecutor
from gateway.events import (
    ClientLeft,
    ClientSubmitted,
    DeliverError,
    GroupsChanged,
    GroupView,
    SchedulerSaid,
    SendAddRequest,
    Tick,
)
from gateway.placement import POLICIES, Bounds, Candidate, policy
from gateway.placer import PlacementSettings
from gateway.prefix_index import PrefixIndex, PromptHasher

BOUNDS = Bounds(balance_tokens=100, prefix_tokens_min=8)


def candidate(dp_group: int, **fields: Any) -> Candidate:
    quiet = {
        "num_jobs": 0,
        "num_tokens": 0,
        "kv_tokens": 0,
        "is_at_limit": False,
        "prefix_tokens": 0,
        "last_dispatch": 0,
    }
    return Candidate(dp_group=dp_group, **{**quiet, **fields})


def chosen(name: str, *candidates: Candidate) -> int:
    return POLICIES[name].choose(candidates, BOUNDS).dp_group


def test_every_policy_takes_the_first_of_equals_and_the_only_one() -> None:
    for name in POLICIES:
        assert chosen(name, candidate(3), candidate(5)) == 3
        assert chosen(name, candidate(4, is_at_limit=True, kv_tokens=9, num_jobs=9)) == 4


def test_round_robin_goes_on_with_the_longest_unused() -> None:
    groups = (
        candidate(0, last_dispatch=3),
        candidate(1, last_dispatch=1, num_jobs=9),
        candidate(2, last_dispatch=2),
    )
    assert chosen("round_robin", *groups) == 1


def test_least_loaded_counts_requests_then_tokens() -> None:
    busy, long, short = (
        candidate(0, num_jobs=2),
        candidate(1, num_jobs=1, num_tokens=9),
        candidate(2, num_jobs=1),
    )
    assert chosen("least_loaded", busy, long, short) == 2


def test_kv_usage_drops_groups_at_their_limit_first() -> None:
    full, used, free = candidate(0, is_at_limit=True), candidate(1, kv_tokens=9), candidate(2, kv_tokens=5)
    assert chosen("kv_usage", full, used, free) == 2
    assert chosen("kv_usage", full, candidate(1, kv_tokens=9, is_at_limit=True)) == 0


def test_prefix_prefers_the_longest_match_while_the_load_is_balanced() -> None:
    idle, near, far = (
        candidate(0),
        candidate(1, kv_tokens=100, prefix_tokens=16),
        candidate(2, prefix_tokens=12),
    )
    assert chosen("prefix", idle, near, far) == 1
    assert chosen("prefix", idle, candidate(1, kv_tokens=101, prefix_tokens=16), far) == 2
    assert chosen("prefix", idle, candidate(1, is_at_limit=True, prefix_tokens=16)) == 0


def test_a_small_prefix_decides_nothing() -> None:
    assert chosen("prefix", candidate(0), candidate(1, kv_tokens=1, prefix_tokens=7)) == 0
    assert chosen("prefix", candidate(0), candidate(1, kv_tokens=1, prefix_tokens=8)) == 1


def test_an_unknown_policy_is_named_with_those_that_there_are() -> None:
    with pytest.raises(
        ConfigError, match=r"gateway\.policy = 'best': must be one of round_robin, .*, prefix"
    ):
        policy("best")
    with pytest.raises(ConfigError, match=r"gateway\.policy"):
        JobExecutor(placement=process.placement_settings(PodConfig(gateway=GatewayConfig(policy="best"))))


# --------------------------------------------------------------------------- the index


def hashes(*token_ids: int) -> tuple[bytes, ...]:
    return PromptHasher(2, 100).hashes(token_ids)


def test_an_index_forgets_the_deepest_of_the_oldest_first() -> None:
    index = PrefixIndex(4)
    old, new = hashes(1, 1, 2, 2, 3, 3), hashes(1, 1, 9, 9, 8, 8)
    index.add(old)
    assert (index.match(old), index.match(new)) == (3, 1)
    index.add(new)
    assert (index.match(old), index.match(new), len(index)) == (2, 3, 4)
    index.clear()
    assert (index.match(old), len(index)) == (0, 0)


def test_a_prompt_longer_than_the_index_leaves_its_beginning() -> None:
    index = PrefixIndex(2)
    index.add(hashes(1, 1, 2, 2, 3, 3))
    assert index.match(hashes(1, 1, 2, 2, 3, 3)) == 2


def test_a_prompt_is_hashed_once_and_only_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(
        "gateway.prefix_index.extend_hashes", lambda out, root, token_ids, block: calls.append(len(token_ids))
    )
    hasher = PromptHasher(2, 3)
    prompt = tuple(range(50))
    for _ in range(4):
        hasher.hashes(prompt)
    assert calls == [6]


# --------------------------------------------------------------------------- the job executor


class Pod:
    """A job executor over groups that serve."""

    def __init__(self, num_groups: int = 2, **settings: Any) -> None:
        self.core = JobExecutor(placement=PlacementSettings(**{"block_tokens": 2, **settings}))
        self.views = {
            dp_group: GroupView(1, serving=True, executor_incarnation=1) for dp_group in range(num_groups)
        }
        self.change()

    def change(self, **views: GroupView) -> None:
        self.views |= {int(name[1:]): view for name, view in views.items()}
        self.core.handle(GroupsChanged(dict(self.views)), 0)
        self.core.check_invariants()

    def submit(self, request_id: str, *prompt: int, max_tokens: int = 4, **sampling: Any) -> int:
        """Return the group, -1 = none."""
        params = SamplingParams(max_tokens=max_tokens, **sampling)
        out = self.core.handle(ClientSubmitted(request_id, prompt, params), 0)
        self.core.check_invariants()
        groups = [one.dp_group for one in out if isinstance(one, SendAddRequest)]
        return groups[0] if groups else -1

    def end(self, *request_ids: str) -> None:
        for request_id in request_ids:
            self.core.handle(ClientLeft(request_id), 0)
        self.core.check_invariants()


def test_a_prompt_returns_to_where_its_prefix_is() -> None:
    pod = Pod()
    assert [pod.submit("a", 1, 1, 2, 2), pod.submit("b", 5, 5, 6, 6)] == [0, 1]
    assert pod.submit("c", 5, 5, 6, 6, 7) == 1
    assert pod.submit("d", 1, 1, 2, 2, 3, 3) == 0
    routes = pod.core.placer.routes
    assert [(routes[d].num_requests, routes[d].num_by_prefix, routes[d].prefix_tokens) for d in (0, 1)] == [
        (2, 1, 4),
        (2, 1, 4),
    ]


@pytest.mark.parametrize(
    "lost",
    [GroupView(2, serving=True, executor_incarnation=1), GroupView(1, serving=True, executor_incarnation=2)],
)
def test_the_index_goes_with_the_scheduler_or_the_attention_worker(lost: GroupView) -> None:
    pod = Pod()
    assert [pod.submit("a", 1, 1, 2, 2), pod.submit("b", 5, 5, 6, 6)] == [0, 1]
    pod.end("a", "b")
    pod.change(d1=GroupView(1, serving=False, executor_incarnation=1))
    assert len(pod.core.groups()[1].prefixes) == 2, "a pause is no loss"
    pod.change(d1=lost)
    assert [len(group.prefixes) for group in pod.core.groups().values()] == [2, 0]
    pod.submit("c", 5, 5, 6, 6)
    assert all(counters.num_by_prefix == 0 for counters in pod.core.placer.routes.values())


def test_prefixes_count_for_nothing_where_none_are_kept_or_all_is_computed() -> None:
    pod = Pod(cache_tokens=0)
    assert [pod.submit("a", 1, 1), pod.submit("b", 1, 1)] == [0, 1]
    pod = Pod()
    assert [pod.submit("a", 1, 1), pod.submit("b", 1, 1, prompt_logprobs=1)] == [0, 1]


def test_output_to_come_counts_up_to_the_reserve() -> None:
    pod = Pod(policy="kv_usage", output_reserve_tokens=10)
    assert pod.submit("long", 1, max_tokens=100) == 0
    assert [pod.submit(f"s{n}", 1, max_tokens=3) for n in range(3)] == [1, 1, 1]
    groups = pod.core.groups()
    assert (groups[0].kv_tokens, groups[1].kv_tokens) == (11, 12)
    pod.core.handle(SchedulerSaid(0, RequestAccepted(request_id="long", attempt=0)), 0)
    for first, token_ids in ((0, tuple(range(89))), (89, (7, 7))):
        tokens = TokensGenerated(request_id="long", attempt=0, first_index=first, token_ids=token_ids)
        pod.core.handle(SchedulerSaid(0, tokens), 0)
        pod.core.check_invariants()
    assert groups[0].kv_tokens == 1 + 91 + 9, "9 tokens are to come"


def test_long_requests_and_short_ones_never_meet() -> None:
    pod = Pod(3, first_long_group=2, long_tokens=10)
    assert [pod.submit(f"s{n}", n, max_tokens=8) for n in range(4)] == [0, 1, 0, 1]
    assert [pod.submit(f"l{n}", n, max_tokens=9) for n in range(2)] == [2, 2]


def test_a_request_waits_for_a_group_of_its_kind() -> None:
    pod = Pod(2, first_long_group=1, long_tokens=10)
    pod.change(d1=GroupView(1, serving=False, executor_incarnation=1))
    assert pod.submit("long", 1, max_tokens=20) == -1
    assert pod.core.num_waiting() == 1
    out = pod.core.handle(GroupsChanged({**pod.views, 1: GroupView(1, serving=True)}), 0)
    assert [one.dp_group for one in out if isinstance(one, SendAddRequest)] == [1]
    pod.change(d0=GroupView(1, serving=False, executor_incarnation=1))
    assert pod.submit("short", 1) == -1
    out = pod.core.handle(Tick(), 61 * NS_PER_S)
    assert [one.code for one in out if isinstance(one, DeliverError) and one.request_id == "short"] == [
        "no_serving_group"
    ]


def test_placing_follows_the_settings() -> None:
    config = PodConfig(
        topology=TopologyConfig(dp_groups=5, long_dp_groups=2),
        gateway=GatewayConfig(policy="kv_usage", long_tokens=7),
    )
    settings = process.placement_settings(config)
    assert (settings.policy, settings.first_long_group, settings.long_tokens) == ("kv_usage", 3, 7)
    settings = process.placement_settings(PodConfig(gateway=GatewayConfig(long_tokens=7)))
    assert settings.first_long_group == 2 and settings.long_tokens > 1 << 40
