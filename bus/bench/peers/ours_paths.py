"""Point-to-point by one path whatever the size: what section `thresholds` compares.

ring            through the ring: two copies
read            read by the receiver in the sender's memory: one copy, by the receiver alone
read, shared    the same, and the sender may take part in the copy
app: ring, pull, pull, shared
                the array lies in the sender's app area: through the ring, pulled, pulled with the sender's part
isend: pull, pull in lanes
                pulled from a sender that has no part in it, by the receiver's thread alone or by several
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from bus.bench import pingpong
from bus.bench.meeting import Meeting, Message
from bus.bench.peers.ours import CHUNKED, EVENT, TIMEOUT_MS, Copying, Opener
from bus.bench.pingpong import Ends, Link
from bus.clock import Deadline
from bus.config import XcclConfig
from bus.memory.layout import align_up
from bus.memory.wait import Adaptive
from bus.priority import prioritise

NEVER = 1 << 40
NUM_LANES = 2


@dataclass(frozen=True, slots=True)
class Path:
    """settings: of `P2p`, so that every array takes the path. in_app: the array lies in the app area."""

    settings: dict[str, Any] = field(default_factory=dict)
    in_app: bool = False
    is_async: bool = False
    num_lanes: int = 1


_RING: dict[str, Any] = {"pull_bytes_min": NEVER, "read_bytes_min": None}
_READ: dict[str, Any] = {"pull_bytes_min": NEVER, "read_bytes_min": 1}
_PULL: dict[str, Any] = {"pull_bytes_min": 1, "read_bytes_min": NEVER}
_ALONE: dict[str, Any] = {"shared_bytes_min": None}
_SHARED: dict[str, Any] = {"shared_bytes_min": 1}

PATHS = {
    "ring": Path(_RING),
    "read": Path(_READ | _ALONE),
    "read, shared": Path(_READ | _SHARED),
    "app: ring": Path(_RING, in_app=True),
    "app: pull": Path(_PULL | _ALONE, in_app=True),
    "app: pull, shared": Path(_PULL | _SHARED, in_app=True),
    "isend: pull": Path(_PULL, in_app=True, is_async=True),
    "isend: pull in lanes": Path(_PULL, in_app=True, is_async=True, num_lanes=NUM_LANES),
}


class Async(Copying):
    """`isend` and `wait` instead of `send`."""

    def ends(self, num_bytes: int) -> Ends:
        """See `Link`."""
        ends, p2p, peer = Copying.ends(self, num_bytes), self._p2p, self._peer
        deadline, (out, *_) = Deadline.after_ms(TIMEOUT_MS), ends.send_arguments

        def send() -> None:
            p2p.isend(out, peer, EVENT).wait(deadline)

        return replace(ends, send=send, send_arguments=())


def open_pairs(meeting: Meeting, stack: ExitStack, size_max: int, options: Message) -> dict[str, Link]:
    """Return the links with the partner, an endpoint for each path."""
    config = XcclConfig(**options["xccl"])
    prioritise(config.slice_us, config.nice)
    links: dict[str, Link] = {}

    def meet() -> None:
        first = next(iter(links.values()))
        pingpong.meeting(first, meeting.rank & 1)()

    for number, (name, path) in enumerate(PATHS.items()):
        links[name] = _open(meeting, stack, size_max, config, number, path, meet)
    return links


def _open(
    meeting: Meeting,
    stack: ExitStack,
    size_max: int,
    config: XcclConfig,
    number: int,
    path: Path,
    meet: Callable[[], None],
) -> Link:
    settings = {name: getattr(config, name) for name in config.__struct_fields__}
    opener = Opener(meeting, stack, XcclConfig(**settings | {"num_lanes": path.num_lanes}))
    app_bytes = align_up(size_max, 4096) if path.in_app else 0
    strategy = Adaptive(config.spin_us * 1_000)
    endpoint, p2p, peer = opener.open(f"path{number}", strategy, CHUNKED, app_bytes, **path.settings)
    own = None
    if path.in_app:
        own = endpoint.segment.array(endpoint.segment.layout.app_offset, (size_max,), np.uint8)
    return (Async if path.is_async else Copying)(p2p, peer, size_max, own, meet)
