"""A DEALER to one incarnation of a peer, and the task that reads from it. Event loop only."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import UnionType

from bus.control.messages import Message
from bus.control.sockets import Dealer
from bus.shutdown import EXIT_FAILURE, current_shutdown


class Link:
    """Connects at once, and hands each message to `listener`; messages of no kind of `accepts` are refused.

    If reading fails, the process ends: a peer that is never heard again would be worse.
    """

    def __init__(
        self,
        endpoint: str,
        identity: bytes,
        accepts: type[Message] | UnionType,
        listener: Callable[[Message], None],
    ) -> None:
        self._dealer = Dealer(endpoint, identity, accepts)
        self._listener = listener
        self._task = asyncio.create_task(self._receive())
        self._task.add_done_callback(_end_process_on_failure)

    def send(self, message: Message) -> bool:
        """Queue at once; False when the peer is not connected or does not read."""
        return self._dealer.send(message)

    def close(self) -> None:
        """Stop reading and close the socket."""
        self._task.cancel()
        self._dealer.close()

    async def _receive(self) -> None:
        while True:
            self._listener(await self._dealer.recv())


def _end_process_on_failure(task: asyncio.Task[None]) -> None:
    error = None if task.cancelled() else task.exception()
    shutdown = current_shutdown.get()
    if error is not None and shutdown is not None:
        shutdown.request(EXIT_FAILURE, f"a link to a peer failed: {error!r}")
