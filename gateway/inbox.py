"""Where the deliveries for one HTTP request wait for the coroutine that writes to its client."""

from __future__ import annotations

import asyncio

from gateway.events import DeliverError, DeliverTokens, Delivery


class Inbox:
    """A bounded mailbox for all choices of one HTTP request. Event loop only.

    A client that reads too slowly fills it; then the inbox closes with an error, and whoever feeds it
    must have the requests aborted. Nobody ever waits for room, so a slow client holds up nobody else.
    """

    def __init__(self, backlog_tokens_max: int) -> None:
        self._backlog_tokens_max = backlog_tokens_max
        self._deliveries: list[tuple[int, Delivery]] = []
        self._num_tokens = 0
        self._is_closed = False
        self._arrived = asyncio.Event()

    def put(self, choice: int, delivery: Delivery) -> bool:
        """Add a delivery for a choice; False once the backlog is over its bound."""
        if self._is_closed:
            return False
        self._deliveries.append((choice, delivery))
        self._arrived.set()
        if isinstance(delivery, DeliverTokens):
            self._num_tokens += len(delivery.token_ids)
        if self._num_tokens > self._backlog_tokens_max:
            text = f"the client reads too slowly: more than {self._backlog_tokens_max} tokens wait for it"
            self._deliveries = [(choice, DeliverError(delivery.request_id, 503, "client_too_slow", text))]
            self._is_closed = True
        return not self._is_closed

    async def take(self) -> list[tuple[int, Delivery]]:
        """Wait until something is there; return all of it, in order."""
        await self._arrived.wait()
        self._arrived.clear()
        taken, self._deliveries = self._deliveries, []
        self._num_tokens = 0
        return taken
