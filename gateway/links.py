"""Links to schedulers over ZeroMQ."""

from __future__ import annotations

from bus.control.link import Link
from bus.control.messages import Message, RequestAccepted, RequestFailed, RequestRejected, TokensGenerated
from gateway.dispatcher import Listener

_FROM_SCHEDULER = RequestAccepted | RequestRejected | TokensGenerated | RequestFailed


def scheduler_link(endpoint: str, identity: bytes, listener: Listener) -> Link:
    """Return a DEALER to one incarnation of a scheduler."""

    def listen(message: Message) -> None:
        assert isinstance(message, _FROM_SCHEDULER)  # the codec refuses others
        listener(message)

    return Link(endpoint, identity, _FROM_SCHEDULER, listen)
