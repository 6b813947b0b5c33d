"""Channels: the ends of links whose hot path is C (bus/memory/_native_ends.h).

`send`, `reserve`, `commit` of a sender and `recv`, `peek`, `release` of a receiver are C methods: a message costs one
call each, or two in place. They come back to Python, to the methods with an underscore here, only to open the link to
an incarnation, to look whether the peer lives, to allocate, to lay an array over a slot for the first time, and to name
an error. A channel outlives the peer's incarnations: `learn` of a newer one marks it, and its next message opens the
link anew.

    life of a sender    (no link) --send--> waits for the grant --> open --newer incarnation--> (no link)
    life of a receiver  (no link) --recv--> writes the grant ----> open --newer incarnation--> (no link)

One thread at a time per channel; a second one gets RuntimeError.
"""

from __future__ import annotations

import contextlib
from collections import deque
from dataclasses import dataclass
from functools import lru_cache
from operator import index
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
import numpy.typing as npt

from bus.clock import NS_PER_MS, Deadline
from bus.errors import EventMismatch, PeerDied, SegmentCorrupt, XcclError
from bus.memory import _native
from bus.memory.layout import DOORBELL_OFFSET, LINK_PLACE_OFFSET, SegmentLayout
from bus.memory.ring import RingLayout
from bus.memory.segment import Segment
from bus.xccl.endpoint import P2P_ACK_LANE, P2P_DATA_LANE, Endpoint, Rank
from bus.xccl.link import await_grant, write_grant
from bus.xccl.message import (
    NUM_PARTS_MAX,
    MessageHeader,
    check_array,
    check_out,
)

if TYPE_CHECKING:
    from bus.xccl.handle import RecvHandle, SendHandle

NOW = Deadline(0)
NEVER = 2**64 - 1
NUM_BYTES_MAX = 2**63 - 1
STALLED, CORRUPT, MISMATCH = 0, 1, 2  # kinds of error, as in _native_link.h


@dataclass(frozen=True, slots=True)
class ChannelSettings:
    """What all channels of a `P2p` share."""

    message_bytes_max: int
    pull_bytes_min: int
    read_bytes_min: int | None
    shared_bytes_min: int | None


class LinkStats(TypedDict):
    """Counters of one end since it was made; waits say how each of them ended."""

    num_messages: int
    num_bytes: int
    num_chunks: int
    num_pulled: int
    num_waits: int
    num_pause_wins: int
    num_yield_wins: int
    num_sleeps: int
    num_lane_blocks: int
    num_shared_bytes: int
    num_moves: int


# Loops repeat few shapes: what follows from one is remembered.
_parse = lru_cache(maxsize=1024)(MessageHeader.parse)


@lru_cache(maxsize=1024)
def _plan(shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[bytes, bytes, int]:
    """Return tag, extension and number of bytes of an array that will be made in place."""
    if any(length < 0 for length in shape):
        raise ValueError(f"shape: {shape} has a negative dimension")
    header = MessageHeader(dtype, shape)
    check_array(np.empty((0,) * len(shape), dtype))
    tag, extension = header.pack()
    return tag, extension, header.num_bytes


def _app_area(layout: SegmentLayout) -> tuple[int, int]:
    return layout.app_offset, layout.app_offset + layout.app_bytes


def _at_least_1(size: int | None) -> int:
    return NEVER if size is None else max(1, size)


class _Hooks:
    """What both ends do in Python."""

    def __init__(self, endpoint: Endpoint, peer: Rank, settings: ChannelSettings) -> None:
        super().__init__()
        self._endpoint = endpoint
        self._peer = peer
        self._settings = settings
        self.segment: Segment | None = None

    def _parameters(self, segment: Segment, offset: int, layout: RingLayout) -> dict[str, Any]:
        endpoint, wait = self._endpoint, self._endpoint.strategy.link_wait
        settings = self._settings
        return {
            "ring_offset": offset,
            "num_slots": layout.num_slots,
            "slot_bytes": layout.slot_bytes,
            "own_bell": DOORBELL_OFFSET,
            "peer_bell": DOORBELL_OFFSET,
            "incarnation": endpoint.incarnation,
            "peer_incarnation": segment.incarnation,
            "own_app": _app_area(endpoint.segment.layout),
            "peer_app": _app_area(segment.layout),
            "pull_bytes_min": max(1, settings.pull_bytes_min),
            "read_bytes_min": _at_least_1(settings.read_bytes_min),
            "shared_bytes_min": _at_least_1(settings.shared_bytes_min),
            "message_bytes_max": settings.message_bytes_max,
            "poll_ns": endpoint.config.poll_interval_ms * NS_PER_MS,
            "pause_rounds": wait.pause_rounds,
            "yield_ns": wait.yield_ns,
            "may_sleep": wait.may_sleep,
            "copy_lanes": endpoint.config.num_lanes,
            "own_place": LINK_PLACE_OFFSET,
            "peer_place": LINK_PLACE_OFFSET,
            "is_first": endpoint.me < self._peer,
        }

    def _poll(self, event_id: int) -> PeerDied | None:
        """Called from C about every poll interval of a wait."""
        self._endpoint.segment.beat()
        if self.segment is None:
            return self._endpoint.died(self._peer, event_id, "there is no link to it")
        try:
            self._endpoint.check_alive(self._peer, self.segment, event_id)
        except PeerDied as error:
            return error
        return None

    def _error(self, kind: int, text: str, event_id: int) -> XcclError:
        if kind == STALLED:
            return self._endpoint.stalled(self._peer, event_id, text)
        cls = SegmentCorrupt if kind == CORRUPT else EventMismatch
        return cls(text, rank=str(self._endpoint.me), peer=str(self._peer), event_id=event_id)

    def _view(self, is_peers: int, offset: int, tag: bytes, extension: bytes) -> npt.NDArray[Any]:
        """Lay an array over the peer's segment, or the own one; the mapping lives as long as its views."""
        header = _parse(tag, extension, NUM_BYTES_MAX)
        segment = self.segment if is_peers else self._endpoint.segment
        assert segment is not None
        # NOTE: only `frombuffer` keeps the mapping exported. A view of the result has the whole as its base, not the
        # result, which nobody else shall reach.
        whole = np.frombuffer(segment.buf, np.uint8)
        return whole[offset : offset + header.num_bytes].view(header.dtype).reshape(header.shape)


def _counters(end: _native.SendEnd | _native.RecvEnd) -> LinkStats:
    return LinkStats(
        num_messages=end.num_messages,
        num_bytes=end.num_bytes,
        num_chunks=end.num_chunks,
        num_pulled=end.num_pulled,
        num_waits=end.num_waits,
        num_pause_wins=end.num_pause_wins,
        num_yield_wins=end.num_yield_wins,
        num_sleeps=end.num_sleeps,
        num_lane_blocks=end.num_lane_blocks,
        num_shared_bytes=end.num_shared_bytes,
        num_moves=end.num_moves,
    )


class Sender(_Hooks, _native.SendEnd):
    """The sending end towards one peer. `send(array, event_id, deadline)` is C; see `P2p.send`."""

    def __init__(self, endpoint: Endpoint, peer: Rank, settings: ChannelSettings) -> None:
        super().__init__(endpoint, peer, settings)
        self.queue: deque[SendHandle] = deque()  # not wholly pushed yet, oldest first

    def _renew(self, event_id: int, deadline: Deadline) -> None:
        """Open the link to the peer's newest incarnation; waits for its grant."""
        endpoint, peer = self._endpoint, self._peer
        self.is_retired = False  # before looking: `learn` may set it again meanwhile
        segment = endpoint.peer(peer, event_id)
        offset, layout = await_grant(endpoint, peer, segment, event_id, deadline)
        self.segment = segment
        self._open(
            endpoint.segment.buf,
            segment.buf,
            out_cell=endpoint.cell_at(segment, P2P_DATA_LANE),
            in_cell=endpoint.cell_from(peer, P2P_ACK_LANE),
            **self._parameters(segment, offset, layout),
        )

    def send_parts(self, parts: list[npt.NDArray[Any]], event_id: int, deadline: Deadline) -> None:
        """Send several arrays as one message. See `P2p.send_parts`."""
        if not 1 <= len(parts) <= NUM_PARTS_MAX:
            raise ValueError(f"parts: {len(parts)} is outside 1..{NUM_PARTS_MAX}")
        for part in parts:
            check_array(part)
        for i, part in enumerate(parts):
            self._send_part(part, event_id, deadline, len(parts) - 1 - i, i == 0)

    def _plan(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> tuple[bytes, bytes, int]:
        return _plan(tuple(map(index, shape)), np.dtype(dtype))

    def stats(self) -> LinkStats:
        """Return the counters."""
        return _counters(self)


class Receiver(_Hooks, _native.RecvEnd):
    """The receiving end from one peer. `recv(out, event_id, deadline)` is C; see `P2p.recv`."""

    def __init__(self, endpoint: Endpoint, peer: Rank, settings: ChannelSettings, ring_offset: int) -> None:
        super().__init__(endpoint, peer, settings)
        self._ring_offset = ring_offset
        self.queue: deque[RecvHandle] = deque()  # not received yet, oldest first

    def _renew(self, event_id: int, deadline: Deadline) -> None:
        """Open the link from the peer's newest incarnation: grant it the ring."""
        endpoint = self._endpoint
        self.is_retired = False  # before looking: `learn` may set it again meanwhile
        segment = endpoint.peer(self._peer, event_id)
        self.segment = segment
        self._open(
            endpoint.segment.buf,
            segment.buf,
            out_cell=endpoint.cell_at(segment, P2P_ACK_LANE),
            in_cell=endpoint.cell_from(self._peer, P2P_DATA_LANE),
            **self._parameters(segment, self._ring_offset, endpoint.p2p_ring),
        )
        write_grant(endpoint, segment, self._ring_offset)

    def _allocate(self, code: bytes, shape: tuple[int, ...]) -> npt.NDArray[Any]:
        try:
            return np.empty(shape, code.decode("ascii"))
        except TypeError as error:  # a size that NumPy does not have, such as <i3
            text = f"message header: dtype {code!r} is unknown"
            raise SegmentCorrupt(text, rank=str(self._endpoint.me), peer=str(self._peer)) from error

    def _refuse(self, event_id: int, tag: bytes, extension: bytes, out: npt.NDArray[Any] | None) -> None:
        """Raise what is wrong with a message's header, or with `out` for it."""
        rank, peer = str(self._endpoint.me), str(self._peer)
        try:
            header = MessageHeader.parse(tag, extension, self._settings.message_bytes_max)
        except ValueError as error:
            text = f"message header: {error}"
            raise SegmentCorrupt(text, rank=rank, peer=peer, event_id=event_id) from error
        if out is not None:
            check_out(out, header, rank=rank, peer=peer, event_id=event_id)

    def accept(self) -> None:
        """Grant the ring without receiving; opens the link if there is none to the newest incarnation."""
        if self.segment is None or self.is_retired:
            self._renew(0, NOW)

    def recv_parts(self, event_id: int, deadline: Deadline) -> list[npt.NDArray[Any]]:
        """Receive all parts of a message. See `P2p.recv_parts`."""
        while True:
            parts: list[npt.NDArray[Any]] = []
            while (got := self._recv_part(None, event_id, deadline, not parts)) is not None:
                parts.append(got[0])
                if got[1] == 0:
                    return parts

    def probe(self) -> tuple[int, MessageHeader] | None:
        """Return event id and header of the next message, without waiting; None if there is none."""
        found = self._look(0, NOW)
        if found is None:
            return None
        event_id, tag, extension = found
        return event_id, _parse(tag, extension, self._settings.message_bytes_max)

    def _view(self, is_peers: int, offset: int, tag: bytes, extension: bytes) -> npt.NDArray[Any]:
        """As for both ends, but read only."""
        array = super()._view(is_peers, offset, tag, extension)
        array.flags.writeable = False
        return array

    def discard(self, deadline: Deadline) -> int:
        """Drop the next message, whole or given up, and return its event id. Errors as for `recv`."""
        while (found := self._look(0, deadline)) is None:
            if not self._wait(0, deadline):
                raise self._endpoint.stalled(self._peer, 0, "nothing arrived")
        with contextlib.suppress(EventMismatch):  # only half of it came, and the next message is another one
            self.recv_parts(found[0], deadline)
        return found[0]

    def stats(self) -> LinkStats:
        """Return the counters."""
        return _counters(self)
