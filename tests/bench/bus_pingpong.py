"""Ping-pong between two processes: our point-to-point against a spinning ping-pong in C, and against other transports.

    python -m tests.bench.bus_pingpong [--sizes 64 4096] [--rounds 400] [--repeats 3] [--json FILE]

One pair of processes plays all contenders in turn, so that load from elsewhere meets them alike: for each repeat
and size, each contender plays its rounds. A round goes there and back; the figures are half rounds, in
microseconds. The limit (`c`) copies the message into shared memory and out of it at each side, and waits by pure
spin. `spin`, `adaptive` (the default) and `blocking` are `Sender.send` and `Receiver.recv` under that strategy;
`pull` is adaptive with the message in the sender's app area (one copy); `peek` is adaptive with `reserve` and
`peek`: nothing is copied. `zmq` is pyzmq over ipc, `pipe` is multiprocessing.Pipe.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from time import monotonic_ns
from typing import Any

import numpy as np
import numpy.typing as npt
import zmq

from bus.clock import Deadline
from bus.config import XcclConfig
from bus.memory import _native
from bus.memory.ring import RingLayout
from bus.memory.segment import segment_prefix, sweep
from bus.memory.wait import Adaptive, Blocking, Spin, WaitStrategy
from bus.xccl.endpoint import Endpoint, Rank, World
from bus.xccl.p2p import P2p

WORLD = World.of(attention=2, expert=0)
SIZES = (64, 4096, 65536, 1 << 20, 8 << 20)
SIZE_MAX = 8 << 20
TIMEOUT_MS = 60_000
WARM_UP = 20

Play = Callable[[int, int], list[int]]  # (num_bytes, rounds) -> nanoseconds of each round, at side 0
Bytes = npt.NDArray[np.uint8]


@contextmanager
def our_side(
    pod: str, side: int, meeting: Connection, strategy: WaitStrategy, ring: RingLayout, app_bytes: int
) -> Iterator[tuple[Endpoint, P2p, Rank]]:
    """An endpoint that knows the other side's."""
    me, peer = WORLD.ranks[side], WORLD.ranks[1 - side]
    endpoint = Endpoint(
        pod=pod,
        world=WORLD,
        me=me,
        incarnation=1,
        config=XcclConfig(),
        p2p_peers=[peer],
        p2p_ring=ring,
        app_bytes=app_bytes,
        strategy=strategy,
    )
    try:
        meeting.send(endpoint.segment.name)
        endpoint.learn(peer, 1, meeting.recv())
        p2p = P2p(endpoint)
        p2p.accept(peer)
        yield endpoint, p2p, peer
        p2p.close()
    finally:
        endpoint.close()


def play_copying(side: int, p2p: P2p, peer: Rank, buffer: Bytes | None) -> Play:
    sender, receiver = p2p.sender(peer), p2p.receiver(peer)
    own = np.empty(SIZE_MAX + 16, np.uint8)[16:] if buffer is None else buffer
    into = np.empty(SIZE_MAX + 16, np.uint8)[16:]

    def play(num_bytes: int, rounds: int) -> list[int]:
        out, got, deadline = own[:num_bytes], into[:num_bytes], Deadline.after_ms(TIMEOUT_MS)
        send, recv, stamps = sender.send, receiver.recv, [monotonic_ns()]
        for _ in range(rounds):
            if side == 0:
                send(out, 1, deadline)
                recv(got, 1, deadline)
            else:
                recv(got, 1, deadline)
                send(out, 1, deadline)
            stamps.append(monotonic_ns())
        return np.diff(stamps).tolist()

    return play


def play_in_place(side: int, p2p: P2p, peer: Rank) -> Play:
    sender, receiver = p2p.sender(peer), p2p.receiver(peer)

    def play(num_bytes: int, rounds: int) -> list[int]:
        deadline, shape, stamps = Deadline.after_ms(TIMEOUT_MS), (num_bytes,), [monotonic_ns()]

        def give() -> None:
            sender.reserve(shape, np.uint8, 1, deadline)[0] = 7
            sender.commit(1)

        def take() -> None:
            if receiver.peek(1, deadline)[0] != 7:
                raise AssertionError("another message")
            receiver.release(1)

        for _ in range(rounds):
            for act in (give, take) if side == 0 else (take, give):
                act()
            stamps.append(monotonic_ns())
        return np.diff(stamps).tolist()

    return play


def play_limit(side: int, endpoint: Endpoint, peer: Rank) -> Play:
    """The C ping-pong, in the app area of side 0."""
    segment = endpoint.segment if side == 0 else endpoint.peer(peer)
    played = 0

    def play(num_bytes: int, rounds: int) -> list[int]:
        nonlocal played
        durations = np.zeros(rounds, np.uint64)
        private = np.ones(num_bytes + 16, np.uint8)[16:]
        offset = segment.layout.app_offset
        timeout_ns = TIMEOUT_MS * 1_000_000
        if not _native.bench_pingpong(segment.buf, offset, side, private, played + 1, durations, timeout_ns):
            raise TimeoutError("the other side is silent")
        played += rounds
        return [int(value) for value in durations]

    return play


def play_messages(side: int, send: Callable[[Any], Any], recv: Callable[[], Any]) -> Play:
    def play(num_bytes: int, rounds: int) -> list[int]:
        out, stamps = np.ones(num_bytes, np.uint8), [monotonic_ns()]
        into = np.empty(num_bytes, np.uint8)
        for _ in range(rounds):
            if side == 0:
                send(out)
            into[:] = np.frombuffer(recv(), np.uint8)
            if side == 1:
                send(out)
            stamps.append(monotonic_ns())
        return np.diff(stamps).tolist()

    return play


def contenders(
    stack: ExitStack, pod: str, side: int, meeting: Connection, pipe: Connection
) -> dict[str, Play]:
    chunked = RingLayout(num_slots=8, slot_bytes=64 * 1024)
    plays: dict[str, Play] = {}
    area = 2 * SIZE_MAX + 8192
    endpoint, p2p, peer = stack.enter_context(our_side(f"{pod}c", side, meeting, Adaptive(1), chunked, area))
    plays["c"] = play_limit(side, endpoint, peer)
    strategies: dict[str, WaitStrategy] = {
        "spin": Spin(),
        "adaptive": Adaptive(XcclConfig().spin_us * 1000),
        "blocking": Blocking(),
    }
    for name, strategy in strategies.items():
        entered = our_side(f"{pod}{name}", side, meeting, strategy, chunked, 0)
        _, p2p, peer = stack.enter_context(entered)
        plays[name] = play_copying(side, p2p, peer, None)
    entered = our_side(f"{pod}pull", side, meeting, Adaptive(20_000), chunked, SIZE_MAX)
    endpoint, p2p, peer = stack.enter_context(entered)
    own = endpoint.segment.array(endpoint.segment.layout.app_offset, (SIZE_MAX,), np.uint8)
    plays["pull"] = play_copying(side, p2p, peer, own)
    whole = RingLayout(num_slots=2, slot_bytes=SIZE_MAX)
    entered = our_side(f"{pod}peek", side, meeting, Adaptive(20_000), whole, 0)
    endpoint, p2p, peer = stack.enter_context(entered)
    plays["peek"] = play_in_place(side, p2p, peer)
    socket = stack.enter_context(zmq.Context()).socket(zmq.PAIR)
    stack.callback(socket.close, 0)
    if side == 0:
        directory = stack.enter_context(tempfile.TemporaryDirectory())
        address = f"ipc://{directory}/s"
        socket.bind(address)
        meeting.send(address)
    else:
        socket.connect(meeting.recv())
    plays["zmq"] = play_messages(
        side, lambda array: socket.send(array, copy=False), lambda: socket.recv(copy=False).buffer
    )
    plays["pipe"] = play_messages(side, pipe.send_bytes, pipe.recv_bytes)
    return plays


def play_all(
    pod: str, side: int, meeting: Connection, pipe: Connection, options: argparse.Namespace
) -> dict[tuple[str, int], list[int]]:
    """Play one side of everything; return the rounds' nanoseconds by contender and size."""
    found: dict[tuple[str, int], list[int]] = defaultdict(list)
    cpus = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cpus[side % len(cpus)]})
    with ExitStack() as stack:
        plays = contenders(stack, pod, side, meeting, pipe)
        names = [name for name in plays if not options.only or name in options.only]
        for _ in range(options.repeats):
            for num_bytes in options.sizes:
                rounds = max(4, min(options.rounds, (64 << 20) // num_bytes))
                for name in names:
                    meeting.send(b"")  # both begin together
                    meeting.recv()
                    plays[name](num_bytes, min(WARM_UP, rounds))
                    found[name, num_bytes] += plays[name](num_bytes, rounds)
    return found


def other_side(pod: str, meeting: Connection, pipe: Connection, options: argparse.Namespace) -> None:
    play_all(pod, 1, meeting, pipe, options)


def summary(durations: list[int]) -> dict[str, float]:
    half_us = np.array(durations) / 2000
    return {"p50_us": float(np.percentile(half_us, 50)), "p99_us": float(np.percentile(half_us, 99))}


def table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    sizes = [int(size) for size in next(iter(results.values()))]
    lines = ["one way, us: p50 / p99 (p50 relative to C)", "".join(f"{size:>26}" for size in ["", *sizes])]
    for name, by_size in results.items():
        cells = []
        for size, found in by_size.items():
            limit = results.get("c", {}).get(size, {}).get("p50_us", float("nan"))
            text = f"{found['p50_us']:.2f} / {found['p99_us']:.1f} ({found['p50_us'] / limit:.2f})"
            cells.append(f"{text:>26}")
        lines.append(f"{name:>26}" + "".join(cells))
    return "\n".join(lines)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bus_pingpong", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="bytes, at most 8 MiB")
    parser.add_argument("--rounds", type=int, default=400, help="per repeat; fewer from 256 KiB on")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=[], help="contenders to play")
    parser.add_argument("--json", type=Path, default=None, help="where to write the figures")
    options = parser.parse_args(arguments)
    if not all(1 <= size <= SIZE_MAX for size in options.sizes):
        parser.error(f"--sizes: each must be in 1..{SIZE_MAX}")
    return options


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    pod = f"bench{uuid.uuid4().hex[:8]}"
    context = multiprocessing.get_context("spawn")
    meeting, their_meeting = context.Pipe()
    pipe, their_pipe = context.Pipe()
    other = context.Process(target=other_side, args=(pod, their_meeting, their_pipe, options))
    other.start()
    try:
        found = play_all(pod, 0, meeting, pipe, options)
        other.join(TIMEOUT_MS / 1000)
    finally:
        other.kill()
        other.join()
        sweep(segment_prefix(pod)[:-1])
    results: dict[str, dict[str, dict[str, float]]] = defaultdict(dict)
    for (name, size), durations in found.items():
        results[name][str(size)] = summary(durations)
    print(table(results))
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=2), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
