"""What a block's hash depends on."""

from __future__ import annotations

from bus.block_hash import HASH_BYTES, BlockHash, chained_hash, extend_hashes, root_hash

ROOT = root_hash("demo", 4)


def hashes_of(token_ids: list[int], root: BlockHash = ROOT) -> list[BlockHash]:
    hashes: list[BlockHash] = []
    extend_hashes(hashes, root, token_ids, 4)
    return hashes


def test_only_full_blocks_have_hashes() -> None:
    assert [len(hashes_of(list(range(n)))) for n in (0, 3, 4, 7, 8, 9)] == [0, 0, 1, 1, 2, 2]
    assert {len(block_hash) for block_hash in hashes_of(list(range(8)))} == {HASH_BYTES}


def test_a_hash_depends_on_every_token_before_it_and_on_none_after() -> None:
    before = hashes_of(list(range(12)))
    for changed in range(12):
        token_ids = list(range(12))
        token_ids[changed] = 99
        after = hashes_of(token_ids)
        first = changed // 4
        assert after[:first] == before[:first]
        assert all(a != b for a, b in zip(after[first:], before[first:], strict=True))


def test_a_hash_depends_on_the_model_and_on_the_block_size() -> None:
    assert len({root_hash("demo", 4), root_hash("demo", 8), root_hash("other", 4)}) == 3
    assert not set(hashes_of([1, 2, 3, 4])) & set(hashes_of([1, 2, 3, 4], root_hash("other", 4)))


def test_extending_step_by_step_is_the_same_as_at_once() -> None:
    hashes: list[BlockHash] = []
    for end in range(20):
        extend_hashes(hashes, ROOT, list(range(end)), 4)
    assert hashes == hashes_of(list(range(19)))
    assert hashes[1] == chained_hash(hashes[0], [4, 5, 6, 7])
