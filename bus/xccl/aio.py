"""The data plane in an event loop: `await bridge.recv(...)`.

A thread sleeps on the endpoint's doorbell while somebody awaits, and tells the loop of every ring; the loop then
makes progress on the handles. All work on links is done in the loop's thread, so the endpoint keeps its one
thread; the bridge's own thread touches nothing but the doorbell.

    idle --first await--> watching --last result--> idle --close--> ended
"""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from bus.clock import NS_PER_MS, Deadline, now_ns
from bus.errors import BusError
from bus.memory.wait import next_look_ns
from bus.xccl.endpoint import Endpoint, Rank
from bus.xccl.handle import RecvHandle, SendHandle
from bus.xccl.p2p import P2p

_FOREVER = 1 << 63


@dataclass(eq=False)
class _Pending:
    handle: SendHandle | RecvHandle
    deadline: Deadline
    future: asyncio.Future[None]


class AsyncP2p:
    """Awaitable `send` and `recv` of a `P2p`. Made and used in one running event loop.

    Args:
        endpoint, p2p: owned and closed by the caller, after `close`.
    """

    def __init__(self, endpoint: Endpoint, p2p: P2p) -> None:
        self._endpoint, self._p2p = endpoint, p2p
        self._loop = asyncio.get_running_loop()
        self._pending: list[_Pending] = []
        self._is_wanted = threading.Event()
        self._is_closed = False
        self._is_scheduled = False
        self._sleeps_until = _FOREVER
        self._thread = threading.Thread(target=self._watch, name="xccl-aio", daemon=True)
        self._thread.start()

    async def send(self, array: npt.NDArray[Any], peer: Rank, event_id: int, deadline: Deadline) -> None:
        """See `P2p.send`. Cancelling gives the message up unless it is wholly pushed."""
        await self._finish(self._p2p.isend(array, peer, event_id), deadline)

    async def recv(
        self, out: npt.NDArray[Any] | None, peer: Rank, event_id: int, deadline: Deadline
    ) -> npt.NDArray[Any]:
        """See `P2p.recv`. Several may wait, also for one peer: messages go to them in order."""
        handle = self._p2p.irecv(out, peer, event_id)
        await self._finish(handle, deadline)
        if handle.array is None:
            raise RuntimeError("recv: the handle is done without an array")
        return handle.array

    def close(self) -> None:
        """End the thread; whoever still awaits is cancelled. Idempotent."""
        self._is_closed = True
        self._is_wanted.set()
        self._endpoint.doorbell.ring()
        self._thread.join()
        for pending in self._pending:
            pending.future.cancel()
        self._pending.clear()

    async def _finish(self, handle: SendHandle | RecvHandle, deadline: Deadline) -> None:
        if self._is_closed:
            handle.cancel()
            raise RuntimeError("aio: the bridge is closed")
        pending = _Pending(handle, deadline, self._loop.create_future())
        self._pending.append(pending)
        if deadline.at_ns < self._sleeps_until:
            self._endpoint.doorbell.ring()  # the thread would sleep beyond it
        try:
            self._progress()
            await pending.future
        finally:
            handle.cancel()  # does nothing to one that is done
            if pending in self._pending:
                self._pending.remove(pending)

    def _progress(self) -> None:
        """Look at every handle. Runs in the loop's thread."""
        self._is_scheduled = False
        for pending in tuple(self._pending):
            if not pending.future.done():
                self._look_at(pending)
        self._pending = [pending for pending in self._pending if not pending.future.done()]
        if self._pending:
            self._is_wanted.set()
        elif not self._is_closed:
            self._is_wanted.clear()

    def _look_at(self, pending: _Pending) -> None:
        handle = pending.handle
        try:
            if handle.test():
                pending.future.set_result(None)
            elif pending.deadline.expired():
                raise self._endpoint.stalled(handle.peer, handle.event_id, "no answer before the deadline")
        except (BusError, ValueError) as error:
            pending.future.set_exception(error)

    def _watch(self) -> None:
        """Sleep until the doorbell rings, also for deaths, or a deadline has come, and tell the loop."""
        bell, poll_ns = self._endpoint.doorbell, self._endpoint.config.poll_interval_ms * NS_PER_MS
        interval_ns = poll_ns
        while True:
            self._is_wanted.wait()
            if self._is_closed:
                return
            seen = bell.seq()
            if not self._is_scheduled:
                self._is_scheduled = True
                try:
                    self._loop.call_soon_threadsafe(self._progress)
                except RuntimeError:  # the loop is closed: nobody awaits any more
                    return
            is_rung = bell.wait(seen, 0, self._sleep_ns(interval_ns)) != seen
            interval_ns = poll_ns if is_rung else next_look_ns(interval_ns, poll_ns)

    def _sleep_ns(self, interval_ns: int) -> int:
        """Return how long the thread may sleep; at least a little, for the loop may be late to end what is over."""
        now = now_ns()
        self._sleeps_until = _FOREVER  # first, so that whoever comes while we look rings
        until = min([now + interval_ns, *(pending.deadline.at_ns for pending in tuple(self._pending))])
        self._sleeps_until = until
        return max(NS_PER_MS, until - now)
