"""A group of plain all-to-all ranks in one process, a thread for each while they exchange."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType
from typing import TypeVar

from bus.config import XcclConfig
from bus.memory.segment import Segment, segment_name
from bus.xccl.alltoall import AllToAll, AllToAllShape
from bus.xccl.endpoint import Rank
from bus.xccl.group import AddressTable

T = TypeVar("T")


@dataclass
class AllToAllWorld:
    """All ranks of a group."""

    shape: AllToAllShape
    pod: str = field(default_factory=lambda: f"a2a{uuid.uuid4().hex[:10]}")
    segments: list[Segment] = field(default_factory=list)
    tables: list[AddressTable] = field(default_factory=list)
    ranks: list[AllToAll] = field(default_factory=list)

    def __enter__(self) -> AllToAllWorld:
        layout = self.shape.layout()
        for index in range(self.shape.num_ranks):
            name = segment_name(self.pod, "expert", index, 1)
            self.segments.append(Segment.create(name, layout, service="expert", index=index, incarnation=1))
        for index in range(self.shape.num_ranks):
            table = AddressTable()
            for peer, segment in enumerate(self.segments):
                table.learn(Rank("expert", peer), 1, segment.name)
            self.tables.append(table)
            config = XcclConfig(spin_us=0, poll_interval_ms=5)
            self.ranks.append(AllToAll(self.segments[index], self.shape, index, table, config=config))
        self.pool = ThreadPoolExecutor(self.shape.num_ranks)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.pool.shutdown()
        for rank in self.ranks:
            rank.close()
        for table in self.tables:
            table.close()
        for segment in self.segments:
            segment.close()
            segment.unlink()

    def each(self, work: Callable[[int], T]) -> list[T]:
        """Run `work(rank)` for all ranks at once; raises the first error of the lowest rank."""
        futures = [self.pool.submit(work, rank) for rank in range(self.shape.num_ranks)]
        return [future.result(30) for future in futures]
