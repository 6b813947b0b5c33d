"""Where a request goes: policies, pure and chosen by name (`gateway.policy`).

Theory. A policy looks at the DP groups that may take a request and names one. It keeps nothing: what it may want
to know of the past is in the candidates, so it can be tested with a list, and replaced by name. To add one, write
a function here (or in a file of its own) and enter it in `POLICIES`.

    round_robin    in turn, whatever the groups are busy with
    least_loaded   the fewest requests
    kv_usage       the paper's decode scheduling (section 7): groups at their limit of requests are left out if there
                   are others; of the rest, the one with the least KV in use, counting output yet to come, because
                   that is how much attention its steps will cost
    prefix         the paper's combined algorithm: where the load is balanced, the group that has the longest prefix
                   of the prompt; otherwise as `kv_usage`

`prefix` judges balance group by group: a group whose KV use exceeds the least used one's by more than the bound
is out of the question, so one busy group among many does not keep the others from their prefixes. A prefix
that is a small part of the prompt (a system prompt, say) decides nothing, or all new conversations would go to the
group that had the first one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bus.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Candidate:
    """A DP group that may take the request, as the gateway knows it."""

    dp_group: int
    num_jobs: int  # requests that it has
    num_tokens: int  # prompt and output so far of these requests
    kv_tokens: int  # likewise, and what is reserved for output to come
    is_at_limit: bool  # it has as many requests as it runs at once
    prefix_tokens: int  # beginning of the prompt that it was sent before; 0 where the policy does not ask
    last_dispatch: int  # number of the latest dispatch to it, counted over all groups; 0 = none


@dataclass(frozen=True, slots=True)
class Bounds:
    """What makes a prefix decide."""

    balance_tokens: int  # KV use may exceed the least used candidate's by so much
    prefix_tokens_min: int  # a shorter prefix of this prompt decides nothing


Choose = Callable[[Sequence[Candidate], Bounds], Candidate]


@dataclass(frozen=True, slots=True)
class Policy:
    """`choose` names one of at least one candidates."""

    choose: Choose
    uses_prefix: bool = False


def round_robin(groups: Sequence[Candidate], bounds: Bounds) -> Candidate:
    """Return the group whose turn is the longest ago."""
    return min(groups, key=lambda group: (group.last_dispatch, group.dp_group))


def least_loaded(groups: Sequence[Candidate], bounds: Bounds) -> Candidate:
    """Return the group with the fewest requests."""
    return min(groups, key=lambda group: (group.num_jobs, group.num_tokens, *_turn(group)))


def kv_usage(groups: Sequence[Candidate], bounds: Bounds) -> Candidate:
    """Return the group with the least KV in use, reserved output included."""
    return min(_below_limit(groups), key=_use)


def prefix(groups: Sequence[Candidate], bounds: Bounds) -> Candidate:
    """Return the group that has the longest prefix, among those whose load is balanced."""
    groups = _below_limit(groups)
    most = min(group.kv_tokens for group in groups) + bounds.balance_tokens
    balanced = [group for group in groups if group.kv_tokens <= most]
    longest = max(group.prefix_tokens for group in balanced)
    if longest == 0 or longest < bounds.prefix_tokens_min:
        return min(groups, key=_use)
    return min((group for group in balanced if group.prefix_tokens == longest), key=_use)


POLICIES: dict[str, Policy] = {
    "round_robin": Policy(round_robin),
    "least_loaded": Policy(least_loaded),
    "kv_usage": Policy(kv_usage),
    "prefix": Policy(prefix, uses_prefix=True),
}


def policy(name: str) -> Policy:
    """Return the policy of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in POLICIES:
        raise ConfigError(f"gateway.policy = {name!r}: must be one of {', '.join(POLICIES)}")
    return POLICIES[name]


def _below_limit(groups: Sequence[Candidate]) -> Sequence[Candidate]:
    return [group for group in groups if not group.is_at_limit] or groups


def _use(group: Candidate) -> tuple[int, int, int, int]:
    return (group.kv_tokens, group.num_jobs, *_turn(group))


def _turn(group: Candidate) -> tuple[int, int]:
    return (group.last_dispatch, group.dp_group)
