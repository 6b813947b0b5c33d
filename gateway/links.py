"""Links to schedulers over ZeroMQ."""

from __future__ import annotations

import asyncio

from bus.control.messages import Message, RequestAccepted, RequestFailed, RequestRejected, TokensGenerated
from bus.control.sockets import Dealer
from bus.shutdown import EXIT_FAILURE, current_shutdown
from gateway.dispatcher import Listener

_FROM_SCHEDULER = RequestAccepted | RequestRejected | TokensGenerated | RequestFailed


class SchedulerLink:
    """A DEALER to one incarnation of a scheduler, and the task that reads from it."""

    def __init__(self, endpoint: str, identity: bytes, listener: Listener) -> None:
        self._dealer = Dealer(endpoint, identity, _FROM_SCHEDULER)
        self._listener = listener
        self._task = asyncio.create_task(self._receive())
        self._task.add_done_callback(_end_process_on_failure)

    def send(self, message: Message) -> bool:
        """Queue at once; False when the scheduler is not connected or does not read."""
        return self._dealer.send(message)

    def close(self) -> None:
        """Stop reading and close the socket."""
        self._task.cancel()
        self._dealer.close()

    async def _receive(self) -> None:
        while True:
            message = await self._dealer.recv()
            assert isinstance(message, _FROM_SCHEDULER)  # the codec refuses others
            self._listener(message)


def _end_process_on_failure(task: asyncio.Task[None]) -> None:
    error = None if task.cancelled() else task.exception()
    shutdown = current_shutdown.get()
    if error is not None and shutdown is not None:
        shutdown.request(EXIT_FAILURE, f"a link to a scheduler failed: {error!r}")
