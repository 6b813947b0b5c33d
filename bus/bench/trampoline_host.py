"""One of the processes that host the paper's ranks: `python -m bus.bench.trampoline_host POD PROCESS PROCESSES`.

Commands are JSON lines on stdin, answers on stdout. Life of a pod: `open` makes the segments of the hosted ranks.
`play` lets each hosted attention rank exchange so many times, while the hosted expert ranks serve; serving goes on
until `halt`. `close` removes the segments. Ends when stdin closes. A process has one thread: it polls its ranks in
turn, and gives the core away when none of them had anything to do.
"""

from __future__ import annotations

import json
import os
import resource
import select
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from bus.clock import NS_PER_S, now_ns
from bus.config import XcclConfig
from bus.errors import SegmentCorrupt
from bus.memory.segment import Segment, segment_name
from bus.xccl.cost import Route
from bus.xccl.endpoint import Rank
from bus.xccl.event import Event
from bus.xccl.group import AddressTable
from bus.xccl.relay import RoutedExpert
from bus.xccl.relay_layout import RelayShape
from bus.xccl.trampoline import RoutedAttention, RoutedHandle

Float32Array = npt.NDArray[np.float32]
Int32Array = npt.NDArray[np.int32]

STALL_NS = 60 * NS_PER_S
PASSES_PER_LOOK = 32  # at stdin


def routing(shape: RelayShape, attention: int, num_targets: int, num_rows: int) -> Int32Array:
    """Return [num_rows, num_slots] expert ranks: `num_targets` different ones, spread evenly, others for each rank."""
    pair = np.arange(num_rows * shape.num_slots) % num_targets
    first = attention * shape.num_expert_ranks // shape.num_attention_ranks
    rank = (first + pair * shape.num_expert_ranks // num_targets) % shape.num_expert_ranks
    return rank.astype(np.int32).reshape(num_rows, shape.num_slots)


def hosted(num_ranks: int, process: int, num_processes: int) -> range:
    """Return the ranks of a service that one process hosts: contiguous shares that differ by at most one."""
    return range(process * num_ranks // num_processes, (process + 1) * num_ranks // num_processes)


@dataclass(slots=True)
class Asker:
    """One hosted attention rank at work."""

    index: int
    side: RoutedAttention
    x: Float32Array
    ranks: Int32Array
    out: Float32Array
    left: int
    handle: RoutedHandle | None = None
    began_ns: int = 0


class Pod:
    """The hosted ranks of one shape."""

    def __init__(self, name: str, place: tuple[int, int], command: dict[str, Any]) -> None:
        self.shape = RelayShape(**command["shape"])
        self._name, self._life = name, command["life"]
        self._table, self._step = AddressTable(), 0
        self._segments: list[Segment] = []
        self._durations: list[int] = []
        self._send_durations: list[int] = []
        self._writes_before = 0
        counts = {"attention": self.shape.num_attention_ranks, "expert": self.shape.num_expert_ranks}
        for service, count in counts.items():
            for index in range(count):
                rank_name = segment_name(name, service, index, self._life)
                self._table.learn(Rank(service, index), self._life, rank_name)
        config = XcclConfig(spin_us=0)
        self.attention = {
            index: RoutedAttention(
                self._create("attention", index), self.shape, index, self._table, config=config
            )
            for index in hosted(counts["attention"], *place)
        }
        self._experts = [
            RoutedExpert(self._create("expert", index), self.shape, index, self._table, config=config)
            for index in hosted(counts["expert"], *place)
        ]

    def _create(self, service: str, index: int) -> Segment:
        shape = self.shape
        layout = shape.attention_layout() if service == "attention" else shape.expert_layout()
        name = segment_name(self._name, service, index, self._life)
        segment = Segment.create(name, layout, service=service, index=index, incarnation=self._life)
        self._segments.append(segment)
        return segment

    def start(self, command: dict[str, Any]) -> list[Asker]:
        """Return the hosted attention ranks with what they will send."""
        shape, rows = self.shape, command["rows"]
        self._route, self._durations, self._send_durations = Route(command["route"]), [], []
        self._writes_before = self._cell_writes()
        return [
            Asker(
                index=index,
                side=side,
                x=np.full((rows, shape.hidden), index + 1, np.float32),
                ranks=routing(shape, index, command["targets"], rows),
                out=np.zeros((rows, shape.num_slots, shape.hidden), np.float32),
                left=command["repeats"],
            )
            for index, side in self.attention.items()
        ]

    def turn(self, askers: list[Asker]) -> bool:
        """Let every rank do what it can without waiting; tell whether any could."""
        progressed = [self._advance(asker) for asker in askers if asker.left]
        served = [self._serve(expert) for expert in self._experts]
        return any(progressed) or any(served)

    def _advance(self, asker: Asker) -> bool:
        if asker.handle is None:
            self._step += 1
            asker.began_ns = now_ns()
            event = Event(self._step, 0)
            asker.handle = asker.side.a2e_send(asker.x, asker.ranks, asker.ranks, event, self._route)
            self._send_durations.append(now_ns() - asker.began_ns)
            return True
        if not asker.side.try_recv(asker.handle, asker.out):
            if now_ns() - asker.began_ns > STALL_NS:
                raise TimeoutError(f"attention-{asker.index}: {asker.left} exchanges are open")
            return False
        self._durations.append(now_ns() - asker.began_ns)
        asker.handle = None
        asker.left -= 1
        return True

    @staticmethod
    def _serve(expert: RoutedExpert) -> bool:
        arrivals = expert.poll(_raise)
        for arrival in arrivals:
            np.take(arrival.x, arrival.pair_row, axis=0, out=arrival.y)
            arrival.y[:, 0] = arrival.pair_expert
            expert.commit(arrival)
        return bool(arrivals)

    def result(self, askers: list[Asker]) -> dict[str, Any]:
        """Return what was measured; ValueError if a row did not come back from the expert rank that it was for."""
        for asker in askers:
            wanted = np.repeat(asker.x[:, None, :], self.shape.num_slots, axis=1)
            wanted[..., 0] = asker.ranks
            if not np.array_equal(asker.out, wanted):
                raise ValueError(f"attention-{asker.index}: wrong result")
        writes = self._cell_writes() - self._writes_before
        return {"durations": self._durations, "send_durations": self._send_durations, "cell_writes": writes}

    def _cell_writes(self) -> int:
        return sum(side.stats()["a2e_cell_writes"] for side in self.attention.values())

    def close(self) -> None:
        """Remove the segments."""
        for attention in self.attention.values():
            attention.close()
        for expert in self._experts:
            expert.close()
        self._table.close()
        for segment in self._segments:
            segment.close()
            segment.unlink()


def _raise(error: SegmentCorrupt) -> None:
    raise error


def _has_command() -> bool:
    return bool(select.select([sys.stdin], [], [], 0)[0])


def _play(pod: Pod, command: dict[str, Any]) -> None:
    askers = pod.start(command)
    passes, is_done = 0, False
    while True:
        if not pod.turn(askers):
            os.sched_yield()
        if not is_done and not any(asker.left for asker in askers):
            is_done = True
            _say(pod.result(askers))
        passes += 1
        if is_done and passes % PASSES_PER_LOOK == 0 and _has_command():
            return  # it is `halt`


def _say(answer: object) -> None:
    print(json.dumps(answer), flush=True)


def main(name: str, process: int, num_processes: int) -> None:
    """Obey commands until stdin closes."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    pod: Pod | None = None
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "open":
            pod = Pod(name, (process, num_processes), command)
        elif command["do"] == "play" and pod is not None:
            _play(pod, command)
            continue
        elif command["do"] == "close" and pod is not None:
            pod.close()
            pod = None
        _say("done")
    if pod is not None:
        pod.close()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
