"""What an attention worker decides when an expert worker is away: which incarnation to talk to.

When an expert worker dies, the *exchange* of the layer at hand is sent again under a higher attempt, once the worker's
next incarnation is ready: everything before it still stands.

`ExpertDirectory` states per rank: connected (incarnation known and alive), lost (died; a newer incarnation is
awaited). Invariant: the incarnation of a rank never goes down.
"""

from __future__ import annotations

from bus.control.messages import Member, PodMap


class ExpertDirectory:
    """Which incarnation of each expert worker to talk to."""

    def __init__(self, num_expert_ranks: int):
        """All ranks start out as not connected."""
        self._connected = [0] * num_expert_ranks
        self._lost = [0] * num_expert_ranks  # highest incarnation known to have died

    def lost(self, rank: int, incarnation: int) -> None:
        """Note that `incarnation` of `rank` has died."""
        self._lost[rank] = max(self._lost[rank], incarnation)

    def connected(self, rank: int, incarnation: int) -> None:
        """Note that the segment of `incarnation` is attached."""
        self._connected[rank] = max(self._connected[rank], incarnation)

    def to_connect(self, pod_map: PodMap) -> list[Member]:
        """Return the ready expert workers of `pod_map` that are newer than what is connected."""
        return [
            m
            for m in pod_map.members
            if m.service == "expert"
            and m.index < len(self._connected)
            and m.state == "ready"
            and m.segment
            and m.incarnation > max(self._connected[m.index], self._lost[m.index])
        ]

    def missing(self) -> list[int]:
        """Return the ranks without a living connection, ascending."""
        return [r for r, (c, gone) in enumerate(zip(self._connected, self._lost, strict=True)) if c <= gone]

    def check_invariants(self) -> None:
        """Raise AssertionError when a rank is both connected and lost at incarnations that cannot be."""
        for rank, (connected, lost) in enumerate(zip(self._connected, self._lost, strict=True)):
            assert connected >= 0 and lost >= 0, rank
