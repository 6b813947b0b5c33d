"""Handles of messages under way: `isend` and `irecv` return at once, `test` and `wait` carry them on.

Nothing happens behind the caller's back: progress is made inside `test` and `wait` of any handle of the same
channel, in the order in which the handles were made.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy.typing as npt

from bus.clock import NS_PER_MS, Deadline, now_ns
from bus.errors import PeerDied, PeerStalled, XcclError
from bus.memory.segment import Segment
from bus.memory.wait import next_look_ns
from bus.xccl.channel import NOW, Receiver, Sender
from bus.xccl.endpoint import Endpoint, Rank


class Handle(Protocol):
    """What `isend` and `irecv` return."""

    peer: Rank
    event_id: int

    def test(self) -> bool:
        """Make progress without waiting; tell whether the message is done. Raises its error."""

    def wait(self, deadline: Deadline) -> Any:
        """Wait until it is done. Raises its error, PeerStalled at the deadline."""

    def cancel(self) -> bool:
        """Give it up; tell whether that was in time."""


class _LockWatch:
    """Looks at the peer's owner lock when a death is told, and now and then, however often `test` is called."""

    def __init__(self, endpoint: Endpoint, peer: Rank, event_id: int) -> None:
        self._endpoint, self._peer, self._event_id = endpoint, peer, event_id
        self._poll_ns = self._interval_ns = endpoint.config.poll_interval_ms * NS_PER_MS
        self._at_ns = now_ns() + self._interval_ns
        self._alarms_seen = endpoint.segment.num_alarms() - 1  # the first time nobody has looked yet

    def look(self, segment: Segment | None) -> PeerDied | None:
        """Return the error if the incarnation of `segment`, or of the newest address, has ended."""
        now, num_alarms = now_ns(), self._endpoint.segment.num_alarms()
        if now < self._at_ns and num_alarms == self._alarms_seen:
            return None
        if now >= self._at_ns:
            self._interval_ns = next_look_ns(self._interval_ns, self._poll_ns)
        self._at_ns, self._alarms_seen = now + self._interval_ns, num_alarms
        try:
            segment = segment or self._endpoint.peer(self._peer, self._event_id)
            self._endpoint.check_alive(self._peer, segment, self._event_id)
        except PeerDied as error:
            return error
        return None


class SendHandle:
    """A message that is being sent. The array must not change before the handle is done."""

    def __init__(
        self, endpoint: Endpoint, channel: Sender, peer: Rank, array: npt.NDArray[Any], event_id: int
    ) -> None:
        self._endpoint, self._channel = endpoint, channel
        self.peer, self.event_id = peer, event_id
        self._array: npt.NDArray[Any] | None = array
        self._watch = _LockWatch(endpoint, peer, event_id)
        self._is_started = False
        self._drops = 0  # messages that the receiver had given up when this one began
        self._segment: Segment | None = None  # of the incarnation that it goes to, once it is started
        self._tail: int | None = None  # where the message ends, once it is wholly pushed
        self._error: Exception | None = None
        self._is_done = False
        channel.queue.append(self)
        push_queue(channel)

    def test(self) -> bool:
        """See `Handle`."""
        if self._is_done:
            return True
        death = self._watch.look(self._segment)  # before looking at what it did: that still counts
        push_queue(self._channel)
        if self._error is not None:
            raise self._error
        if self._is_started and self._channel.segment is not self._segment:
            raise self._endpoint.died(self.peer, self.event_id, "a newer incarnation has replaced it")
        if self._tail is not None and self._channel._taken(self._tail, self.event_id, self._drops):
            self._is_done = True
            return True
        if death is not None:
            if self in self._channel.queue:
                self._fail(death)  # the next message must not wait behind it
            raise death
        return False

    def wait(self, deadline: Deadline) -> None:
        """See `Handle`."""
        while not self.test():
            self._wait_for_news(deadline, "it has not acknowledged")

    def push(self, deadline: Deadline) -> None:
        """Wait until the message, and all before it, are wholly pushed. Their errors stay with them."""
        while self in self._channel.queue:
            push_queue(self._channel)
            if self in self._channel.queue:
                self._wait_for_news(deadline, "its ring stayed full")

    def _wait_for_news(self, deadline: Deadline, text: str) -> None:
        queue = self._channel.queue
        if queue and not queue[0]._is_started:
            self._channel._renew(self.event_id, deadline)  # waits for the grant
        elif not self._channel._wait(self.event_id, deadline):
            raise self._endpoint.stalled(self.peer, self.event_id, text)

    def cancel(self) -> bool:
        """Give the message up unless it is wholly pushed; what was pushed of it is never delivered."""
        if self not in self._channel.queue:
            return False
        self._fail(
            PeerStalled("cancelled", rank=str(self._endpoint.me), peer=str(self.peer), event_id=self.event_id)
        )
        return True

    def _fail(self, error: Exception) -> None:
        self._error, self._array = error, None
        self._channel.queue.remove(self)
        if self._is_started:
            self._channel._abandon()

    def _push(self) -> bool:
        """Push what fits. True: all of it."""
        if not self._is_started:
            try:
                self._channel._start(self._array, self.event_id, NOW)
            except PeerStalled:  # no grant yet
                return False
            self._is_started, self._segment = True, self._channel.segment
            self._drops = self._channel._drops(self.event_id)
        if not self._channel._advance():
            return False
        self._tail, self._array = self._channel.tail, None
        self._channel.queue.popleft()
        return True


def push_queue(channel: Sender) -> None:
    """Push the queued messages of a channel as far as its ring has room. Errors stay with their handle."""
    while channel.queue:
        handle = channel.queue[0]
        try:
            if not handle._push():
                return
        except (XcclError, ValueError) as error:
            handle._fail(error)


class RecvHandle:
    """A message that is being received. `array` is set once it is done."""

    def __init__(
        self, endpoint: Endpoint, channel: Receiver, peer: Rank, out: npt.NDArray[Any] | None, event_id: int
    ) -> None:
        self._endpoint, self._channel = endpoint, channel
        self.peer, self.event_id = peer, event_id
        self._out = out
        self._watch = _LockWatch(endpoint, peer, event_id)
        self._is_cancelled = False
        self.array: npt.NDArray[Any] | None = None
        channel.queue.append(self)

    def test(self) -> bool:
        """See `Handle`. A message that is refused (EventMismatch, Truncated, ValueError) stays, as does the handle."""
        queue = self._channel.queue
        if self._is_cancelled:
            raise self._endpoint.stalled(self.peer, self.event_id, "cancelled")
        death = self._watch.look(None)  # before looking at what arrived: that is received first
        while self.array is None:
            first = queue[0]
            try:
                array = self._channel._advance(first._out, first.event_id, NOW)
            except (XcclError, ValueError):
                if first is self:
                    raise
                return False
            if array is None:
                if death is not None:
                    raise death
                return False
            first.array = array
            queue.popleft()
        return True

    def wait(self, deadline: Deadline) -> npt.NDArray[Any]:
        """See `Handle`. Returns the array."""
        while not self.test():
            if not self._channel._wait(self.event_id, deadline):
                raise self._endpoint.stalled(self.peer, self.event_id, "nothing arrived")
        assert self.array is not None
        return self.array

    def cancel(self) -> bool:
        """Give it up unless it is done; a message that had arrived in part is lost, and its sender is told."""
        queue = self._channel.queue
        if self.array is not None or self not in queue:
            return False
        if queue[0] is self:
            self._channel._abandon()
        queue.remove(self)
        self._is_cancelled = True
        return True
