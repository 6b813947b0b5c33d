"""A rank of a plain all-to-all: `alltoall_child.py ROLE POD RANK INCARNATION POLL_MS`. Lines as collectives_child.py.

Even steps send arrays of the process's own, odd steps wide rows in the app area, too large to be staged.
"""

from __future__ import annotations

import os
import sys

import numpy as np

from bus.clock import Deadline
from bus.config import XcclConfig
from bus.errors import EventMismatch, PeerDied
from bus.memory.segment import Segment, segment_name
from bus.xccl.alltoall import AllToAll, AllToAllShape
from bus.xccl.endpoint import Rank
from bus.xccl.event import Event
from bus.xccl.group import AddressTable

SHAPE = AllToAllShape(num_ranks=3, stage_bytes=4096, area_bytes=1 << 16)
WIDE = 320  # times a row's numbers; makes every piece larger than what is staged although it lies in the area
DEADLINE_MS = 60_000


def counts(rank: int, step: int) -> np.ndarray:
    """Rows for each rank; at least one for every rank in steps 4 and 5."""
    return np.array([(rank + to + step) % 3 + (step in (4, 5)) for to in range(3)], np.int64)


def rows(rank: int, step: int) -> np.ndarray:
    """Rows that testify: step, giver, taker, number."""
    n = counts(rank, step)
    return np.array([(step, rank, to, i) for to in range(3) for i in range(n[to])], np.int32).reshape(-1, 4)


def expected(rank: int, step: int) -> np.ndarray:
    given = [rows(giver, step) for giver in range(3)]
    return np.concatenate([g[g[:, 2] == rank] for g in given])


class Member:
    """One rank, in one incarnation."""

    def __init__(self, pod: str, rank: int, incarnation: int, poll_ms: int) -> None:
        self.pod, self.rank = pod, rank
        name = segment_name(pod, "expert", rank, incarnation)
        self.segment = Segment.create(
            name, SHAPE.layout(), service="expert", index=rank, incarnation=incarnation
        )
        self.table = AddressTable()
        for peer in range(SHAPE.num_ranks):
            self.learn(peer, incarnation if peer == rank else 1)
        config = XcclConfig(spin_us=0, poll_interval_ms=poll_ms)
        self.side = AllToAll(self.segment, SHAPE, rank, self.table, config=config)

    def learn(self, peer: int, incarnation: int) -> None:
        self.table.learn(
            Rank("expert", peer), incarnation, segment_name(self.pod, "expert", peer, incarnation)
        )

    def exchange(self, step: int) -> None:
        """One exchange, checked."""
        array = rows(self.rank, step)
        if step % 2:
            there = self.side.area((len(array), 4 * WIDE), np.int32)
            there[:] = np.tile(array, WIDE)
            array = there
        came, _ = self.side.exchange(
            array, counts(self.rank, step), event=Event(step, 0), deadline=Deadline.after_ms(DEADLINE_MS)
        )
        array[:] = -1  # may be reused after return
        wanted = np.tile(expected(self.rank, step), WIDE if step % 2 else 1)
        if not np.array_equal(came, wanted):
            raise AssertionError(f"rank {self.rank} step {step}: {came} is not {wanted}")

    def run(self, first: int, last: int) -> str:
        """Exchange the steps; return what to say."""
        for step in range(first, last + 1):
            try:
                self.exchange(step)
            except PeerDied as error:
                return f"died {step} {error.peer}"
            except EventMismatch as error:
                return f"moved {step} {error.peer}"
        return f"done {last}"

    def close(self) -> None:
        self.side.close()
        self.table.close()
        self.segment.unlink()
        self.segment.close()


def main(pod: str, rank: int, incarnation: int, poll_ms: int) -> None:
    member = Member(pod, rank, incarnation, poll_ms)
    print("ready", flush=True)
    for line in sys.stdin:
        match line.split():
            case ["run", first, last]:
                print(member.run(int(first), int(last)), flush=True)
            case ["arm", point]:
                os.environ["XDS_FAULT_POINT"] = point
            case ["learn", peer, newer]:
                member.learn(int(peer), int(newer))
    member.close()


if __name__ == "__main__":
    main(sys.argv[2], *map(int, sys.argv[3:6]))
