"""The way to the prefill leader (the TE-shell): which incarnation to talk to, and messages that wait for its socket."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

import structlog

from bus.control.link import Link
from bus.control.messages import AbortPrefill, AddPrefill, Message, PodMap, PrefillCompleted, PrefillFailed
from bus.control.podmap import find
from services.scheduler.events import Event, LeaderFound, LeaderLost

OUTBOX_MAX = 4096
RETRY_S = 0.01

_FROM_LEADER = PrefillCompleted | PrefillFailed

log = structlog.get_logger(__name__)


class PrefillLeader:
    """Follows the pod map; posts `LeaderFound`, `LeaderLost` and what the leader says. Event loop only.

    A socket connects in the background, so a message that it does not take yet waits here, in order. When too many
    wait, the leader counts as lost until its next incarnation.
    """

    def __init__(self, identity: bytes, post: Callable[[Event], None]) -> None:
        self._identity = identity
        self._post = post
        self._link: Link | None = None
        self._incarnation = 0
        self._outbox: deque[Message] = deque()
        self._timer: asyncio.TimerHandle | None = None

    def follow(self, pod_map: PodMap) -> None:
        """Connect to a new incarnation that is ready; drop one that has ended."""
        shell = find(pod_map, "shell", 0)
        if shell is None or shell.incarnation < self._incarnation:
            return
        if self._link is not None and (shell.incarnation > self._incarnation or shell.state == "dead"):
            self._lose("it has ended")
        if shell.state == "ready" and shell.endpoint and shell.incarnation > self._incarnation:
            self._incarnation = shell.incarnation
            self._link = Link(shell.endpoint, self._identity, _FROM_LEADER, self._hear)
            log.info("prefill leader found", incarnation=shell.incarnation)
            self._post(LeaderFound())

    def send(self, message: AddPrefill | AbortPrefill) -> None:
        """Send, or keep until the socket takes it; nothing when there is no leader."""
        if self._link is None:
            return
        self._outbox.append(message)
        self._flush()
        if len(self._outbox) > OUTBOX_MAX:
            self._lose("it does not read")

    def close(self) -> None:
        """Close the socket."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._link is not None:
            self._link.close()
            self._link = None
        self._outbox.clear()

    def _flush(self) -> None:
        while self._outbox and self._link is not None and self._link.send(self._outbox[0]):
            self._outbox.popleft()
        if self._outbox and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(RETRY_S, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self._flush()

    def _hear(self, message: Message) -> None:
        assert isinstance(message, _FROM_LEADER)  # the codec refuses others
        self._post(message)

    def _lose(self, reason: str) -> None:
        log.warning("prefill leader lost", incarnation=self._incarnation, reason=reason)
        self.close()
        self._post(LeaderLost())
