"""The block pool: which KV blocks of one DP group are free, and which are in use.

A block is room for `block_tokens` consecutive tokens of one request, in every layer. The pool knows numbers
only; the bytes belong to the attention worker. A block has at most one owner. Law: free + used = total.
"""

from __future__ import annotations

from collections.abc import Iterable


class BlockPool:
    """Hand out block ids 0 .. num_blocks - 1 and take them back.

    Not thread-safe. What raises has changed nothing.
    """

    def __init__(self, *, num_blocks: int, block_tokens: int) -> None:
        if num_blocks < 1 or block_tokens < 1:
            raise ValueError(
                f"num_blocks {num_blocks} and block_tokens {block_tokens}: both must be at least 1"
            )
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        # A stack: the block freed last is handed out first, while it is still warm in the processor's caches.
        self._free_ids = list(range(num_blocks - 1, -1, -1))
        self._is_used = bytearray(num_blocks)

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated now."""
        return len(self._free_ids)

    @property
    def num_used(self) -> int:
        """Blocks that have an owner."""
        return self.num_blocks - len(self._free_ids)

    def blocks_for(self, num_tokens: int) -> int:
        """Return how many blocks hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_tokens)

    def can_allocate(self, num_blocks: int) -> bool:
        """Tell whether `allocate(num_blocks)` would succeed."""
        return num_blocks <= len(self._free_ids)

    def allocate(self, num_blocks: int) -> list[int]:
        """Take `num_blocks` free blocks.

        Returns:
            Their ids, all different; they belong to the caller until `free`.

        Raises:
            ValueError: `num_blocks` is negative or more than are free; nothing was taken.
        """
        if not 0 <= num_blocks <= len(self._free_ids):
            raise ValueError(
                f"num_blocks {num_blocks} must be between 0 and the {len(self._free_ids)} free blocks"
            )
        block_ids = [self._free_ids.pop() for _ in range(num_blocks)]
        for block_id in block_ids:
            self._is_used[block_id] = 1
        return block_ids

    def free(self, block_ids: Iterable[int]) -> None:
        """Give blocks back, the last first, so that the same request would get the same ids in the same
        order.

        Raises:
            ValueError: an id is unknown, free already, or named twice; nothing was given back.
        """
        ids = list(block_ids)
        for block_id in ids:
            if not 0 <= block_id < self.num_blocks or not self._is_used[block_id]:
                raise ValueError(f"block_id {block_id} is not in use (num_blocks {self.num_blocks})")
        if len(set(ids)) != len(ids):
            raise ValueError("block_ids names a block twice")
        for block_id in reversed(ids):
            self._is_used[block_id] = 0
            self._free_ids.append(block_id)

    def check_invariants(self) -> None:
        """Assert free + used = total, no id free twice, no id both free and used. O(num_blocks)."""
        assert len(self._free_ids) + sum(self._is_used) == self.num_blocks, "free + used must be total"
        assert len(set(self._free_ids)) == len(self._free_ids), "a block is free twice"
        for block_id in self._free_ids:
            assert 0 <= block_id < self.num_blocks, f"block {block_id} does not exist"
            assert not self._is_used[block_id], f"block {block_id} is both free and used"
