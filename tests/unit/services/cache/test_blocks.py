"""The block pool's refusals; its laws are in tests/property."""

from __future__ import annotations

import pytest

from services.cache.blocks import BlockPool


def test_more_than_free_is_refused_and_nothing_is_taken() -> None:
    pool = BlockPool(num_blocks=2, block_tokens=4)
    with pytest.raises(ValueError, match="num_blocks 3 must be between 0 and the 2 free blocks"):
        pool.allocate(3)
    assert pool.num_free == 2


@pytest.mark.parametrize("block_ids", [[0, 0], [1], [7], [-1], [0, 1]])
def test_a_block_that_is_not_in_use_cannot_be_freed(block_ids: list[int]) -> None:
    pool = BlockPool(num_blocks=2, block_tokens=4)
    assert pool.allocate(1) == [0]
    with pytest.raises(ValueError, match=r"is not in use|names a block twice"):
        pool.free(block_ids)
    assert pool.num_used == 1
    pool.check_invariants()


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(0, 0), (1, 1), (4, 1), (5, 2)])
def test_blocks_for_rounds_up(num_tokens: int, num_blocks: int) -> None:
    assert BlockPool(num_blocks=2, block_tokens=4).blocks_for(num_tokens) == num_blocks


def test_an_empty_pool_cannot_be_made() -> None:
    with pytest.raises(ValueError, match="num_blocks 0"):
        BlockPool(num_blocks=0, block_tokens=4)
