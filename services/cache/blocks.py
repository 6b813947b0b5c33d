"""The block pool: which KV blocks of one DP group are used, cached or free, and what the cached ones hold.

A block is room for `block_tokens` consecutive tokens, in every layer. The pool knows numbers only; the bytes
belong to the attention worker, so a pool lives as long as one incarnation of it.

    used     one or more requests refer to it
    cached   nobody refers to it, but it is full and named by its hash: may be used again, or evicted
    free     nobody refers to it and nobody knows what is in it

Laws: free + cached + used = total. A block in use is never evicted. A named block's predecessor is named too.

The prefix index is a dictionary from hash to block over chained hashes (see `bus/block_hash.py`), not a radix
tree: reuse is by whole blocks anyway, so a match is one lookup per block, nothing is ever split or merged,
and eviction removes single blocks. The id index is its inverse. Neither can outgrow the number of blocks.

Eviction takes the block that has been unreferenced the longest; blocks let go at once are evicted the last,
that is the deepest, first. Whoever refers to a block refers to all before it, so a predecessor is never let
go, and never evicted, before its successors: that is the third law.

Only full blocks are named, only named blocks are shared, and a full block is never written again; the block that a
request writes is its own. Whoever wants to go on from another's open block copies it (`services/batching`).

With a host tier (`host_tier.py`), a block that is evicted while a plan is made may be stored first; `stores` says so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from bus.block_hash import BlockHash
from services.cache.host_tier import HostTier


class BlockPool:
    """Hand out block ids 0 .. num_blocks - 1, share them by content, and take them back.

    Not thread-safe. What raises has changed nothing.
    """

    def __init__(self, *, num_blocks: int, block_tokens: int, host: HostTier | None = None) -> None:
        if num_blocks < 1 or block_tokens < 1:
            raise ValueError(
                f"num_blocks {num_blocks} and block_tokens {block_tokens}: both must be at least 1"
            )
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        self.host = host
        self.stores: list[tuple[int, int]] = []  # (block, slot), since the plan was begun
        # A stack: the block freed last is handed out first, while it is still warm in the processor's caches.
        self._free_ids = list(range(num_blocks - 1, -1, -1))
        self._cached_ids: dict[int, None] = {}  # in order of eviction
        self._num_references = [0] * num_blocks
        self._hash_to_id: dict[BlockHash, int] = {}
        self._id_to_hash: dict[int, BlockHash] = {}
        self._id_to_parent: dict[int, BlockHash | None] = {}

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated now, those included that are still cached."""
        return len(self._free_ids) + len(self._cached_ids)

    @property
    def num_cached(self) -> int:
        """Blocks that nobody refers to and whose content is known."""
        return len(self._cached_ids)

    @property
    def num_used(self) -> int:
        """Blocks that somebody refers to."""
        return self.num_blocks - self.num_free

    def blocks_for(self, num_tokens: int) -> int:
        """Return how many blocks hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_tokens)

    def can_allocate(self, num_blocks: int, shared: Sequence[int] = ()) -> bool:
        """Tell whether `allocate(num_blocks)` would succeed after `share(shared)`."""
        num_revived = sum(block_id in self._cached_ids for block_id in shared)
        return num_blocks <= self.num_free - num_revived

    def allocate(self, num_blocks: int, *, stores: bool = False) -> list[int]:
        """Take `num_blocks` blocks, evicting cached ones when no others are left.

        `stores` = what is evicted may go to the host tier; only while a plan is made, and nobody writes the blocks
        before that plan is executed.

        Returns:
            Their ids, all different; the caller is the only one who refers to them, until `free`.

        Raises:
            ValueError: `num_blocks` is negative or more than are free; nothing was taken.
        """
        if not 0 <= num_blocks <= self.num_free:
            raise ValueError(f"num_blocks {num_blocks} must be between 0 and the {self.num_free} free blocks")
        block_ids = [
            self._free_ids.pop() if self._free_ids else self._evict(stores=stores) for _ in range(num_blocks)
        ]
        for block_id in block_ids:
            self._num_references[block_id] = 1
        return block_ids

    def free(self, block_ids: Iterable[int]) -> None:
        """Take back one reference to each block, the last block first.

        Blocks without a name are then handed out in the same order again; named ones stay cached.

        Raises:
            ValueError: an id is unknown, or named more often than it is referred to; nothing was given back.
        """
        ids = list(block_ids)
        for block_id, count in Counter(ids).items():
            if not 0 <= block_id < self.num_blocks or self._num_references[block_id] < count:
                raise ValueError(
                    f"block_id {block_id} is not in use (num_blocks {self.num_blocks}) "
                    f"or has fewer than {count} references"
                )
        for block_id in reversed(ids):
            self._num_references[block_id] -= 1
            if self._num_references[block_id]:
                continue
            if block_id in self._id_to_hash:
                self._cached_ids[block_id] = None
            else:
                self._free_ids.append(block_id)

    # ---------------------------------------------------------------- sharing by content

    def match(self, block_hashes: Iterable[BlockHash]) -> list[int]:
        """Return the blocks that hold the longest prefix of this chain; changes nothing."""
        block_ids: list[int] = []
        for block_hash in block_hashes:
            block_id = self._hash_to_id.get(block_hash)
            if block_id is None:
                break
            block_ids.append(block_id)
        return block_ids

    def share(self, block_ids: Sequence[int]) -> None:
        """Refer to blocks that `match` returned.

        Raises:
            ValueError: a block has no name; nothing was changed.
        """
        for block_id in block_ids:
            if block_id not in self._id_to_hash:
                raise ValueError(f"block_id {block_id} has no name; only full, named blocks can be shared")
        for block_id in block_ids:
            self._num_references[block_id] += 1
            self._cached_ids.pop(block_id, None)

    def publish(self, block_id: int, block_hash: BlockHash, parent: BlockHash | None) -> int:
        """Name a block that is full from now on; `parent` names its predecessor, None = it is a first block.

        Returns:
            The block that the caller refers to from now on: its own, or, when another of the same content was
            published before, that one, and its own is free.

        Raises:
            ValueError: the block is not in use by the caller alone or has a name, or `parent` is unknown.
        """
        if block_id in self._id_to_hash or self._num_references[block_id] != 1:
            raise ValueError(f"block_id {block_id} must be without a name and in use by one request")
        if parent is not None and parent not in self._hash_to_id:
            raise ValueError(f"block_id {block_id}: its predecessor {parent.hex()} is not published")
        known = self._hash_to_id.get(block_hash)
        if known is not None:
            self.share([known])
            self.free([block_id])
            return known
        self._hash_to_id[block_hash] = block_id
        self._id_to_hash[block_id] = block_hash
        self._id_to_parent[block_id] = parent
        return block_id

    def is_published(self, block_id: int) -> bool:
        """Tell whether the block has a name."""
        return block_id in self._id_to_hash

    def _evict(self, *, stores: bool) -> int:
        block_id = next(iter(self._cached_ids))
        block_hash = self._id_to_hash.pop(block_id)
        del self._cached_ids[block_id]
        del self._hash_to_id[block_hash]
        del self._id_to_parent[block_id]
        slot = self.host.store(block_hash) if stores and self.host is not None else None
        if slot is not None:
            self.stores.append((block_id, slot))
        return block_id

    # ---------------------------------------------------------------- checks

    def check_invariants(self) -> None:
        """Assert the laws of the module's docstring, and that both indexes agree. O(num_blocks)."""
        free, used = set(self._free_ids), {i for i, count in enumerate(self._num_references) if count}
        assert len(free) == len(self._free_ids), "a block is free twice"
        assert min(self._num_references) >= 0, "a block has fewer than no references"
        assert len(free) + len(self._cached_ids) + len(used) == self.num_blocks, (
            "free + cached + used must be total"
        )
        assert free | used | self._cached_ids.keys() == set(range(self.num_blocks)), (
            "a block is in two states"
        )
        named = self._id_to_hash.keys()
        assert self._cached_ids.keys() <= named and not free & named, (
            "cached blocks have names, free ones none"
        )
        assert {h: i for i, h in self._id_to_hash.items()} == self._hash_to_id, "the indexes disagree"
        assert self._id_to_parent.keys() == named
        if self.host is not None:
            self.host.check_invariants()
        for block_id, parent in self._id_to_parent.items():
            assert parent is None or parent in self._hash_to_id, f"block {block_id} outlived its predecessor"

    def check_references(self, block_ids: Iterable[int]) -> None:
        """Assert that `block_ids`, each named once per reference, are all references that there are."""
        counts = Counter(block_ids)
        expected = [counts[block_id] for block_id in range(self.num_blocks)]
        assert self._num_references == expected, "references and block tables disagree"
