"""Which beginnings of prompts a DP group probably has in its KV cache: an approximation without asking it.

Theory. What was dispatched to a group is computed and cached there, until its room is needed. So the gateway keeps,
per group, the hashes of prompt blocks that it sent there, as many as the group has blocks, the least recently
sent forgotten first and the deepest first of those sent at once: the order in which the group's own cache evicts. It
errs when a request never ran, when output took room, or while another gateway sends too; then a prefix is computed
again where it need not have been, and nothing worse. Whoever holds a block holds its predecessors, here as there, so
the length of a match is found by bisection.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Sequence

from bus.block_hash import BlockHash, extend_hashes, root_hash


class PrefixIndex:
    """The blocks of one group, at most `num_blocks_max` (0 = none are kept). Pure."""

    def __init__(self, num_blocks_max: int) -> None:
        self.num_blocks_max = num_blocks_max
        self._hashes: OrderedDict[BlockHash, None] = OrderedDict()  # the next to be forgotten first

    def __len__(self) -> int:
        return len(self._hashes)

    def match(self, hashes: Sequence[BlockHash]) -> int:
        """Return how many blocks of this chain, from the first, are known."""
        return bisect_left(hashes, True, key=lambda block_hash: block_hash not in self._hashes)

    def add(self, hashes: Sequence[BlockHash]) -> None:
        """Note that a prompt of these blocks was sent; what does not fit is forgotten."""
        known = self._hashes
        for block_hash in reversed(hashes[: self.num_blocks_max]):
            known[block_hash] = None
            known.move_to_end(block_hash)
        while len(known) > self.num_blocks_max:
            known.popitem(last=False)

    def clear(self) -> None:
        """Forget all: the group's cache is gone."""
        self._hashes.clear()


class PromptHasher:
    """Hashes each prompt once. Choices of one prompt come one after the other and share the tuple."""

    def __init__(self, block_tokens: int, num_blocks_max: int) -> None:
        """At most `num_blocks_max` blocks of a prompt are hashed, 1 us each; 0 = none."""
        self._block_tokens = block_tokens
        self._tokens_max = block_tokens * num_blocks_max
        self._root = root_hash("", block_tokens)
        self._latest: tuple[tuple[int, ...], tuple[BlockHash, ...]] = ((), ())

    def hashes(self, prompt_token_ids: tuple[int, ...]) -> tuple[BlockHash, ...]:
        """Return the hashes of the prompt's full blocks."""
        token_ids, hashes = self._latest
        if token_ids is not prompt_token_ids:
            new: list[BlockHash] = []
            extend_hashes(new, self._root, prompt_token_ids[: self._tokens_max], self._block_tokens)
            hashes = tuple(new)
            self._latest = (prompt_token_ids, hashes)
        return hashes
