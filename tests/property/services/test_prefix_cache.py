"""Laws of sharing by content: what is found is what was written, and what somebody refers to stays."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from bus.block_hash import BlockHash, extend_hashes, root_hash
from services.cache.blocks import BlockPool

NUM_BLOCKS = 8
ROOT = root_hash("model", 1)
Contents = list[int]  # of a request's blocks, each of one token


def hashes_of(contents: Contents) -> list[BlockHash]:
    hashes: list[BlockHash] = []
    extend_hashes(hashes, ROOT, contents, 1)
    return hashes


class CacheMachine(RuleBasedStateMachine):
    """`written` is what a real cache's memory would hold: for each block, the tokens up to its own."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(num_blocks=NUM_BLOCKS, block_tokens=1)
        self.tables: list[tuple[Contents, list[int]]] = []
        self.open_ids: list[int] = []  # blocks in use that are not full yet
        self.written: dict[int, Contents] = {}

    @rule(contents=st.lists(st.integers(0, 1), min_size=1, max_size=5), data=st.data())
    def start(self, contents: Contents, data: st.DataObject) -> None:
        hashes = hashes_of(contents)
        reuses = data.draw(st.booleans())
        found = self.pool.match(hashes) if reuses else []
        for index, block_id in enumerate(found):
            assert self.written[block_id] == contents[: index + 1]
        num_missing = len(contents) - len(found)
        free = self.pool.num_free
        can = self.pool.can_allocate(num_missing, found)
        self.pool.share(found)
        assert can == (num_missing <= self.pool.num_free) and self.pool.num_free <= free
        if not can:
            self.pool.free(found)
            return
        table = found + self.pool.allocate(num_missing)
        for index in range(len(found), len(table)):
            self.written[table[index]] = contents[: index + 1]
            parent = hashes[index - 1] if index else None
            table[index] = self.pool.publish(table[index], hashes[index], parent)
            assert self.written[table[index]] == contents[: index + 1]
        self.tables.append((contents, table))

    @rule()
    def open_block(self) -> None:
        if self.pool.num_free:
            (block_id,) = self.pool.allocate(1)
            self.open_ids.append(block_id)
            self.written[block_id] = [-1]

    @precondition(lambda self: self.open_ids)
    @rule(data=st.data())
    def drop_open_block(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.open_ids) - 1))
        self.pool.free([self.open_ids.pop(index)])

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def finish_some_together(self, data: st.DataObject) -> None:
        count = data.draw(st.integers(1, len(self.tables)))
        finished = data.draw(st.permutations(self.tables))[:count]
        for one in finished:
            self.tables.remove(one)
        self.pool.free([block_id for _, table in finished for block_id in table])

    @invariant()
    def what_is_referred_to_is_intact(self) -> None:
        for contents, table in self.tables:
            assert self.pool.match(hashes_of(contents)) == table
            assert [self.written[block_id] for block_id in table] == [
                contents[: index + 1] for index in range(len(table))
            ]

    @invariant()
    def references_match_and_the_laws_hold(self) -> None:
        self.pool.check_references(
            [*self.open_ids, *(block_id for _, table in self.tables for block_id in table)]
        )
        self.pool.check_invariants()


CacheMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
TestCache = CacheMachine.TestCase
