"""Errors of the bus. Each names the rank, the peer and the event that it concerns."""

from __future__ import annotations


class BusError(Exception):
    """Base of everything that the bus raises."""


class ConfigError(BusError):
    """A setting is wrong; the text names field, value and rule. Exit code 2."""


class ResourceError(BusError):
    """The machine lacks something (memory, a port, a name); the text says what. Exit code 3."""


class ProtocolError(BusError):
    """A control message is malformed, unknown, or of another version; it was dropped and counted."""


class RequestTimeout(BusError):
    """A control request got no reply before its deadline; the text names the peer and the message."""


class XcclError(BusError):
    """A data-plane failure between `rank` and `peer` while working on `event_id`."""

    def __init__(self, message: str, *, rank: str, peer: str, event_id: int = 0) -> None:
        super().__init__(f"{message} (rank {rank}, peer {peer}, event {event_id:#x})")
        self.rank = rank
        self.peer = peer
        self.event_id = event_id


class PeerDied(XcclError):
    """The peer's owner lock is free: its process has ended. Nothing was consumed."""


class PeerStalled(XcclError):
    """The peer lives but did not answer before the deadline. Nothing was consumed."""


class EventMismatch(XcclError):
    """The peer sent another event than the one awaited."""


class Truncated(XcclError):
    """The peer announced more bytes than the receiver's buffer or slot can hold."""


class OfferEnded(XcclError):
    """The offer was withdrawn, or fetched by somebody else, before all was copied. What was copied is worthless."""


class SegmentCorrupt(XcclError):
    """A header, offset or count read from shared memory is outside its bounds."""
