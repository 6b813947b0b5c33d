"""The pod map as a member holds it.

The manager publishes whole snapshots with a growing epoch. A member keeps the newest it has seen; older ones,
which a dying manager may still have on the wire, are ignored. The map stays in force while the manager is
away.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from bus.clock import NS_PER_S, Deadline
from bus.control import messages
from bus.errors import RequestTimeout

Predicate = Callable[[messages.PodMap], bool]


def find(pod_map: messages.PodMap, service: str, index: int) -> messages.Member | None:
    """Return the member of that role, dead or alive; None when the map has never seen one."""
    for member in pod_map.members:
        if member.service == service and member.index == index:
            return member
    return None


class PodMapHolder:
    """The newest map, who wants to hear of a newer one, and who waits for a particular one. Event loop
    only."""

    def __init__(self, pod: str) -> None:
        self.current = messages.PodMap(pod=pod, epoch=0)
        self._listeners: list[Callable[[messages.PodMap], None]] = []
        self._changed = asyncio.Event()

    def listen(self, listener: Callable[[messages.PodMap], None]) -> None:
        """Call `listener` with every newer map from now on."""
        self._listeners.append(listener)

    def offer(self, pod_map: messages.PodMap) -> bool:
        """Take `pod_map` if its epoch is newer than the one held; tell whether it was."""
        if pod_map.epoch <= self.current.epoch:
            return False
        self.current = pod_map
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
        for listener in self._listeners:
            listener(pod_map)
        return True

    async def wait_for(self, predicate: Predicate, deadline: Deadline) -> messages.PodMap:
        """Return the first map, beginning with the one held, that satisfies `predicate`.

        Raises:
            RequestTimeout: none did until `deadline`.
        """
        try:
            async with asyncio.timeout(deadline.remaining_ns() / NS_PER_S):
                while not predicate(self.current):
                    await self._changed.wait()
                return self.current
        except TimeoutError:
            held = f"held: epoch {self.current.epoch:#x}"
            raise RequestTimeout(f"no pod map of the awaited kind in time ({held})") from None
