"""An endpoint: a rank's own segment, and its peers' segments as far as it has needed them.

Life cycle: 1. The process creates its endpoint, which creates the rank's segment under its incarnation. 2.
Every pod map is fed to `learn`: who lives where, in which incarnation. 3. `peer(rank)` maps that rank's
segment at first use, in O(1) afterwards; when `learn` has brought a newer incarnation the old mapping is
dropped and the new segment mapped. 4. `wait` sleeps on the own doorbell until a condition holds, and looks
at the awaited peers' owner locks while it waits. 5. `close` unmaps everything and removes the own segment.

Pushes are stores into a peer's segment followed by a ring of that peer's doorbell; polls read the own
segment only.

Cells: the one that rank p writes in any segment for lane l is `cell_offset(slot of p, l)`, where the slot
of p is its place in `World`, which every process of the pod derives from the same configuration. Lanes 0..2
belong to point-to-point (bus/xccl/p2p.py); lanes from `FIRST_FREE_LANE` on belong to the collectives.

Managed area: [one p2p ring per peer in `p2p_peers`] [`extra_managed_bytes`, page-aligned, from
`extra_managed_offset`].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from bus.clock import NS_PER_MS, Deadline
from bus.config import XcclConfig
from bus.errors import PeerDied, PeerStalled, SegmentCorrupt
from bus.memory.layout import DOORBELL_OFFSET, PAGE_BYTES, SegmentLayout, align_up
from bus.memory.ring import RingLayout
from bus.memory.segment import Segment, check_memory, segment_name, segment_prefix, total_bytes
from bus.memory.wait import Adaptive, Doorbell, WaitStrategy, wait_until

T = TypeVar("T")

P2P_DATA_LANE = 0
P2P_ACK_LANE = 1
P2P_GRANT_LANE = 2
FIRST_FREE_LANE = 3

COUNTER_BITS = 40


def stamp(incarnation: int, counter: int) -> int:
    """Return the sequence word of a cell's `counter`-th write: never 0, different between incarnations."""
    return (incarnation & 0xFFFFFF) << COUNTER_BITS | counter & ((1 << COUNTER_BITS) - 1)


def stamped_by(word: int, incarnation: int) -> bool:
    """Tell whether a sequence word was written by that incarnation."""
    return word >> COUNTER_BITS == incarnation & 0xFFFFFF


@dataclass(frozen=True, slots=True, order=True)
class Rank:
    """The place of a process in the pod; outlives its incarnations."""

    service: str
    index: int

    def __str__(self) -> str:
        return f"{self.service}-{self.index}"


class World:
    """All ranks of the data plane in a fixed order. A rank's place is its slot, the same in every segment."""

    def __init__(self, ranks: Iterable[Rank]) -> None:
        self.ranks = tuple(ranks)
        self._slots = {rank: slot for slot, rank in enumerate(self.ranks)}
        if len(self._slots) != len(self.ranks):
            raise ValueError(f"ranks: {', '.join(map(str, self.ranks))} must be distinct")

    @classmethod
    def of(cls, *, attention: int, expert: int) -> World:
        """Return the attention ranks followed by the expert ranks."""
        services = [("attention", attention), ("expert", expert)]
        return cls(Rank(service, index) for service, count in services for index in range(count))

    def slot(self, rank: Rank) -> int:
        """Return the slot of `rank`; KeyError if it is not of this world."""
        return self._slots[rank]

    def __len__(self) -> int:
        return len(self.ranks)


@dataclass(frozen=True, slots=True)
class Address:
    """Where a rank's current incarnation lives."""

    incarnation: int
    segment: str


class Endpoint:
    """One rank's access to the data plane.

    Args:
        pod: name of the pod, part of every segment's name.
        world: all ranks.
        me: this rank.
        incarnation: of this process, >= 1, never used before by this rank.
        config: waiting and the bound on shared bytes.
        num_lanes: cells per peer, >= FIRST_FREE_LANE.
        p2p_peers: ranks that may `send` to this one; each gets a ring.
        p2p_ring: geometry of those rings.
        extra_managed_bytes: managed area beyond the rings, at `extra_managed_offset`.
        app_bytes: size of the app area.
        strategy: how to wait; default `Adaptive` with `config.spin_us`.

    Raises:
        ResourceError: the pod's segments would exceed `config.shared_bytes_max` or the machine's memory.
        FileExistsError: this incarnation has a segment already.
        ValueError, KeyError: an argument breaks its rule.

    Threads: `learn` from any; everything else from the one thread that owns the endpoint.
    """

    def __init__(
        self,
        *,
        pod: str,
        world: World,
        me: Rank,
        incarnation: int,
        config: XcclConfig,
        num_lanes: int = FIRST_FREE_LANE,
        p2p_peers: Sequence[Rank] = (),
        p2p_ring: RingLayout | None = None,
        extra_managed_bytes: int = 0,
        app_bytes: int = 0,
        strategy: WaitStrategy | None = None,
    ) -> None:
        if num_lanes < FIRST_FREE_LANE:
            raise ValueError(f"num_lanes: {num_lanes} must be at least {FIRST_FREE_LANE}")
        self.pod = pod
        self.world = world
        self.me = me
        self.slot = world.slot(me)
        self.incarnation = incarnation
        self.config = config
        self.strategy: WaitStrategy = strategy or Adaptive(config.spin_us * 1000)
        self.p2p_ring = p2p_ring or RingLayout(num_slots=8, slot_bytes=64 * 1024)
        self._ring_slots = {rank: slot for slot, rank in enumerate(p2p_peers)}
        self._ring_stride = align_up(self.p2p_ring.total_bytes, PAGE_BYTES)
        self._addresses: dict[Rank, Address] = {}
        self._peers: dict[Rank, Segment] = {}
        self._watchers: list[Callable[[Rank], None]] = []
        rings_bytes = len(self._ring_slots) * self._ring_stride
        layout = SegmentLayout(
            len(world) * num_lanes, rings_bytes + extra_managed_bytes, app_bytes, num_lanes=num_lanes
        )
        self.extra_managed_offset = layout.managed_offset + rings_bytes
        check_memory(layout.total_bytes, config.shared_bytes_max, bytes_held=total_bytes(segment_prefix(pod)))
        self.segment = Segment.create(
            segment_name(pod, me.service, me.index, incarnation),
            layout,
            service=me.service,
            index=me.index,
            incarnation=incarnation,
        )
        self.doorbell = Doorbell(self.segment.buf, DOORBELL_OFFSET)

    def ring_offset(self, rank: Rank) -> int | None:
        """Return where in the own segment the ring of sender `rank` begins; None if it has none."""
        slot = self._ring_slots.get(rank)
        return None if slot is None else self.segment.layout.managed_offset + slot * self._ring_stride

    def learn(self, rank: Rank, incarnation: int, segment: str) -> None:
        """Note where `rank` lives now. An older incarnation than the known one is ignored."""
        known = self._addresses.get(rank)
        if known is None or known.incarnation < incarnation:
            self._addresses[rank] = Address(incarnation, segment)
            for watcher in tuple(self._watchers):
                watcher(rank)
            if known is not None and not self.segment.closed:
                self.segment.sound_alarm()  # whoever waits for the incarnation before waits in vain

    def watch(self, watcher: Callable[[Rank], None]) -> None:
        """Call `watcher(rank)` whenever `learn` brings a newer incarnation, in the thread of `learn`."""
        self._watchers.append(watcher)

    def unwatch(self, watcher: Callable[[Rank], None]) -> None:
        """Call it no longer. Idempotent."""
        if watcher in self._watchers:
            self._watchers.remove(watcher)

    def address(self, rank: Rank) -> Address | None:
        """Return the newest known address of `rank`."""
        return self._addresses.get(rank)

    def peer(self, rank: Rank, event_id: int = 0) -> Segment:
        """Return the segment of the newest known incarnation of `rank`, mapped at first use.

        Raises:
            PeerDied: its address is unknown, or its segment is gone.
            SegmentCorrupt: the segment is not what the address says.
        """
        address = self._addresses.get(rank)
        segment = self._peers.get(rank)
        if segment is not None and address is not None and segment.incarnation == address.incarnation:
            return segment
        if address is None:
            raise self.died(rank, event_id, "its address is not known yet")
        self._detach(rank)
        segment = self._attach(rank, address, event_id)
        self._peers[rank] = segment
        return segment

    def _attach(self, rank: Rank, address: Address, event_id: int) -> Segment:
        try:
            segment = Segment.attach(address.segment)
        except FileNotFoundError as error:
            raise self.died(rank, event_id, str(error)) from error
        expected = (rank.service, rank.index, address.incarnation)
        identity = segment.identity
        if (identity.service, identity.index, identity.incarnation) != expected:
            segment.close()
            raise SegmentCorrupt(
                f"segment {address.segment} belongs to {identity}, not to incarnation {address.incarnation}",
                rank=str(self.me),
                peer=str(rank),
                event_id=event_id,
            )
        return segment

    def _detach(self, rank: Rank) -> None:
        segment = self._peers.pop(rank, None)
        if segment is not None:
            segment.close()

    def cell_from(self, rank: Rank, lane: int) -> int:
        """Return the offset in the own segment of the cell that `rank` writes."""
        return self.segment.cell_offset(self.world.slot(rank), lane)

    def cell_at(self, segment: Segment, lane: int) -> int:
        """Return the offset in a peer's segment of the cell that this rank writes."""
        return segment.cell_offset(self.slot, lane)

    def check_alive(self, rank: Rank, segment: Segment, event_id: int) -> None:
        """Raise PeerDied unless `segment` still is the living incarnation of `rank`. One system call."""
        address = self._addresses.get(rank)
        if address is not None and address.incarnation != segment.incarnation:
            raise self.died(rank, event_id, f"incarnation {address.incarnation} has replaced it")
        if not segment.owner_alive():
            raise self.died(rank, event_id, "its owner lock is free")

    def died(self, rank: Rank, event_id: int, text: str) -> PeerDied:
        """Return the error that says so."""
        return PeerDied(f"peer died: {text}", rank=str(self.me), peer=str(rank), event_id=event_id)

    def stalled(self, rank: Rank, event_id: int, text: str) -> PeerStalled:
        """Return the error that says so."""
        return PeerStalled(f"peer stalled: {text}", rank=str(self.me), peer=str(rank), event_id=event_id)

    def wait(
        self,
        probe: Callable[[], T | None],
        *,
        peers: Sequence[tuple[Rank, Segment]],
        event_id: int,
        deadline: Deadline,
    ) -> T | None:
        """Wait on the own doorbell until `probe` returns something; None when the deadline passed first.

        The owner locks of `peers` are looked at when the kernel tells of a death (bus/memory/deaths.py), and, should it
        fail to, after `config.poll_interval_ms`, then after twice that, and so on. What a peer published
        before it died is still found: its death is reported only when a last `probe` gives nothing.

        Raises:
            PeerDied: one of `peers` has ended.
            Whatever `probe` raises.

        Blocks: yes; releases the GIL. Beats the segment's heartbeat.
        """
        found: list[T] = []

        def look() -> T | None:
            return found[0] if found else probe()

        def check() -> None:
            self.segment.beat()
            for rank, segment in peers:
                try:
                    self.check_alive(rank, segment, event_id)
                except PeerDied:
                    last = probe()
                    if last is None:
                        raise
                    found.append(last)
                    return

        return wait_until(
            look,
            self.doorbell,
            self.strategy,
            deadline,
            check=check,
            check_interval_ns=self.config.poll_interval_ms * NS_PER_MS,
            num_alarms=self.segment.num_alarms,
        )

    def close(self) -> None:
        """Unmap the peers, unmap and remove the own segment. Idempotent."""
        for rank in list(self._peers):
            self._detach(rank)
        self.segment.unlink()
        self.segment.close()
