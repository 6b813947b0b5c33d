"""A group of plain all-to-all ranks in one process."""

from __future__ import annotations

from bus.xccl.alltoall import AllToAll, AllToAllShape
from tests.harness.group_world import GroupWorld


class AllToAllWorld(GroupWorld[AllToAllShape, AllToAll]):
    """All ranks of a group."""

    def open(self, index: int) -> AllToAll:
        return AllToAll(self.segments[index], self.shape, index, self.tables[index], config=self.config)
