"""Socket, locks and clock around a pure core: what schedulers of every kind share.

Three tasks: `_listen` turns messages into events, `_decide` hands all events that have come together to the core
and has its instructions carried out, `_watch` looks at locks and time.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from typing import Generic, TypeVar

import structlog

from bus.config import PodConfig
from bus.control.messages import Message
from bus.control.sockets import QueueFull, Router
from bus.garbage import ManagedGc
from services.peers import Peer

IDLE_WATCH_FACTOR = 4  # how much rarer an idle process looks at locks
EVENTS_MAX = 256  # events that wait for the core; then it gets its turn

Event = TypeVar("Event")

log = structlog.get_logger(__name__)


class CoreProcess(ABC, Generic[Event]):
    """Subclasses say what messages mean (`event_of`), what to do with events (`decide`), whom to watch (`watch`)."""

    def __init__(self, config: PodConfig, router: Router) -> None:
        self.num_refused = 0
        self._config = config
        self._router = router
        self._events: list[Event] = []
        self._has_events = asyncio.Event()
        self._garbage = ManagedGc(config.runtime.gc)

    @abstractmethod
    def event_of(self, peer: Peer, message: Message) -> Event | None:
        """Return what the message means, None when this peer may not say it."""

    @abstractmethod
    def decide(self, events: list[Event]) -> None:
        """Hand events to the core and do what it says."""

    @abstractmethod
    def watch(self) -> None:
        """Look at locks and time; called now and then."""

    @property
    @abstractmethod
    def is_idle(self) -> bool:
        """Whether nobody waits for a death to be noticed: the pod map tells of it, or the next plan that fails."""

    async def run(self) -> None:
        """Serve until cancelled."""
        self._garbage.take_over()
        async with asyncio.TaskGroup() as group:
            group.create_task(self._listen())
            group.create_task(self._decide())
            group.create_task(self._watch())

    def post(self, event: Event) -> None:
        """Have the core hear of `event` soon, together with everything else that has come by then."""
        self._events.append(event)
        self._has_events.set()

    def num_refused_messages(self) -> int:
        """Messages that were none, or from somebody who may not say them."""
        return self.num_refused + self._router.num_refused

    def send(self, identity: bytes, message: Message) -> bool:
        """Send at once; False when the peer is gone or does not read."""
        try:
            return self._router.send(identity, message)
        except QueueFull as error:
            log.warning("peer does not read", error=str(error))
            return False

    async def _listen(self) -> None:
        while True:
            # Does not yield while messages are there, so those that came together share a step.
            identity, message = await self._router.recv()
            peer = Peer.parse(identity)
            event = self.event_of(peer, message) if peer is not None else None
            if event is None:
                self.num_refused += 1
                log.warning("message refused", peer=repr(identity), message=type(message).__name__)
                continue
            self.post(event)
            if len(self._events) >= EVENTS_MAX:
                await asyncio.sleep(0)

    async def _decide(self) -> None:
        while True:
            await self._has_events.wait()
            self._has_events.clear()
            events, self._events = self._events, []
            self.decide(events)
            self._garbage.turn()

    async def _watch(self) -> None:
        interval_s = self._config.heartbeat.lock_poll_interval_ms / 1000
        while True:
            self.watch()
            if self.is_idle:
                self._garbage.idle()
            await asyncio.sleep(interval_s * (IDLE_WATCH_FACTOR if self.is_idle else 1))
