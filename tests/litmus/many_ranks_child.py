"""One of the processes that host a 768-rank pod: `python many_ranks_child.py POD PROCESS`.

Prints `ready`; then for every domain number on stdin its attention ranks of that domain exchange through trampolines,
and `done DOMAIN CELL_WRITES` is printed; all the while its expert ranks serve. Ends when stdin closes.
"""

from __future__ import annotations

import resource
import select
import sys

import numpy as np

from bus.clock import NS_PER_MS, Deadline
from bus.errors import SegmentCorrupt
from bus.memory.segment import Segment, segment_name
from bus.xccl.cost import Route
from bus.xccl.endpoint import Rank
from bus.xccl.event import Event
from bus.xccl.group import AddressTable
from bus.xccl.relay import Arrival, RoutedExpert
from bus.xccl.relay_layout import RelayShape
from bus.xccl.trampoline import RoutedAttention, RoutedHandle

NUM_PROCESSES = 16
SHAPE = RelayShape(
    num_attention_ranks=480, num_expert_ranks=288, rows_max=2, num_slots=4, hidden=16, num_domains=3
)
DEADLINE_MS = 30_000


def hosted(num_ranks: int, process: int) -> range:
    """The ranks of a service that one process hosts: equal, contiguous shares."""
    share = num_ranks // NUM_PROCESSES
    return range(process * share, (process + 1) * share)


def payload(attention: int, domain: int) -> np.ndarray:
    """Rows that testify: sender, row, domain."""
    x = np.zeros((2, SHAPE.hidden), np.float32)
    x[:, 0], x[:, 1], x[:, 2], x[:, 4:] = attention, (0, 1), domain, attention / 7
    return x


def routing(attention: int, domain: int) -> np.ndarray:
    """[2, num_slots] int32 expert ranks, spread over all of them, some -1."""
    rng = np.random.default_rng((attention, domain))
    ranks = rng.integers(0, SHAPE.num_expert_ranks, (2, SHAPE.num_slots)).astype(np.int32)
    ranks[rng.random(ranks.shape) < 0.1] = -1
    return ranks


def check(out: np.ndarray, attention: int, domain: int) -> None:
    """Every (row, slot) must hold the sender's own row, signed by the expert rank that it was meant for."""
    ranks = routing(attention, domain)
    expected = np.repeat(payload(attention, domain)[:, None, :], SHAPE.num_slots, axis=1)
    expected[..., 3] = ranks + 1
    expected[ranks < 0] = 0
    if not np.array_equal(out, expected):
        raise AssertionError(f"attention-{attention} domain {domain}: {out.tolist()}")


def raise_error(error: SegmentCorrupt) -> None:
    raise error


class Host:
    """All ranks of this process, polled in turn. They share one address table."""

    def __init__(self, pod: str, process: int) -> None:
        self.table = AddressTable()
        self.segments: list[Segment] = []
        for service, count in (("attention", SHAPE.num_attention_ranks), ("expert", SHAPE.num_expert_ranks)):
            for index in range(count):
                self.table.learn(Rank(service, index), 1, segment_name(pod, service, index, 1))
        self.attention = {
            index: RoutedAttention(self.create(pod, "attention", index), SHAPE, index, self.table)
            for index in hosted(SHAPE.num_attention_ranks, process)
        }
        self.experts = [
            RoutedExpert(self.create(pod, "expert", index), SHAPE, index, self.table)
            for index in hosted(SHAPE.num_expert_ranks, process)
        ]

    def create(self, pod: str, service: str, index: int) -> Segment:
        layout = SHAPE.attention_layout() if service == "attention" else SHAPE.expert_layout()
        name = segment_name(pod, service, index, 1)
        self.segments.append(Segment.create(name, layout, service=service, index=index, incarnation=1))
        return self.segments[-1]

    def serve(self) -> int:
        """Poll all expert ranks once; return how much work there was."""
        served = 0
        for expert in self.experts:
            for arrival in expert.poll(raise_error):
                self.compute(arrival)
                expert.commit(arrival)
                served += 1
        return served

    @staticmethod
    def compute(arrival: Arrival) -> None:
        arrival.y[:] = arrival.x[arrival.pair_row]
        arrival.y[:, 3] = arrival.pair_expert + 1

    def send(self, domain: int) -> list[tuple[int, RoutedHandle, np.ndarray]]:
        """Begin the exchanges of the hosted attention ranks of a domain."""
        pending = []
        for index, side in self.attention.items():
            if index // SHAPE.domain_ranks == domain:
                ranks = routing(index, domain)
                event = Event(step=domain + 1, layer=0)
                handle = side.a2e_send(payload(index, domain), ranks, ranks, event, Route.TRAMPOLINE)
                pending.append((index, handle, np.zeros((2, SHAPE.num_slots, SHAPE.hidden), np.float32)))
        return pending

    def exchange(self, domain: int) -> int:
        """Exchange and check; return the metadata writes of the attention ranks so far."""
        pending, deadline = self.send(domain), Deadline.after_ms(DEADLINE_MS)
        while pending:
            left = [p for p in pending if not self.attention[p[0]].try_recv(p[1], p[2])]
            for index, _, out in (p for p in pending if p not in left):
                check(out, index, domain)
            progressed = len(left) < len(pending)
            pending = left
            if not self.serve() and not progressed:
                self.rest()
            if deadline.expired():
                raise TimeoutError(f"{len(pending)} exchanges are open")
        return sum(side.stats()["a2e_cell_writes"] for side in self.attention.values())

    def rest(self) -> None:
        """Sleep for a moment: 48 doorbells cannot be waited for at once."""
        bell = self.segments[0]
        bell.wait_doorbell(bell.doorbell_seq(), 0, NS_PER_MS)

    def close(self) -> None:
        for side in (*self.attention.values(), *self.experts):
            side.close()
        self.table.close()
        for segment in self.segments:
            segment.close()
            segment.unlink()


def main(pod: str, process: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 8192)), hard))
    host = Host(pod, process)
    print("ready", flush=True)
    while True:
        readable, _, _ = select.select([sys.stdin], [], [], 0)
        if readable:
            line = sys.stdin.readline()
            if not line:
                break
            print("done", int(line), host.exchange(int(line)), flush=True)
        elif not host.serve():
            host.rest()
    print("mapped", host.table.num_mapped, flush=True)
    host.close()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
