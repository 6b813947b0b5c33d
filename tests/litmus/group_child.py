"""A rank of a group: `group_child.py dispatch|dispatch_int8|alltoall POD RANK INCARNATION POLL_MS SPIN_US`.

Prints `ready`, then obeys the lines on stdin: `run FIRST LAST` exchanges the steps FIRST..LAST and prints `done LAST`,
`died STEP PEER` or `moved STEP PEER`; `arm POINT` dies at that fault point of the extension; `learn RANK INCARNATION`
brings an address; `sleeps` prints how often this rank has slept. Ends when stdin closes.
"""

from __future__ import annotations

import os
import sys
from abc import ABC, abstractmethod
from dataclasses import replace

import numpy as np

from bus.clock import Deadline
from bus.config import XcclConfig
from bus.errors import EventMismatch, PeerDied
from bus.memory.segment import Segment, segment_name
from bus.xccl import int8
from bus.xccl.alltoall import AllToAll, AllToAllShape
from bus.xccl.dispatch import Dispatcher, DispatchShape
from bus.xccl.endpoint import Rank
from bus.xccl.event import Event
from bus.xccl.group import AddressTable

NUM_RANKS = 3
ROUTED = DispatchShape(num_ranks=NUM_RANKS, max_tokens=8, top_k=2, hidden=32, num_local_experts=2)
PLAIN = AllToAllShape(num_ranks=NUM_RANKS, stage_bytes=4096, area_bytes=1 << 16)
WIDE = 320  # times a row's numbers; makes every piece larger than what is staged although it lies in the area
DEADLINE_MS = 60_000


class Member(ABC):
    """One rank, in one incarnation."""

    shape: DispatchShape | AllToAllShape
    side: Dispatcher | AllToAll

    def __init__(self, pod: str, rank: int, incarnation: int, poll_ms: int, spin_us: int) -> None:
        self.pod, self.rank = pod, rank
        name = segment_name(pod, "expert", rank, incarnation)
        self.segment = Segment.create(
            name, self.shape.layout(), service="expert", index=rank, incarnation=incarnation
        )
        self.table = AddressTable()
        for peer in range(NUM_RANKS):
            self.learn(peer, incarnation if peer == rank else 1)
        self.open(XcclConfig(spin_us=spin_us, poll_interval_ms=poll_ms))

    @abstractmethod
    def open(self, config: XcclConfig) -> None:
        """Make `side`."""

    @abstractmethod
    def exchange(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Do one whole exchange; return what came and what should."""

    def learn(self, peer: int, incarnation: int) -> None:
        self.table.learn(
            Rank("expert", peer), incarnation, segment_name(self.pod, "expert", peer, incarnation)
        )

    def run(self, first: int, last: int) -> str:
        """Exchange the steps; return what to say."""
        for step in range(first, last + 1):
            try:
                came, wanted = self.exchange(step)
            except PeerDied as error:
                return f"died {step} {error.peer}"
            except EventMismatch as error:
                return f"moved {step} {error.peer}"
            if not np.array_equal(came, wanted):
                raise AssertionError(f"rank {self.rank} step {step}: {came} is not {wanted}")
        return f"done {last}"

    def close(self) -> None:
        self.side.close()
        self.table.close()
        self.segment.unlink()
        self.segment.close()


class Routed(Member):
    """Dispatch, experts that add their number to every element, combine."""

    shape = ROUTED
    side: Dispatcher

    def open(self, config: XcclConfig) -> None:
        self.side = Dispatcher(self.segment, self.shape, self.rank, self.table, config=config)

    def given(self, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows that testify: step, sender and token; the routing follows from them."""
        num = (step + self.rank) % (self.shape.max_tokens + 1)
        x = np.empty((num, self.shape.hidden), np.float32)
        x[:, 0::3], x[:, 1::3], x[:, 2::3] = step, self.rank, np.arange(num)[:, None]
        idx = np.arange(num)[:, None] * 5 + np.arange(2) * 3 + step + self.rank
        return (
            x,
            (idx % (self.shape.num_experts + 1) - 1).astype(np.int32),
            np.full((num, 2), (1.0, 0.5), np.float32),
        )

    def exchange(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        x, idx, weights = self.given(step)
        deadline = Deadline.after_ms(DEADLINE_MS)
        result, handle = self.side.dispatch(x, idx, event=Event(step, 0), deadline=deadline)
        local = np.repeat(np.arange(self.shape.num_local_experts), result.expert_counts)[:, None]
        result.y[:] = result.x + (self.rank * self.shape.num_local_experts + local).astype(np.float32)
        wanted = np.zeros_like(x)
        for slot in range(2):
            expert = idx[:, slot : slot + 1]
            term = weights[:, slot : slot + 1] * (x + expert.astype(np.float32))
            wanted += np.where(expert >= 0, term, np.float32(0))
        return self.side.combine(result.y, weights, handle, deadline=deadline), wanted


class RoutedInt8(Routed):
    """The same with INT8 rows: an expert adds its number to the scale, so what it should be is exact as well."""

    shape = replace(ROUTED, int8=True, deliver_int8=True)

    def exchange(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        x, idx, weights = self.given(step)
        deadline = Deadline.after_ms(DEADLINE_MS)
        result, handle = self.side.dispatch_int8(x, idx, event=Event(step, 0), deadline=deadline)
        local = np.repeat(np.arange(self.shape.num_local_experts), result.expert_counts)
        result.y[:] = result.x
        expert = (self.rank * self.shape.num_local_experts + local).astype(np.float32)
        result.y_scale[:] = result.x_scale + expert
        q, scale = int8.quantise(x)
        wanted = np.zeros_like(x)
        for slot in range(2):
            expert = idx[:, slot]
            y_scale = scale + np.maximum(expert, 0).astype(np.float32)
            term = weights[:, slot, None] * (q.astype(np.float32) * y_scale[:, None])
            wanted += np.where(expert[:, None] >= 0, term, np.float32(0))
        return self.side.combine(result.y, weights, handle, deadline=deadline), wanted


class Plain(Member):
    """Even steps send arrays of the process's own, odd steps wide rows in the app area, too large to be staged."""

    shape = PLAIN
    side: AllToAll

    def open(self, config: XcclConfig) -> None:
        self.side = AllToAll(self.segment, self.shape, self.rank, self.table, config=config)

    @staticmethod
    def rows(giver: int, step: int) -> np.ndarray:
        """Rows that testify: step, giver, taker, number. At least one for every rank in steps 4 and 5."""
        counts = [(giver + to + step) % 3 + (step in (4, 5)) for to in range(NUM_RANKS)]
        return np.array(
            [(step, giver, to, i) for to, count in enumerate(counts) for i in range(count)], np.int32
        ).reshape(-1, 4)

    def exchange(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        wide = WIDE if step % 2 else 1
        array = self.rows(self.rank, step)
        counts = np.bincount(array[:, 2], minlength=NUM_RANKS)
        if wide > 1:
            there = self.side.area((len(array), 4 * wide), np.int32)
            there[:] = np.tile(array, wide)
            array = there
        out = np.empty((20, 4 * wide), np.int32) if step % 4 < 2 else None  # both ways of a call
        came, _ = self.side.exchange(
            array, counts, event=Event(step, 0), deadline=Deadline.after_ms(DEADLINE_MS), out=out
        )
        array[:] = -1  # may be reused after return
        given = np.concatenate([self.rows(giver, step) for giver in range(NUM_RANKS)])
        return came, np.tile(given[given[:, 2] == self.rank], wide)


def main(member: Member) -> None:
    print("ready", flush=True)
    for line in sys.stdin:
        match line.split():
            case ["run", first, last]:
                print(member.run(int(first), int(last)), flush=True)
            case ["sleeps"]:
                print(member.side.stats()["sleeps"], flush=True)
            case ["arm", point]:
                os.environ["XDS_FAULT_POINT"] = point
            case ["learn", peer, newer]:
                member.learn(int(peer), int(newer))
    member.close()


if __name__ == "__main__":
    kind = {"dispatch": Routed, "dispatch_int8": RoutedInt8, "alltoall": Plain}[sys.argv[1]]
    main(kind(sys.argv[2], *map(int, sys.argv[3:7])))
