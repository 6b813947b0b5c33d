"""Messages to frames and back.

A message is three frames: `b"XDS1"` (protocol and version), `b"M"` (kind), and the body, an orjson object
whose `type` names the struct. A ROUTER sees the sender's identity before them. A receiver can thus refuse a
foreign or newer peer before it parses anything. Bodies are validated into the structs of `messages`: unknown
types, unknown fields and wrong types are refused with `ProtocolError`; nothing is ever guessed.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import orjson

from bus.control.messages import Message
from bus.errors import ProtocolError

PROTOCOL = b"XDS1"
KIND_MESSAGE = b"M"
BODY_BYTES_MAX = 16 * 1024**2  # a prompt of a million token ids fits


def encode(message: Message) -> bytes:
    """Return the body frame of `message`.

    Raises:
        ProtocolError: larger than `BODY_BYTES_MAX`, or a value that JSON cannot carry.
    """
    try:
        body = orjson.dumps(msgspec.to_builtins(message))
    except (TypeError, orjson.JSONEncodeError) as error:
        raise ProtocolError(f"{type(message).__name__}: cannot be encoded: {error}") from None
    _check_length(body, type(message).__name__)
    return body


def decode(body: bytes, expected: object) -> Message:
    """Return the message in `body`.

    Args:
        body: the third frame.
        expected: a message struct or a union of them; any other type of message is refused.

    Raises:
        ProtocolError: malformed, unknown, of a wrong type, or too large.
    """
    _check_length(body, "message")
    try:
        message = msgspec.convert(orjson.loads(body), expected)
    except (orjson.JSONDecodeError, msgspec.ValidationError) as error:
        raise ProtocolError(f"refused message: {error}") from None
    if not isinstance(message, Message):
        raise ProtocolError(f"refused message: {type(message).__name__} is not a control message")
    return message


def to_frames(message: Message) -> list[bytes]:
    """Return the three frames of `message`; raises like `encode`."""
    return [PROTOCOL, KIND_MESSAGE, encode(message)]


def from_frames(frames: Sequence[bytes], expected: object) -> Message:
    """Return the message in three frames (without identity); raises like `decode`."""
    if len(frames) != 3:
        raise ProtocolError(f"refused message: {len(frames)} frames, expected 3")
    protocol, kind, body = frames
    if protocol != PROTOCOL:
        raise ProtocolError(f"refused message: protocol {protocol[:16]!r}, expected {PROTOCOL!r}")
    if kind != KIND_MESSAGE:
        raise ProtocolError(f"refused message: kind {kind[:16]!r}, expected {KIND_MESSAGE!r}")
    return decode(body, expected)


def _check_length(body: bytes, what: str) -> None:
    if len(body) > BODY_BYTES_MAX:
        raise ProtocolError(f"{what}: body of {len(body)} bytes, at most {BODY_BYTES_MAX}")
