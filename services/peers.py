"""Who speaks to a ROUTER: the identities of its peers, and whether one of them still lives."""

from __future__ import annotations

import re
from dataclasses import dataclass

from bus.config import PodConfig
from bus.control import endpoints
from bus.control.lock import is_locked, read_owner

_IDENTITY = re.compile(rb"(gateway|scheduler|attention|prefill)-(\d{1,4})\.(\d{1,12})", re.ASCII)


@dataclass(frozen=True, slots=True)
class Peer:
    """One incarnation of a member."""

    service: str
    index: int
    incarnation: int

    def __str__(self) -> str:
        return f"{self.service}-{self.index}.{self.incarnation}"

    @property
    def identity(self) -> bytes:
        """What its DEALER calls itself."""
        return str(self).encode()

    @classmethod
    def parse(cls, identity: bytes) -> Peer | None:
        """Return the peer that calls itself so, None for strangers."""
        match = _IDENTITY.fullmatch(identity)
        if match is None:
            return None
        peer = cls(match[1].decode(), int(match[2]), int(match[3]))
        return peer if peer.identity == identity else None  # `gateway-00.1` is nobody


def has_ended(config: PodConfig, peer: Peer) -> bool:
    """Tell whether this incarnation's process has ended: ask its owner lock. Needs no manager."""
    path = endpoints.lock_path(config, peer.service, peer.index)
    # The record first, then the lock: the other way round, a successor that starts in between would be taken
    # for the dead one.
    owner = read_owner(path)
    if owner is None or owner.incarnation > peer.incarnation:
        return True
    return owner.incarnation == peer.incarnation and not is_locked(path)
