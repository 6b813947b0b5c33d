"""The second tier of a DP group's KV cache: which evicted blocks lie in which slots of the host file.

Theory. A block that the pool evicts can be written to a slot of a file (`services/steps/host_file.py`) and read back
when a request's prefix reaches it. This class decides about slots only. It is filled in the pool's order of eviction,
the deepest block of a prefix first, and forgets the least recently used, so what it has of a prefix is its end: the
part whose beginning the pool still has. A slot keeps its block when that is read back, so evicting the block again
costs nothing.

All moves of one step's plan are made in one order: stores, loads, copies, then the step. So a slot that is written and
read in one plan holds what was stored; a slot that is to be read must not be written after that was decided: it is
pinned until the plan is made.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from bus.block_hash import BlockHash


class HostTier:
    """Slots 0 .. num_slots - 1 by content. Pure."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._free = list(range(num_slots - 1, -1, -1))
        self._slots: OrderedDict[BlockHash, int] = OrderedDict()  # the next to be forgotten first
        self._pinned: set[int] = set()

    @property
    def num_used(self) -> int:
        """Slots that hold a block."""
        return len(self._slots)

    def match(self, hashes: Iterable[BlockHash]) -> list[int]:
        """Return the slots that hold the longest beginning of `hashes`; changes nothing."""
        slots = []
        for block_hash in hashes:
            slot = self._slots.get(block_hash)
            if slot is None:
                break
            slots.append(slot)
        return slots

    def pin(self, hashes: Sequence[BlockHash]) -> None:
        """These blocks will be read by the plan that is being made: keep them until `unpin`."""
        for block_hash in reversed(hashes):
            self._slots.move_to_end(block_hash)
            self._pinned.add(self._slots[block_hash])

    def unpin(self) -> None:
        """The plan is made."""
        self._pinned.clear()

    def store(self, block_hash: BlockHash) -> int | None:
        """Return the slot to write this block to; None when it is there already, or nothing may be forgotten."""
        if block_hash in self._slots:
            self._slots.move_to_end(block_hash)
            return None
        if not self._free:
            oldest = next((name for name, slot in self._slots.items() if slot not in self._pinned), None)
            if oldest is None:
                return None
            self._free.append(self._slots.pop(oldest))
        slot = self._free.pop()
        self._slots[block_hash] = slot
        return slot

    def check_invariants(self) -> None:
        """Assert that every slot is free or holds one block, and that what is pinned is held."""
        used = list(self._slots.values())
        assert sorted(used + self._free) == list(range(self.num_slots)), "a slot is lost, or held twice"
        assert self._pinned <= set(used), "a pinned slot was given away"
