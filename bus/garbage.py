"""When a process of the token's path looks for garbage: by hand, not whenever Python's counters say so.

Theory. Python looks for reference cycles in the middle of whatever allocates, and every so often through all objects
that there are: pauses of milliseconds, which a whole pod then waits for at its next exchange (the paper's section 10).
Here, what start-up has left is frozen, automatic collection is off, and the loop itself collects when it has just
handed its work on: young objects every few hundred turns, all of them rarely, or when nothing is to do.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable

TURNS_PER_COLLECTION = 512
YOUNG_PER_FULL = 32
YOUNG, FULL = 1, 2  # generations
IDLE_ALLOCATIONS = 500  # fewer new objects than that are not worth waking for
BUSY_ALLOCATIONS = 50_000  # of a loop that does not count its turns
WATCH_INTERVAL_S = 1.0


class ManagedGc:
    """The collector of one process; `turn` and `idle` are called by the one thread whose time matters.

    Args:
        mode: "managed", or "auto" = Python's own way: every method does nothing.
    """

    def __init__(self, mode: str) -> None:
        self._is_managed = mode == "managed"
        self._is_on = False
        self._num_turns = 0
        self._num_young = 0
        self.num_collections = 0

    def take_over(self) -> None:
        """Start-up is over: freeze what is there, turn automatic collection off. Takes some ten milliseconds."""
        if not self._is_managed or self._is_on:
            return
        gc.collect()
        gc.freeze()
        gc.disable()
        self._is_on = True

    def turn(self) -> None:
        """One turn of the loop is done and handed on: collect if many have passed."""
        if not self._is_on:
            return
        self._num_turns += 1
        if self._num_turns >= TURNS_PER_COLLECTION:
            self._collect_some()

    def idle(self) -> None:
        """Nothing is to do: collect everything, if anything was allocated that is worth it."""
        if self._is_on and gc.get_count()[0] >= IDLE_ALLOCATIONS:
            self._collect(FULL)

    async def watch(self, is_idle: Callable[[], bool]) -> None:
        """Collect for an event loop that does not count turns: when idle, or much was allocated. Never returns."""
        while True:
            await asyncio.sleep(WATCH_INTERVAL_S)
            if is_idle():
                self.idle()
            elif self._is_on and gc.get_count()[0] >= BUSY_ALLOCATIONS:
                self._collect_some()

    def _collect_some(self) -> None:
        self._num_young += 1
        self._collect(FULL if self._num_young >= YOUNG_PER_FULL else YOUNG)

    def _collect(self, generation: int) -> None:
        gc.collect(generation)
        self._num_turns = 0
        self._num_young = 0 if generation == FULL else self._num_young
        self.num_collections += 1
