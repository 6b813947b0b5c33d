"""A rank of A2E/E2A: `relay_child.py attention|expert POD INDEX INCARNATION [sleeps|trusts|polls] [int8]`.

Prints `ready`, then obeys the lines on stdin, one answer each: `arm POINT` says `armed` and dies at that fault point of
the extension; `learn SERVICE INDEX INCARNATION` brings an address and says `learned`; `sleeps` says how often this
rank has slept; an attention rank exchanges the steps FIRST..LAST at `run ROUTE FIRST LAST` and says `done LAST` or
`died STEP PEER`. When stdin closes an expert rank says `served` and how many corrupt cells it saw. With `int8` rows
travel, and are handed to the experts, as INT8.
"""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Callable

import numpy as np

from bus.clock import NS_PER_MS, Deadline
from bus.config import XcclConfig
from bus.errors import PeerDied, SegmentCorrupt
from bus.memory.segment import Segment, segment_name
from bus.xccl.cost import Route
from bus.xccl.endpoint import Rank
from bus.xccl.event import Event
from bus.xccl.group import AddressTable
from bus.xccl.reference import quantise_rows
from bus.xccl.relay import RoutedExpert
from bus.xccl.relay_layout import RelayShape
from bus.xccl.trampoline import RoutedAttention

# Expert rank 0 is the attention rank's trampoline.
IS_INT8 = "int8" in sys.argv
SHAPE = RelayShape(
    num_attention_ranks=1,
    num_expert_ranks=2,
    rows_max=4,
    num_slots=2,
    hidden=32,
    int8=IS_INT8,
    deliver_int8=IS_INT8,
)
# Who trusts looks at locks too late to find a message whose ring was lost.
WAITING = {
    "sleeps": XcclConfig(spin_us=0, poll_interval_ms=20),
    "trusts": XcclConfig(spin_us=0, poll_interval_ms=120_000),
    "polls": XcclConfig(),
}
DEADLINE_MS = 60_000


def rows(step: int) -> np.ndarray:
    """Rows that testify: step and row."""
    x = np.empty((SHAPE.rows_max, SHAPE.hidden), np.float32)
    x[:, 0::2], x[:, 1::2] = step, np.arange(SHAPE.rows_max)[:, None]
    return x


SLOT_RANK = np.array([[0, 1], [1, 0], [1, -1], [0, 0]], np.int32)  # both expert ranks have rows
SLOT_EXPERT = np.array([[3, 5], [6, 2], [7, -1], [1, 0]], np.int32)


def factor(expert: np.ndarray) -> np.ndarray:
    """What an INT8 expert multiplies scales by: a float32 for each expert id."""
    return (np.asarray(expert) + 1).astype(np.float32) / np.float32(3)


def expected(step: int) -> np.ndarray:
    """Experts add their number and one; those that take INT8 reverse a row and multiply its scale."""
    x = rows(step)
    if IS_INT8:
        q, scale = quantise_rows(x)
        y_scale = scale[:, None] * factor(SLOT_EXPERT)
        out = q[:, None, ::-1].astype(np.float32) * y_scale[..., None]
    else:
        out = np.repeat(x[:, None, :], SHAPE.num_slots, axis=1) + (SLOT_EXPERT[..., None] + 1)
    return np.where(SLOT_RANK[..., None] >= 0, out, 0).astype(np.float32)


def answer(side: RoutedExpert, on_corrupt: Callable[[SegmentCorrupt], None]) -> int:
    """Do the work that has arrived, and return how much that was."""
    if not IS_INT8:
        arrivals = side.poll(on_corrupt)
        for arrival in arrivals:
            arrival.y[:] = arrival.x[arrival.pair_row] + (np.asarray(arrival.pair_expert)[:, None] + 1)
            side.commit(arrival)
        return len(arrivals)
    found = side.poll_int8(on_corrupt)
    for one in found:
        one.y[:] = one.x[one.pair_row, ::-1]
        one.y_scale[:] = one.pair_scale * factor(one.pair_expert)
        side.commit(one)
    return len(found)


class Member:
    """What both kinds of ranks have: a segment, addresses, and the lines that both obey."""

    def __init__(self, pod: str, service: str, index: int, incarnation: int) -> None:
        self.pod, self.table = pod, AddressTable()
        layout = SHAPE.attention_layout() if service == "attention" else SHAPE.expert_layout()
        name = segment_name(pod, service, index, incarnation)
        self.segment = Segment.create(name, layout, service=service, index=index, incarnation=incarnation)
        for rank in (Rank("attention", 0), Rank("expert", 0), Rank("expert", 1)):
            self.learn(rank, incarnation if rank == Rank(service, index) else 1)

    def learn(self, rank: Rank, incarnation: int) -> None:
        self.table.learn(rank, incarnation, segment_name(self.pod, rank.service, rank.index, incarnation))

    def obey(self, words: list[str]) -> None:
        match words:
            case ["arm", point]:
                os.environ["XDS_FAULT_POINT"] = point
                print("armed", flush=True)
            case ["learn", service, index, incarnation]:
                self.learn(Rank(service, int(index)), int(incarnation))
                print("learned", flush=True)

    def close(self) -> None:
        self.table.close()
        self.segment.unlink()
        self.segment.close()


def exchange(side: RoutedAttention, route: Route, step: int) -> None:
    """One exchange, checked."""
    handle = side.a2e_send(rows(step), SLOT_RANK, SLOT_EXPERT, Event(step, 0), route)
    out = np.zeros((SHAPE.rows_max, SHAPE.num_slots, SHAPE.hidden), np.float32)
    side.e2a_recv(handle, out, Deadline.after_ms(DEADLINE_MS))
    if not np.array_equal(out, expected(step)):
        raise AssertionError(f"step {step}: {out} is not {expected(step)}")


def attend(member: Member, config: XcclConfig) -> None:
    side = RoutedAttention(member.segment, SHAPE, 0, member.table, config=config)
    for line in sys.stdin:
        match line.split():
            case ["run", route, first, last]:
                step, outcome = 0, f"done {last}"
                try:
                    for step in range(int(first), int(last) + 1):
                        exchange(side, Route(route), step)
                except PeerDied as error:
                    outcome = f"died {step} {error.peer}"
                print(outcome, flush=True)
            case ["sleeps"]:
                print(side.stats()["sleeps"], flush=True)
            case words:
                member.obey(words)
    side.close()


def serve(member: Member, index: int, config: XcclConfig) -> None:
    wait_ns = min(5, config.poll_interval_ms) * NS_PER_MS
    side = RoutedExpert(member.segment, SHAPE, index, member.table, config=config)
    corrupt: list[SegmentCorrupt] = []
    while True:
        num_arrivals = answer(side, corrupt.append)
        if select.select([sys.stdin], [], [], 0)[0]:
            line = sys.stdin.readline()
            if not line:
                break
            if line.split() == ["sleeps"]:
                print(side.stats()["sleeps"], flush=True)
            member.obey(line.split())
        elif not num_arrivals:
            side.wait(timeout_ns=wait_ns)
    side.close()
    print("served", len(corrupt), flush=True)


def main(service: str, pod: str, index: int, incarnation: int, config: XcclConfig) -> None:
    member = Member(pod, service, index, incarnation)
    print("ready", flush=True)
    if service == "attention":
        attend(member, config)
    else:
        serve(member, index, config)
    member.close()


if __name__ == "__main__":
    waiting = next((name for name in WAITING if name in sys.argv), "sleeps")
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), WAITING[waiting])
