"""Laws of the block pool: free + used = total, no block has two owners, what was freed can be allocated."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from services.cache.blocks import BlockPool

NUM_BLOCKS = 12


class PoolMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(num_blocks=NUM_BLOCKS, block_tokens=4)
        self.tables: list[list[int]] = []

    @rule(num_blocks=st.integers(0, NUM_BLOCKS + 2))
    def allocate(self, num_blocks: int) -> None:
        free = self.pool.num_free
        assert self.pool.can_allocate(num_blocks) == (num_blocks <= free)
        if num_blocks <= free:
            self.tables.append(self.pool.allocate(num_blocks))
            assert len(self.tables[-1]) == num_blocks

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        table = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        self.pool.free(table)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def free_and_allocate_again(self, data: st.DataObject) -> None:
        table = data.draw(st.sampled_from(self.tables))
        before = list(table)
        self.pool.free(table)
        table[:] = self.pool.allocate(len(before))
        assert table == before

    @invariant()
    def owners_are_disjoint_and_complete(self) -> None:
        owned = [block_id for table in self.tables for block_id in table]
        assert len(set(owned)) == len(owned) == self.pool.num_used
        assert self.pool.num_free + self.pool.num_used == NUM_BLOCKS
        self.pool.check_invariants()


PoolMachine.TestCase.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)
TestPool = PoolMachine.TestCase
