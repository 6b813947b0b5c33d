"""What a heartbeat vouches for.

A heartbeat is sent by the event loop of a member. Where the work is done by another thread (a hot loop), the
event loop may run although the work does not; so the hot loop ticks a `LoopWatch`, and the heartbeat is held
back when the ticks stop. The manager counts silence and in the end kills the process
(`heartbeat.hang_timeout_ms`).
"""

from __future__ import annotations

from bus.clock import NS_PER_MS, now_ns


class LoopWatch:
    """Tells whether a hot loop has turned lately.

    The loop calls `tick` at every turn, also while it waits for work (so its waits must be shorter than
    `stall_ms`). The event loop calls the object. Ticks are single stores of an int: no lock is needed.
    """

    def __init__(self, stall_ms: int) -> None:
        self._stall_ns = stall_ms * NS_PER_MS
        self._last_tick_ns = now_ns()

    def tick(self) -> None:
        """Say that the loop turns. Called by the hot loop's thread."""
        self._last_tick_ns = now_ns()

    def __call__(self) -> bool:
        """Tell whether the last tick is younger than `stall_ms`."""
        return now_ns() - self._last_tick_ns < self._stall_ns
