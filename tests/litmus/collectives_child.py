"""A rank of a dispatch/combine group: `collectives_child.py POD RANK FAULT_POINT STEPS POLL_MS`. It dies there."""

from __future__ import annotations

import os
import signal
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


def open_rank(pod: str, rank: int, poll_ms: int) -> tuple[Segment, AddressTable, Dispatcher]:
    name = segment_name(pod, "expert", rank, 1)
    segment = Segment.create(name, SHAPE.layout(), service="expert", index=rank, incarnation=1)
    table = AddressTable()
    for peer in range(SHAPE.num_ranks):
        table.learn(Rank("expert", peer), 1, segment_name(pod, "expert", peer, 1))
    config = XcclConfig(spin_us=0, poll_interval_ms=poll_ms)
    return segment, table, Dispatcher(segment, SHAPE, rank, table, config=config)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def exchange(side: Dispatcher, rank: int, step: int, fault_point: str = "none") -> None:
    """One whole exchange; with a fault point the process ends there."""
    x, idx, weights = routing(rank, step)
    deadline = Deadline.after_ms(20_000)
    handle = side._stage(x, idx, Event(step, 0))
    if fault_point == "staged":
        die()
    side._notify(handle)
    if fault_point == "counted":
        die()
    side._await(handle, bytearray(side._everyone), handle.found, deadline, combine=False)
    result = side._pull(handle)
    if fault_point == "pulled":
        die()
    begin = 0
    for local, count in enumerate(result.expert_counts):
        expert = np.float32(rank * SHAPE.num_local_experts + local)
        result.y[begin : begin + count] = result.x[begin : begin + count] + expert
        begin += int(count)
    out = side.combine(result.y, weights, handle, deadline=deadline)
    if not np.array_equal(out, expected(rank, step)):
        raise AssertionError(f"rank {rank} step {step}: {out} is not {expected(rank, step)}")


def main(pod: str, rank: int, fault_point: str, steps: int, poll_ms: int) -> None:
    _segment, _table, side = open_rank(pod, rank, poll_ms)
    print("ready", flush=True)
    sys.stdin.readline()
    step = 0
    try:
        for step in range(1, steps + 1):
            exchange(side, rank, step, fault_point if step == steps else "none")
    except PeerDied as error:
        print("died", step, error.peer, flush=True)
        return
    print("done", step, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
