"""The sockets of the control plane: a ROUTER serves, DEALERs call it.

All of them: no linger unless asked, finite high-water marks, `IMMEDIATE` (nothing is queued for a peer that
is not connected, so a returning peer never finds stale messages), `ROUTER_MANDATORY` (a message for a peer
that is gone is an error, not silence), frames of bounded length. A frame that is not a message is dropped,
counted in `num_refused` and logged; it never ends the process. Sending never blocks and never waits: it
either succeeds at once or says that it did not.

`Router` and `Dealer` belong to the asyncio loop. `SyncDealer` is for a thread without one (a worker's hot
loop).
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import structlog
import zmq
import zmq.asyncio

from bus.clock import NS_PER_MS, Deadline
from bus.control import codec, endpoints
from bus.control.messages import Message
from bus.errors import BusError, ProtocolError, RequestTimeout, ResourceError

QUEUE_MESSAGES_MAX = 4096
_RECONNECT_MS = 20
_RECONNECT_MS_MAX = 200
_RETRY_SEND_S = 0.01
_FRAME_BYTES_MAX = codec.BODY_BYTES_MAX + 4096

log = structlog.get_logger(__name__)


class QueueFull(BusError):
    """A peer does not read: its queue holds `QUEUE_MESSAGES_MAX` messages. Nothing was queued."""


class Router:
    """The serving end. Peers are known by the identity that they chose.

    Args:
        endpoint: `ipc://` address; the socket file gets mode 0600.
        expected: union of the messages that it understands.

    Raises:
        ResourceError: the address cannot be bound.
    """

    def __init__(self, endpoint: str, expected: object) -> None:
        self.endpoint = endpoint
        self.num_refused = 0
        self._expected = expected
        self._socket: zmq.asyncio.Socket = zmq.asyncio.Context.instance().socket(zmq.ROUTER)
        _configure(self._socket)
        self._socket.set(zmq.ROUTER_MANDATORY, 1)
        self._socket.set(zmq.ROUTER_HANDOVER, 1)  # a reconnected peer takes its identity with it
        try:
            self._socket.bind(endpoint)
            endpoints.socket_path(endpoint).chmod(0o600)
        except (zmq.ZMQError, OSError) as error:
            self._socket.close(linger=0)
            raise ResourceError(f"cannot serve {endpoint}: {error}") from None

    async def recv(self) -> tuple[bytes, Message]:
        """Wait for the next well-formed message; return it with its sender's identity."""
        while True:
            identity, *frames = await self._socket.recv_multipart()
            try:
                return identity, codec.from_frames(frames, self._expected)
            except ProtocolError as error:
                self.num_refused += 1
                peer = _printable(identity)
                log.warning("message refused", endpoint=self.endpoint, peer=peer, error=str(error))

    def send(self, identity: bytes, message: Message) -> bool:
        """Queue `message` for a peer, at once.

        Returns:
            False when no such peer is connected; the message is dropped.

        Raises:
            QueueFull: the peer is connected but does not read.
        """
        try:
            _send_now(self._socket, [identity, *codec.to_frames(message)])
        except zmq.Again:
            lost = f"{type(message).__name__} not sent"
            raise QueueFull(f"{_printable(identity)} does not read: {lost}") from None
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            log.debug("peer gone", peer=_printable(identity), message=type(message).__name__)
            return False
        return True

    def close(self, linger_ms: int = 0) -> None:
        """Close, giving queued messages `linger_ms` to leave, and remove the socket file."""
        if not self._socket.closed:
            self._socket.close(linger=linger_ms)
            with contextlib.suppress(FileNotFoundError):  # ZeroMQ removes it too, a little later
                endpoints.socket_path(self.endpoint).unlink()


class Dealer:
    """The calling end. It connects in the background and reconnects for ever; `close` ends that.

    Args:
        endpoint: the ROUTER's address.
        identity: how the ROUTER shall know us, e.g. `b"expert-2.7"`; empty = anonymous.
        expected: union of the messages that it understands.
    """

    def __init__(self, endpoint: str, identity: bytes, expected: object) -> None:
        self.endpoint = endpoint
        self.num_refused = 0
        self._expected = expected
        self._socket: zmq.asyncio.Socket = zmq.asyncio.Context.instance().socket(zmq.DEALER)
        _connect(self._socket, endpoint, identity)

    async def recv(self) -> Message:
        """Wait for the next well-formed message."""
        while True:
            frames = await self._socket.recv_multipart()
            try:
                return codec.from_frames(frames, self._expected)
            except ProtocolError as error:
                self.num_refused += 1
                log.warning("message refused", endpoint=self.endpoint, error=str(error))

    def send(self, message: Message) -> bool:
        """Queue `message`, at once. False, and nothing is queued: the peer is away or does not read."""
        try:
            _send_now(self._socket, codec.to_frames(message))
        except zmq.Again:
            return False
        return True

    async def send_before(self, message: Message, deadline: Deadline) -> None:
        """Queue `message` as soon as the peer takes it.

        Raises:
            RequestTimeout: it did not until `deadline`; nothing was queued.
        """
        while not self.send(message):
            if deadline.expired():
                raise RequestTimeout(f"{self.endpoint} took no {type(message).__name__} in time")
            await asyncio.sleep(_RETRY_SEND_S)

    def close(self, linger_ms: int = 0) -> None:
        """Close, giving queued messages `linger_ms` to leave."""
        if not self._socket.closed:
            self._socket.close(linger=linger_ms)


class SyncDealer:
    """A `Dealer` for one thread that has no event loop. Must be used by the thread that made it."""

    def __init__(self, endpoint: str, identity: bytes, expected: object) -> None:
        self.endpoint = endpoint
        self.num_refused = 0
        self._expected = expected
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        _connect(self._socket, endpoint, identity)

    def recv(self, timeout_ms: int) -> Message | None:
        """Return the next message, or None if none comes within `timeout_ms`. Releases the GIL."""
        deadline = Deadline.after_ms(timeout_ms)
        while self._socket.poll(deadline.remaining_ns() // NS_PER_MS, zmq.POLLIN):
            try:
                return codec.from_frames(self._socket.recv_multipart(), self._expected)
            except ProtocolError as error:
                self.num_refused += 1
                log.warning("message refused", endpoint=self.endpoint, error=str(error))
        return None

    def send(self, message: Message, timeout_ms: int = 0) -> bool:
        """Queue `message`, waiting up to `timeout_ms` for a peer that takes it. False: it was not queued."""
        frames = codec.to_frames(message)
        if timeout_ms and not self._socket.poll(timeout_ms, zmq.POLLOUT):
            return False
        try:
            self._socket.send_multipart(frames, flags=zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def close(self, linger_ms: int = 0) -> None:
        """Close, giving queued messages `linger_ms` to leave."""
        if not self._socket.closed:
            self._socket.close(linger=linger_ms)


def _configure(socket: zmq.Socket[Any]) -> None:
    socket.set(zmq.LINGER, 0)
    socket.set(zmq.SNDHWM, QUEUE_MESSAGES_MAX)
    socket.set(zmq.RCVHWM, QUEUE_MESSAGES_MAX)
    socket.set(zmq.MAXMSGSIZE, _FRAME_BYTES_MAX)
    socket.set(zmq.IMMEDIATE, 1)


def _connect(socket: zmq.Socket[Any], endpoint: str, identity: bytes) -> None:
    _configure(socket)
    socket.set(zmq.RECONNECT_IVL, _RECONNECT_MS)
    socket.set(zmq.RECONNECT_IVL_MAX, _RECONNECT_MS_MAX)
    if identity:
        socket.set(zmq.IDENTITY, identity)
    socket.connect(endpoint)


def _send_now(socket: zmq.asyncio.Socket, frames: list[bytes]) -> None:
    # With NOBLOCK the future is done on return: either the message is queued or it carries the error.
    done: asyncio.Future[object] = socket.send_multipart(frames, flags=zmq.NOBLOCK)  # type: ignore[assignment]
    done.result()


def _printable(identity: bytes) -> str:
    return identity.decode("ascii", "backslashreplace")
