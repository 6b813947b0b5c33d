"""All-to-all between processes, MoE-shaped: ours against pyzmq, torch gloo and MPI.

Every way does the same work per exchange: rows of a batch go to the ranks of their top-k experts (counts, then data),
come back as they are, and are added with the router's weights. Experts compute nothing. Times are of whole exchanges
on each rank, Python included, pooled over ranks: p50 and p99 in microseconds. A peer that is not installed is reported
as missing. A number taken beside other work tells little: look at the machine's load first.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
NUM_EXPERTS = 64
WARM_UP = 5
DEADLINE_MS = 60_000
WAYS = ("dispatch", "dispatch-int8", "a2e-direct", "a2e-trampoline", "zmq", "gloo", "mpi")


@dataclass(frozen=True)
class Case:
    """One shape."""

    batch: int
    hidden: int
    top_k: int

    @property
    def iterations(self) -> int:
        """The same on all ranks: fewer for big shapes."""
        return max(20, min(300, 40_000_000 // (self.batch * self.top_k * self.hidden * 4)))


def cases(arguments: argparse.Namespace) -> list[Case]:
    return [Case(b, h, k) for h in arguments.hidden for k in arguments.top_k for b in arguments.batch]


def inputs(case: Case, rank: int) -> tuple[Any, Any, Any]:
    """x, topk_idx, topk_weights of a rank."""
    rng = np.random.default_rng((rank, case.batch, case.hidden, case.top_k))
    x = rng.standard_normal((case.batch, case.hidden)).astype(np.float32)
    idx = np.argsort(rng.random((case.batch, NUM_EXPERTS)), axis=1)[:, : case.top_k].astype(np.int32)
    return x, np.ascontiguousarray(idx), rng.random(idx.shape, np.float32)


def measure(exchange: Callable[[int], None], case: Case) -> list[int]:
    """Return the durations of `case.iterations` exchanges, ns."""
    for step in range(1, WARM_UP + 1):
        exchange(step)
    durations = []
    for step in range(WARM_UP + 1, WARM_UP + 1 + case.iterations):
        begin = time.monotonic_ns()
        exchange(step)
        durations.append(time.monotonic_ns() - begin)
    return durations


# ---------------------------------------------------------------- workers: talk to the driver over stdin and stdout


def meet() -> None:
    """All ranks of the run have come this far."""
    print("ready", flush=True)
    sys.stdin.readline()


def run_dispatch(rank: int, ranks: int, pod: str, todo: Sequence[Case], *, int8: bool, spin_us: int) -> None:
    from bus.clock import Deadline
    from bus.config import XcclConfig
    from bus.memory.segment import Segment, segment_name
    from bus.xccl.dispatch import Dispatcher, DispatchShape
    from bus.xccl.endpoint import Rank
    from bus.xccl.event import Event
    from bus.xccl.group import AddressTable

    for number, case in enumerate(todo, 1):
        shape = DispatchShape(
            num_ranks=ranks,
            max_tokens=case.batch,
            top_k=case.top_k,
            hidden=case.hidden,
            num_local_experts=NUM_EXPERTS // ranks,
            int8=int8,
        )
        names = [segment_name(pod, "expert", r, number) for r in range(ranks)]
        segment = Segment.create(
            names[rank], shape.layout(), service="expert", index=rank, incarnation=number
        )
        table = AddressTable()
        for other, name in enumerate(names):
            table.learn(Rank("expert", other), number, name)
        side = Dispatcher(segment, shape, rank, table, config=XcclConfig(spin_us=spin_us))
        x, idx, weights = inputs(case, rank)
        out = np.empty_like(x)
        meet()

        def exchange(step: int) -> None:
            deadline = Deadline.after_ms(DEADLINE_MS)
            result, handle = side.dispatch(x, idx, event=Event(step, 0), deadline=deadline)  # noqa: B023
            side.combine(result.x, weights, handle, deadline=deadline, out=out)  # noqa: B023

        report(case, measure(exchange, case))
        meet()
        side.close()
        table.close()
        segment.close()
        segment.unlink()


def run_a2e(rank: int, ranks: int, pod: str, todo: Sequence[Case], *, trampoline: bool, spin_us: int) -> None:
    """The first half of the ranks are attention ranks, the second half expert ranks."""
    from bus.memory.segment import Segment, segment_name
    from bus.xccl.endpoint import Rank
    from bus.xccl.group import AddressTable
    from bus.xccl.relay_layout import RelayShape

    half = ranks // 2
    service, index = ("attention", rank) if rank < half else ("expert", rank - half)
    for number, case in enumerate(todo, 1):
        shape = RelayShape(
            num_attention_ranks=half,
            num_expert_ranks=half,
            rows_max=case.batch,
            num_slots=case.top_k,
            hidden=case.hidden,
        )
        layout = shape.attention_layout() if service == "attention" else shape.expert_layout()
        name = segment_name(pod, service, index, number)
        segment = Segment.create(name, layout, service=service, index=index, incarnation=number)
        table = AddressTable()
        for kind in ("attention", "expert"):
            for other in range(half):
                table.learn(Rank(kind, other), number, segment_name(pod, kind, other, number))
        meet()
        if service == "attention":
            ask_experts(segment, shape, index, table, case, trampoline=trampoline, spin_us=spin_us)
        else:
            serve_experts(segment, shape, index, table, spin_us=spin_us)
        meet()
        table.close()
        segment.close()
        segment.unlink()


def ask_experts(
    segment: Any, shape: Any, index: int, table: Any, case: Case, *, trampoline: bool, spin_us: int
) -> None:
    from bus.clock import Deadline
    from bus.config import XcclConfig
    from bus.xccl.cost import Route
    from bus.xccl.event import Event
    from bus.xccl.trampoline import RoutedAttention

    side = RoutedAttention(segment, shape, index, table, config=XcclConfig(spin_us=spin_us))
    x, idx, weights = inputs(case, index)
    slots = np.empty((case.batch, case.top_k, case.hidden), np.float32)
    slot_rank = (idx % shape.num_expert_ranks).astype(np.int32)
    route = Route.TRAMPOLINE if trampoline else Route.DIRECT

    def exchange(step: int) -> None:
        handle = side.a2e_send(x, slot_rank, idx, Event(step, 0), route)
        side.e2a_recv(handle, slots, Deadline.after_ms(DEADLINE_MS))
        np.einsum("tk,tkh->th", weights, slots)

    report(case, measure(exchange, case))


def serve_experts(segment: Any, shape: Any, index: int, table: Any, *, spin_us: int) -> None:
    import threading

    from bus.config import XcclConfig
    from bus.xccl.relay import RoutedExpert

    side = RoutedExpert(segment, shape, index, table, config=XcclConfig(spin_us=spin_us))
    stopping = threading.Event()

    def await_end() -> None:
        print("serving", flush=True)
        sys.stdin.readline()
        stopping.set()
        segment.ring_doorbell()

    thread = threading.Thread(target=await_end)
    thread.start()
    while not stopping.is_set():
        seen = side.doorbell()
        for arrival in side.poll(raise_error):
            np.take(arrival.x, arrival.pair_row, axis=0, out=arrival.y)
            side.commit(arrival)
        side.wait(seen, spin_ns=spin_us * 1_000, timeout_ns=1_000_000_000)
    thread.join()


def raise_error(error: Exception) -> None:
    raise error


class MessageWay:
    """Dispatch and combine in NumPy over a plain all-to-all of rows."""

    def __init__(
        self,
        ranks: int,
        swap_counts: Callable[[Any], Any],
        swap_rows: Callable[[Any, Any, Any], Any],
    ) -> None:
        self.ranks, self.swap_counts, self.swap_rows = ranks, swap_counts, swap_rows

    def exchange(self, x: Any, idx: Any, weights: Any) -> Any:
        """Counts, then data; the same way back; weighted sum."""
        flat = idx.reshape(-1)
        order = np.argsort(flat, kind="stable")
        sent = np.bincount(flat // (NUM_EXPERTS // self.ranks), minlength=self.ranks)
        received = self.swap_counts(sent)
        rows = self.swap_rows(x[order // idx.shape[1]], sent, received)
        back = self.swap_rows(rows, received, sent)
        slots = np.empty((flat.size, x.shape[1]), np.float32)
        slots[order] = back
        return np.einsum("tk,tkh->th", weights, slots.reshape(*idx.shape, -1))


def run_messages(way: MessageWay, rank: int, todo: Sequence[Case]) -> None:
    for case in todo:
        x, idx, weights = inputs(case, rank)
        meet()
        report(case, measure(lambda step: way.exchange(x, idx, weights), case))  # noqa: B023
        meet()


def run_zmq(rank: int, ranks: int, pod: str, todo: Sequence[Case]) -> None:
    import zmq

    context = zmq.Context()
    place = Path(tempfile.gettempdir()) / f"xds-bench-{pod}"
    place.mkdir(mode=0o700, exist_ok=True)
    inbox = {r: context.socket(zmq.PAIR) for r in range(ranks) if r != rank}
    for other, socket in inbox.items():
        low, high = min(rank, other), max(rank, other)
        address = f"ipc://{place}/{low}-{high}"
        socket.set_hwm(0)
        if rank == low:
            socket.bind(address)
        else:
            socket.connect(address)

    def swap(parts: list[bytes | memoryview]) -> list[Any]:
        for other, socket in inbox.items():
            socket.send(parts[other], copy=len(parts[other]) < 65_536)
        return [inbox[r].recv(copy=False) if r != rank else parts[r] for r in range(ranks)]

    def swap_counts(sent: Any) -> Any:
        got = swap([int(n).to_bytes(8, "little") for n in sent])
        return np.array([int.from_bytes(memoryview(g), "little") for g in got])

    def swap_rows(rows: Any, sent: Any, received: Any) -> Any:
        pieces = np.split(rows, np.cumsum(sent)[:-1])
        got = swap([memoryview(p.tobytes()) for p in pieces])
        return np.concatenate(
            [np.frombuffer(memoryview(g), np.float32).reshape(-1, rows.shape[1]) for g in got]
        )

    run_messages(MessageWay(ranks, swap_counts, swap_rows), rank, todo)
    context.destroy(linger=0)
    if rank == 0:
        shutil.rmtree(place, ignore_errors=True)


def run_gloo(rank: int, ranks: int, pod: str, todo: Sequence[Case]) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    store = Path(tempfile.gettempdir()) / f"xds-bench-{pod}"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)

    def swap_counts(sent: Any) -> Any:
        got = torch.empty(ranks, dtype=torch.int64)
        dist.all_to_all_single(got, torch.from_numpy(sent.astype(np.int64)))
        return got.numpy()

    def swap_rows(rows: Any, sent: Any, received: Any) -> Any:
        got = torch.empty((int(received.sum()), rows.shape[1]))
        dist.all_to_all_single(got, torch.from_numpy(rows), received.tolist(), sent.tolist())
        return got.numpy()

    run_messages(MessageWay(ranks, swap_counts, swap_rows), rank, todo)
    dist.destroy_process_group()
    store.unlink(missing_ok=True)


def run_mpi(todo: Sequence[Case]) -> None:
    """Started by mpiexec, so it has no driver on stdin: rank 0 prints what all ranks measured."""
    from mpi4py import MPI

    world = MPI.COMM_WORLD

    def swap_counts(sent: Any) -> Any:
        got = np.empty(world.size, np.int64)
        world.Alltoall(sent.astype(np.int64), got)
        return got

    def swap_rows(rows: Any, sent: Any, received: Any) -> Any:
        width = rows.shape[1]
        got = np.empty((int(received.sum()), width), np.float32)
        world.Alltoallv([rows, sent * width, MPI.FLOAT], [got, received * width, MPI.FLOAT])
        return got

    way = MessageWay(world.size, swap_counts, swap_rows)
    for case in todo:
        x, idx, weights = inputs(case, world.rank)
        world.Barrier()
        mine = measure(lambda step: way.exchange(x, idx, weights), case)  # noqa: B023
        pooled = world.gather(mine, root=0)
        if pooled is not None:
            report(case, [d for durations in pooled for d in durations])


def report(case: Case, durations: list[int]) -> None:
    print(json.dumps({"case": asdict(case), "durations": durations}), flush=True)


# ---------------------------------------------------------------- driver


def missing(way: str, arguments: argparse.Namespace) -> str | None:
    """Why this way cannot be measured here, or None."""
    if way == "zmq" and importlib.util.find_spec("zmq") is None:
        return "pyzmq is not installed"
    if way == "mpi":
        if shutil.which(shlex.split(arguments.mpiexec)[0]) is None:
            return f"{arguments.mpiexec} is not installed (--mpiexec)"
        return None if has_module(arguments.mpi_python, "mpi4py") else "mpi4py is not installed"
    if way == "gloo" and not has_module(arguments.torch_python, "torch"):
        return "torch is not installed (--torch-python)"
    return None


def has_module(python: str, module: str) -> bool:
    try:
        probe = subprocess.run([python, "-c", f"import {module}"], capture_output=True, check=False)
    except FileNotFoundError:
        return False
    return probe.returncode == 0


def worker_command(way: str, rank: int, ranks: int, pod: str, arguments: argparse.Namespace) -> list[str]:
    pythons = {"gloo": arguments.torch_python, "mpi": arguments.mpi_python}
    shape = [
        *("--batch", *map(str, arguments.batch)),
        *("--hidden", *map(str, arguments.hidden)),
        *("--top-k", *map(str, arguments.top_k)),
        *("--spin-us", str(arguments.spin_us)),
    ]
    worker = ["--worker", way, "--rank", str(rank), "--ranks", str(ranks), "--pod", pod]
    return [pythons.get(way, sys.executable), str(Path(__file__)), *worker, *shape]


def run_way(way: str, ranks: int, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield one result per case."""
    pod = f"bench{uuid.uuid4().hex[:10]}"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    if way == "mpi":
        launcher = [*shlex.split(arguments.mpiexec), "-n", str(ranks)]
        command = [*launcher, *worker_command(way, 0, ranks, pod, arguments)]
        done = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True)
        for line in done.stdout.splitlines():
            yield summary(way, ranks, [json.loads(line)])
        return
    workers = [
        subprocess.Popen(
            worker_command(way, rank, ranks, pod, arguments),
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        for _ in cases(arguments):
            release(workers, "ready")
            answers = [read(worker) for worker in workers]
            servers = [w for w, a in zip(workers, answers, strict=True) if a == "serving"]
            for server in servers:
                write(server)
            yield summary(way, ranks, [json.loads(a) for a in answers if a != "serving"])
            release(workers, "ready")
        for worker in workers:
            worker.wait(30)
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.kill()
            worker.communicate()


def release(workers: Sequence[subprocess.Popen[str]], word: str) -> None:
    for worker in workers:
        if (line := read(worker)) != word:
            raise RuntimeError(f"a worker said {line!r} instead of {word!r}")
    for worker in workers:
        write(worker)


def read(worker: subprocess.Popen[str]) -> str:
    assert worker.stdout is not None
    return worker.stdout.readline().rstrip("\n")


def write(worker: subprocess.Popen[str]) -> None:
    assert worker.stdin is not None
    worker.stdin.write("\n")
    worker.stdin.flush()


def summary(way: str, ranks: int, reports: list[dict[str, Any]]) -> dict[str, Any]:
    pooled = np.array([d for r in reports for d in r["durations"]]) / 1_000
    p50, p99 = np.percentile(pooled, (50, 99))
    return {
        "way": way,
        "ranks": ranks,
        **reports[0]["case"],
        "p50_us": round(float(p50), 1),
        "p99_us": round(float(p99), 1),
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32, 96])
    parser.add_argument("--hidden", type=int, nargs="+", default=[256, 2048])
    parser.add_argument("--top-k", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--spin-us", type=int, default=500, help="longest yielding burst before sleeping")
    parser.add_argument("--torch-python", default=sys.executable, help="interpreter that has torch")
    parser.add_argument("--mpi-python", default=sys.executable, help="interpreter that has mpi4py")
    parser.add_argument("--mpiexec", default="mpiexec", help="how to start MPI processes, options included")
    parser.add_argument("--json", type=Path, help="write all results to this file")
    for hidden in ("--worker", "--rank", "--pod"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    return parser.parse_args()


def run_worker(arguments: argparse.Namespace) -> None:
    way, rank, ranks, pod = arguments.worker, int(arguments.rank), arguments.ranks[0], arguments.pod
    todo, spin_us = cases(arguments), arguments.spin_us
    if way.startswith("dispatch"):
        run_dispatch(rank, ranks, pod, todo, int8=way.endswith("int8"), spin_us=spin_us)
    elif way.startswith("a2e"):
        run_a2e(rank, ranks, pod, todo, trampoline=way.endswith("trampoline"), spin_us=spin_us)
    elif way == "zmq":
        run_zmq(rank, ranks, pod, todo)
    elif way == "gloo":
        run_gloo(rank, ranks, pod, todo)
    else:
        run_mpi(todo)


def main() -> None:
    arguments = parse_arguments()
    if arguments.worker:
        run_worker(arguments)
        return
    results: list[dict[str, Any]] = []
    print(f"{'way':<16}{'ranks':>6}{'batch':>6}{'hidden':>7}{'top-k':>6}{'p50 us':>10}{'p99 us':>10}")
    for way in arguments.ways:
        if (why := missing(way, arguments)) is not None:
            print(f"{way:<16}missing: {why}")
            results.append({"way": way, "missing": why})
            continue
        for ranks in arguments.ranks:
            for r in run_way(way, ranks, arguments):
                results.append(r)
                print(
                    f"{r['way']:<16}{r['ranks']:>6}{r['batch']:>6}{r['hidden']:>7}{r['top_k']:>6}"
                    f"{r['p50_us']:>10}{r['p99_us']:>10}",
                    flush=True,
                )
    if arguments.json:
        arguments.json.write_text(json.dumps({"load": os.getloadavg(), "results": results}, indent=1))


if __name__ == "__main__":
    main()
