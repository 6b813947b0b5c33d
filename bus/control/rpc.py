"""Ask once, wait for the answer with the same id, never longer than the deadline."""

from __future__ import annotations

import asyncio
from typing import TypeVar

from bus.clock import NS_PER_S, Deadline
from bus.control.messages import Message
from bus.control.sockets import Dealer
from bus.errors import RequestTimeout

Reply = TypeVar("Reply", bound=Message)


async def request(dealer: Dealer, message: Message, reply_type: type[Reply], deadline: Deadline) -> Reply:
    """Send `message` and return the reply of type `reply_type` that carries the same `request_id`.

    Other replies (late answers to earlier questions) are dropped. The dealer must have no other reader
    meanwhile.

    Raises:
        RequestTimeout: names the peer and the message; the question may or may not have been acted upon, and
            repeating it with the same id must be harmless.
    """
    question = type(message).__name__
    try:
        async with asyncio.timeout(deadline.remaining_ns() / NS_PER_S):
            await dealer.send_before(message, deadline)
            while True:
                reply = await dealer.recv()
                if isinstance(reply, reply_type) and _request_id(reply) == _request_id(message):
                    return reply
    except TimeoutError:
        raise RequestTimeout(f"{dealer.endpoint} did not answer {question} in time") from None


def _request_id(message: Message) -> object:
    return getattr(message, "request_id", None)
