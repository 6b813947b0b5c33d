"""Who lives where: the address table of a process, shared by all ranks that it hosts.

Every rank of a pod has an entry; looking one up is one dictionary access, whatever the size of the pod. A segment is
mapped when a rank first needs it and once per process, so a rank that talks to a handful of peers maps a handful of
segments. Life cycle: 1. `learn` is fed by the pod map. 2. `segment(rank)` maps at first use. 3. A newer
incarnation, told by `learn`, replaces the address; the old mapping is dropped. 4. `close` unmaps everything.
"""

from __future__ import annotations

from bus.errors import PeerDied
from bus.memory.segment import Segment
from bus.xccl.endpoint import Address, Rank


class AddressTable:
    """Addresses of ranks, and the mappings of those that were needed. Used by one thread."""

    def __init__(self) -> None:
        self._addresses: dict[Rank, Address] = {}
        self._mapped: dict[Rank, Segment] = {}
        self.version = 0  # rises with every address learned, so that users know when to look again

    def learn(self, rank: Rank, incarnation: int, segment: str) -> bool:
        """Note where `rank` lives; False when a newer or the same incarnation is known."""
        known = self._addresses.get(rank)
        if known is not None and known.incarnation >= incarnation:
            return False
        self._addresses[rank] = Address(incarnation, segment)
        self.version += 1
        self.forget(rank)
        return True

    def incarnation(self, rank: Rank) -> int:
        """Return the newest known incarnation of `rank`, 0 when none is known."""
        address = self._addresses.get(rank)
        return address.incarnation if address is not None else 0

    def segment(self, rank: Rank, *, asker: str, event_id: int = 0) -> Segment:
        """Return the mapped segment of `rank`'s newest incarnation; the table keeps and closes it.

        Raises:
            PeerDied: no address is known, or its segment is gone or not published. Nothing was done.
            SegmentCorrupt: the segment's header is wrong.
        """
        mapped = self._mapped.get(rank)
        if mapped is not None:
            return mapped
        address = self._addresses.get(rank)
        if address is None:
            raise PeerDied("no address is known", rank=asker, peer=str(rank), event_id=event_id)
        try:
            mapped = Segment.attach(address.segment)
        except FileNotFoundError as error:
            raise PeerDied("its segment is gone", rank=asker, peer=str(rank), event_id=event_id) from error
        self._mapped[rank] = mapped
        return mapped

    def alive(self, rank: Rank) -> bool:
        """Tell whether the newest known incarnation of `rank` runs (one system call)."""
        try:
            return self.segment(rank, asker="-").owner_alive()
        except PeerDied:
            return False

    def forget(self, rank: Rank) -> None:
        """Drop the mapping of `rank`, if there is one; its address stays."""
        mapped = self._mapped.pop(rank, None)
        if mapped is not None:
            mapped.close()

    @property
    def num_mapped(self) -> int:
        """Segments mapped now."""
        return len(self._mapped)

    def close(self) -> None:
        """Unmap everything."""
        for rank in tuple(self._mapped):
            self.forget(rank)
