"""A rank of a dispatch/combine group: `collectives_child.py ROLE POD RANK INCARNATION POLL_MS`.

Prints `ready`, then obeys the lines on stdin: `run FIRST LAST` exchanges the steps FIRST..LAST and prints `done LAST`
or `died STEP PEER`; `arm POINT` dies at that fault point of the extension; `learn RANK INCARNATION` brings an address.
Ends when stdin closes.
"""

from __future__ import annotations

import os
import sys

import numpy as np

from bus.clock import Deadline
from bus.config import XcclConfig
from bus.errors import PeerDied
from bus.memory.segment import Segment, segment_name
from bus.xccl.dispatch import Dispatcher, DispatchShape
from bus.xccl.endpoint import Rank
from bus.xccl.event import Event
from bus.xccl.group import AddressTable

SHAPE = DispatchShape(num_ranks=3, max_tokens=8, top_k=2, hidden=32, num_local_experts=2)
DEADLINE_MS = 60_000


def routing(rank: int, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows that testify: step, sender and token; the routing follows from them."""
    num = (step + rank) % (SHAPE.max_tokens + 1)
    x = np.empty((num, SHAPE.hidden), np.float32)
    x[:, 0::3], x[:, 1::3], x[:, 2::3] = step, rank, np.arange(num)[:, None]
    idx = (np.arange(num)[:, None] * 5 + np.arange(2) * 3 + step + rank) % (SHAPE.num_experts + 1) - 1
    return x, idx.astype(np.int32), np.full((num, 2), (1.0, 0.5), np.float32)


def expected(rank: int, step: int) -> np.ndarray:
    """Experts add their number to every element."""
    x, idx, weights = routing(rank, step)
    out = np.zeros_like(x)
    for slot in range(2):
        term = weights[:, slot : slot + 1] * (x + idx[:, slot : slot + 1].astype(np.float32))
        out += np.where(idx[:, slot : slot + 1] >= 0, term, np.float32(0))
    return out


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
        self.side = Dispatcher(self.segment, SHAPE, rank, self.table, config=config)

    def learn(self, peer: int, incarnation: int) -> None:
        self.table.learn(
            Rank("expert", peer), incarnation, segment_name(self.pod, "expert", peer, incarnation)
        )

    def exchange(self, step: int) -> None:
        """One whole exchange, checked."""
        x, idx, weights = routing(self.rank, step)
        deadline = Deadline.after_ms(DEADLINE_MS)
        result, handle = self.side.dispatch(x, idx, event=Event(step, 0), deadline=deadline)
        begin = 0
        for local, count in enumerate(result.expert_counts):
            expert = np.float32(self.rank * SHAPE.num_local_experts + local)
            result.y[begin : begin + count] = result.x[begin : begin + count] + expert
            begin += int(count)
        out = self.side.combine(result.y, weights, handle, deadline=deadline)
        if not np.array_equal(out, expected(self.rank, step)):
            raise AssertionError(f"rank {self.rank} step {step}: {out} is not {expected(self.rank, step)}")

    def run(self, first: int, last: int) -> str:
        """Exchange the steps; return what to say."""
        for step in range(first, last + 1):
            try:
                self.exchange(step)
            except PeerDied as error:
                return f"died {step} {error.peer}"
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
