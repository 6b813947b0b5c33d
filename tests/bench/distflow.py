"""`python -m tests.bench.distflow [--rounds N]`: KV transfer against a plain copy and against ZeroMQ.

Two processes. The sink asks the source over ZeroMQ (ipc) for a sequence of blocks, again and again:

    copy      the same blocks, copied inside the sink: what the memory allows
    fetch     `KvSink` from post to completion; the ticket is there
    whole     from the request to the completion: offer, ticket over ZeroMQ, fetch
    zmq       from the request to the last byte in place: the blocks themselves over ZeroMQ, not copied on sending

Times are medians in microseconds.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import numpy as np
import zmq

from bus.control.messages import KvTicket
from bus.distflow.sink import KvSink
from bus.distflow.source import KvSource
from bus.distflow.table import TransferLayout
from bus.memory import _native
from bus.memory.layout import SegmentLayout
from bus.memory.segment import Segment, segment_name

BLOCK_BYTES = 64 << 10
COUNTS = (1, 4, 16, 64, 256, 1024)
LAYOUT = TransferLayout(num_blocks=COUNTS[-1], block_bytes=BLOCK_BYTES, num_slots=8, num_sinks=1)
SLICE_BYTES = 4 << 20
TIMEOUT_MS = 20_000


def connect(kind: int, address: str, *, serve: bool) -> zmq.Socket[bytes]:
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(kind)
    socket.set(zmq.LINGER, 0)
    socket.set(zmq.RCVTIMEO, TIMEOUT_MS)
    (socket.bind if serve else socket.connect)(address)
    return socket


def source_main(pod: str, address: str) -> None:
    """Answer `[verb, count]` until told to stop."""
    name = segment_name(pod, "prefill", 0, 1)
    area = SegmentLayout(0, 0, LAYOUT.app_bytes)
    segment = Segment.create(name, area, service="prefill", index=0, incarnation=1)
    source = KvSource(segment, LAYOUT)
    segment.array(area.app_offset, (LAYOUT.kv_bytes,), np.uint8)[:] = 1
    socket = connect(zmq.REP, address, serve=True)
    while True:
        verb, count = msgspec.json.decode(socket.recv())
        if verb == "stop":
            break
        source.ended()
        block_ids = spread(count)
        if verb == "offer":
            socket.send(msgspec.json.encode(source.offer(block_ids, 1)))
            continue
        app = segment.app
        frames = [app[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES] for block in block_ids]
        socket.send_multipart(frames, copy=False)
    socket.send(b"")
    segment.unlink()
    segment.close()


@functools.cache
def spread(count: int) -> list[int]:
    """Return block ids that do not follow one another, as in a pool that has been used for a while."""
    order = np.random.default_rng(0).permutation(LAYOUT.num_blocks)
    return [int(block) for block in order[:count]]


@contextmanager
def source_process() -> Iterator[zmq.Socket[bytes]]:
    with tempfile.TemporaryDirectory() as folder:
        address = f"ipc://{folder}/s"
        pod = f"bench{uuid.uuid4().hex[:8]}"
        child = subprocess.Popen([sys.executable, "-m", "tests.bench.distflow", "--source", pod, address])
        socket = connect(zmq.REQ, address, serve=False)
        try:
            yield socket
            ask(socket, "stop", 0)
            child.wait(10)
        finally:
            child.kill()
            child.wait()
            socket.close()


def ask(socket: zmq.Socket[bytes], verb: str, count: int) -> list[Any]:
    socket.send(msgspec.json.encode([verb, count]))
    return socket.recv_multipart(copy=False)


class Runs:
    """The ways to bring `count` blocks into the own ones."""

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self._socket = socket
        self._own = np.zeros(LAYOUT.kv_bytes, np.uint8)
        self._other = np.ones(LAYOUT.kv_bytes, np.uint8)
        self._sink = KvSink(
            self._own,
            num_blocks=LAYOUT.num_blocks,
            block_bytes=BLOCK_BYTES,
            index=0,
            incarnation=1,
            rank="attention-0",
        )

    def copy(self, count: int) -> float:
        began = time.perf_counter()
        for own, other in enumerate(spread(count)):
            _native.copy(self._own, own * BLOCK_BYTES, self._other, other * BLOCK_BYTES, BLOCK_BYTES)
        return time.perf_counter() - began

    def whole(self, count: int) -> tuple[float, float]:
        """Return the time of all, and of the fetch alone."""
        began = time.perf_counter()
        (frame,) = ask(self._socket, "offer", count)
        ticket = msgspec.json.decode(frame.buffer, type=KvTicket)
        posted = time.perf_counter()
        self._sink.post(1, ticket, 0, range(count))
        while self._sink.progress(SLICE_BYTES):
            pass
        (completion,) = self._sink.completions()
        ended = time.perf_counter()
        if completion.error:
            raise RuntimeError(completion.error)
        return ended - began, ended - posted

    def zmq(self, count: int) -> float:
        began = time.perf_counter()
        for own, frame in enumerate(ask(self._socket, "send", count)):
            _native.copy(self._own, own * BLOCK_BYTES, frame.buffer, 0, BLOCK_BYTES)
        return time.perf_counter() - began

    def close(self) -> None:
        self._sink.close()


def median_us(times: list[float]) -> float:
    return statistics.median(times) * 1e6


def measure(run: Callable[[int], Any], count: int, rounds: int) -> list[Any]:
    run(count)
    return [run(count) for _ in range(rounds)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--source", nargs=2, metavar=("POD", "ADDRESS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.source:
        source_main(*arguments.source)
        return
    print(f"{BLOCK_BYTES >> 10} KiB blocks, {len(os.sched_getaffinity(0))} cores, {arguments.rounds} rounds")
    print(
        f"{'blocks':>6} {'KiB':>7} | {'copy':>8} {'fetch':>8} {'whole':>8} {'zmq':>8} us | fetch GB/s, of copy"
    )
    with source_process() as socket:
        runs = Runs(socket)
        for count in COUNTS:
            num_bytes = count * BLOCK_BYTES
            copy = median_us(measure(runs.copy, count, arguments.rounds))
            both = measure(runs.whole, count, arguments.rounds)
            whole, fetch = (median_us([times[i] for times in both]) for i in range(2))
            by_zmq = median_us(measure(runs.zmq, count, arguments.rounds))
            rate = f"{num_bytes / fetch / 1e3:6.2f} {copy / fetch:8.0%}"
            print(
                f"{count:6} {num_bytes >> 10:7} | {copy:8.0f} {fetch:8.0f} {whole:8.0f} {by_zmq:8.0f}    | {rate}"
            )
        runs.close()


if __name__ == "__main__":
    main()
