"""A group of collective ranks in one process, a thread for each while they exchange."""

from __future__ import annotations

import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Generic, Protocol, Self, TypeVar

from bus.config import XcclConfig
from bus.memory.layout import SegmentLayout
from bus.memory.segment import Segment, segment_name
from bus.xccl.endpoint import Rank
from bus.xccl.group import AddressTable

CONFIG = XcclConfig(spin_us=0, poll_interval_ms=5)


class GroupShape(Protocol):
    """What shapes of groups have in common."""

    @property
    def num_ranks(self) -> int: ...

    def layout(self) -> SegmentLayout: ...


class Closable(Protocol):
    def close(self) -> None: ...


Shape = TypeVar("Shape", bound=GroupShape)
Side = TypeVar("Side", bound=Closable)
T = TypeVar("T")


class GroupWorld(ABC, Generic[Shape, Side]):
    """All ranks of a group, each with a segment and an address table of its own."""

    def __init__(self, shape: Shape, pod: str = "", *, config: XcclConfig = CONFIG) -> None:
        self.shape, self.config, self.pod = shape, config, pod or f"group{uuid.uuid4().hex[:10]}"
        self.segments: list[Segment] = []
        self.tables: list[AddressTable] = []
        self.ranks: list[Side] = []

    @abstractmethod
    def open(self, index: int) -> Side:
        """Open a rank on its segment and its table."""

    def create_segment(self, index: int, incarnation: int) -> Segment:
        name = segment_name(self.pod, "expert", index, incarnation)
        return Segment.create(
            name, self.shape.layout(), service="expert", index=index, incarnation=incarnation
        )

    def __enter__(self) -> Self:
        self.segments = [self.create_segment(index, 1) for index in range(self.shape.num_ranks)]
        for index in range(self.shape.num_ranks):
            self.tables.append(AddressTable())
            for peer, segment in enumerate(self.segments):
                self.tables[index].learn(Rank("expert", peer), 1, segment.name)
            self.ranks.append(self.open(index))
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
