"""A group of plain all-to-all ranks in one process."""

from __future__ import annotations

from bus.config import XcclConfig
from bus.xccl.alltoall import AllToAll, AllToAllShape
from tests.harness.group_world import CONFIG, GroupWorld


class AllToAllWorld(GroupWorld[AllToAllShape, AllToAll]):
    """All ranks of a group."""

    def __init__(self, shape: AllToAllShape, pod: str = "", *, config: XcclConfig = CONFIG) -> None:
        super().__init__(shape, pod)
        self.config = config

    def open(self, index: int) -> AllToAll:
        return AllToAll(self.segments[index], self.shape, index, self.tables[index], config=self.config)
