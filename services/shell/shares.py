"""Who computes how many tokens of the next step: how long prompts and short ones share a worker. Pure.

Theory. The step's budget goes to whoever lacks the least, so a short prompt passes a long one that is under way.
The oldest alone is sure of a share of `1 / OLDEST_SHARE`, however short the others are: whoever waits becomes the
oldest some time, so nobody starves, and a long prompt takes at most that share from the short ones.
"""

from __future__ import annotations

from collections.abc import Sequence

OLDEST_SHARE = 4


def chunked_shares(num_missing: Sequence[int], budget: int) -> list[int]:
    """Return how many of its missing tokens each prompt gets, the oldest first; the budget is used up if possible.

    Args:
        num_missing: tokens that each prompt lacks, in order of admission, all at least 1.
        budget: tokens of the step, at least 1.
    """
    shares = [0] * len(num_missing)
    if not shares:
        return shares
    shares[0] = min(num_missing[0], max(1, budget // OLDEST_SHARE))
    left = budget - shares[0]
    for index in sorted(range(len(shares)), key=lambda one: (num_missing[one], one)):
        extra = min(num_missing[index] - shares[index], left)
        shares[index] += extra
        left -= extra
    return shares


def whole_shares(num_missing: Sequence[int], budget: int) -> list[int]:
    """As `chunked_shares`, but each prompt gets all that it lacks, or nothing; the oldest always gets it."""
    shares = [0] * len(num_missing)
    if not shares:
        return shares
    shares[0] = num_missing[0]
    left = budget - shares[0]
    for index in sorted(range(1, len(shares)), key=lambda one: (num_missing[one], one)):
        if num_missing[index] > left:
            break
        shares[index] = num_missing[index]
        left -= num_missing[index]
    return shares
