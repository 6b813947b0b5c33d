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


def published(pool: BlockPool, *names: bytes) -> list[int]:
    """Return the blocks of one request, all full and named."""
    block_ids = pool.allocate(len(names))
    for index, name in enumerate(names):
        block_ids[index] = pool.publish(block_ids[index], name, names[index - 1] if index else None)
    return block_ids


def test_what_was_freed_is_found_until_it_is_evicted() -> None:
    pool = BlockPool(num_blocks=3, block_tokens=4)
    chain = published(pool, b"a", b"b")
    pool.free(chain)
    assert (pool.num_free, pool.num_cached, pool.num_used) == (3, 2, 0)
    assert pool.match([b"a", b"b", b"c"]) == chain and pool.match([b"b"]) == chain[1:]
    pool.allocate(1)
    assert pool.match([b"a", b"b"]) == chain, "a block without content goes first"
    pool.allocate(1)
    assert pool.match([b"a", b"b"]) == chain[:1], "the deepest is evicted first"
    pool.check_invariants()


def test_the_least_recently_used_chain_is_evicted_first() -> None:
    pool = BlockPool(num_blocks=4, block_tokens=4)
    first, second = published(pool, b"a", b"b"), published(pool, b"x", b"y")
    pool.free(first)
    pool.free(second)
    pool.share(first)
    pool.free(first)
    pool.allocate(2)
    assert pool.match([b"a", b"b"]) == first and pool.match([b"x"]) == []


def test_a_block_in_use_is_never_evicted() -> None:
    pool = BlockPool(num_blocks=3, block_tokens=4)
    chain = published(pool, b"a", b"b")
    pool.share(chain[:1])
    pool.free(chain)
    assert pool.num_free == 2 and not pool.can_allocate(3)
    assert pool.can_allocate(2) and not pool.can_allocate(2, shared=chain)
    pool.allocate(2)
    assert pool.match([b"a", b"b"]) == chain[:1]
    pool.check_references([chain[0], *({0, 1, 2} - {chain[0]})])


def test_the_same_content_is_kept_once() -> None:
    pool = BlockPool(num_blocks=4, block_tokens=4)
    first, second = published(pool, b"a", b"b"), published(pool, b"a", b"c")
    assert first[0] == second[0] and pool.num_used == 3
    pool.check_references([*first, *second])
    pool.free([*first, *second])
    assert (pool.num_cached, pool.num_free) == (3, 4)
    pool.check_invariants()


def test_what_is_not_named_cannot_be_shared_and_what_is_named_not_named_again() -> None:
    pool = BlockPool(num_blocks=2, block_tokens=4)
    (block_id,) = pool.allocate(1)
    with pytest.raises(ValueError, match="has no name"):
        pool.share([block_id])
    with pytest.raises(ValueError, match="is not published"):
        pool.publish(block_id, b"b", b"a")
    pool.publish(block_id, b"a", None)
    with pytest.raises(ValueError, match="without a name"):
        pool.publish(block_id, b"b", None)
