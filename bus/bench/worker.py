"""One process of a way: `python -m bus.bench.worker WAY`. Does what the harness asks, in order, until `end`."""

from __future__ import annotations

import gc
import os
import sys
import time
from contextlib import ExitStack
from importlib import import_module
from typing import Any

from bus.bench.bare import BareLoops
from bus.bench.meeting import Meeting, Message
from bus.bench.pingpong import Link, play
from bus.bench.rows import RowsWay

PEERS = {
    "ours": "bus.bench.peers.ours",
    "ours-nice": "bus.bench.peers.ours",
    "ours-paths": "bus.bench.peers.ours_paths",
    "pipe": "bus.bench.peers.pipe",
    "pyzmq": "bus.bench.peers.pyzmq",
    "openmpi": "bus.bench.peers.mpi",
    "mpich": "bus.bench.peers.mpi",
    "iceoryx2": "bus.bench.peers.iceoryx",
    "gloo": "bus.bench.peers.gloo",
}


class Worker:
    """Answers commands. `stack` holds what must be closed at the end."""

    def __init__(self, way: str, meeting: Meeting, stack: ExitStack) -> None:
        self._peer: Any = import_module(PEERS[way])
        self._meeting, self._stack = meeting, stack
        self._links: dict[str, Link] = {}
        self._rows: dict[str, RowsWay] = {}
        self._bare: BareLoops | None = None

    def answer(self, command: Message) -> Any:
        """Do one command and return its result."""
        arguments = dict(command)
        return getattr(self, f"do_{arguments.pop('what')}")(**arguments)

    def do_open_pairs(self, size_max: int, pinned: bool, options: Message) -> list[str]:
        """Connect with the partner, rank ^ 1; return the names of the ways of a ping-pong."""
        if pinned:
            cpus = sorted(os.sched_getaffinity(0))
            os.sched_setaffinity(0, {cpus[self._meeting.rank % len(cpus)]})
        self._links = self._peer.open_pairs(self._meeting, self._stack, size_max, options)
        return list(self._links)

    def do_play(self, ways: list[str], num_bytes: int, rounds: list[int], warm_up: int, blocks: int) -> Any:
        """Play each way's rounds, block by block in turn; return side 0's durations, ns, by way and block."""
        side = self._meeting.rank & 1
        found: dict[str, list[Any]] = {way: [] for way in ways}
        for _ in range(blocks):
            for way, count in zip(ways, rounds, strict=True):
                link = self._links[way]
                play(link, side, num_bytes, min(warm_up, count))
                found[way].append(play(link, side, num_bytes, count))
        return found

    def do_idle(self, way: str, seconds: float) -> Any:
        """Let side 1 wait for a message for `seconds`; return the CPU time that each process used, and the time, ns."""
        side, link = self._meeting.rank & 1, self._links[way]
        play(link, side, 64, 8)
        ends = link.ends(64)
        cpu, wall = time.process_time_ns(), time.monotonic_ns()
        if side == 0:
            time.sleep(seconds)
            ends.send(*ends.send_arguments)
        else:
            ends.recv(*ends.recv_arguments)
        return time.process_time_ns() - cpu, time.monotonic_ns() - wall

    def do_open_rows(self, options: Message) -> list[str]:
        """Connect with all ranks; return the names of the ways of a collective."""
        self._rows = self._peer.open_rows(self._meeting, self._stack, options)
        gc.freeze()  # what the imports have made lives to the end: a collection in a turn shall not walk it
        return list(self._rows)

    def do_supports(self, case: Message) -> list[str]:
        """Return the ways that play `case`."""
        return [name for name, way in self._rows.items() if way.supports(case)]

    def do_prepare(self, way: str, case: Message) -> None:
        """Set the buffers of a shape up."""
        self._rows[way].prepare(case)

    def do_check(self, way: str) -> None:
        """Exchange a few times and compare the last result with what it must be."""
        self._rows[way].check()

    def do_measure(self, way: str, repetitions: int) -> list[int]:
        """Exchange so many times; return each duration, ns."""
        return self._rows[way].measure(repetitions)

    def do_open_bare(self) -> None:
        """Make what `do_bare` needs."""
        self._bare = BareLoops(self._meeting, self._stack)

    def do_bare(self, length_ns: float, repetitions: int) -> list[int]:
        """Compute for so long, so many times; return each duration, ns."""
        assert self._bare is not None
        return self._bare.play(length_ns, repetitions)

    def do_finish(self, way: str) -> None:
        """Give the buffers of the shape back."""
        self._rows[way].finish()


def main(way: str) -> int:
    """Serve the harness."""
    meeting = Meeting.join()
    try:
        with ExitStack() as stack:
            worker = Worker(way, meeting, stack)
            while "do" in (message := meeting.take()):
                meeting.put({"done": worker.answer(message["do"])})
    except Exception as error:
        meeting.put({"error": f"{type(error).__name__}: {error}"})
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
