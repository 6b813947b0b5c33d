"""The processes of one way: started together, asked together, ended together.

Life cycle: 1. start the processes, or the launcher that starts them; each connects and says which rank it is. 2. `ask`
sends one command to all and returns the result of each; processes that are not asked sleep in `recv`. 3. A process
that dies, fails or is silent makes `ask` raise GroupFailed with what it wrote last, and the group is closed. 4. `close`
ends every process, by a descriptor for its id, so that nobody else can be hit.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection, Listener, wait
from pathlib import Path
from typing import Any

from bus.bench.launch import Way, launch
from bus.bench.meeting import Message, put, take

START_TIMEOUT_S = 90.0
ANSWER_TIMEOUT_S = 180.0
END_TIMEOUT_S = 5.0


class GroupFailed(Exception):
    """A way cannot go on; the text says why."""


class Group:
    """The processes of `way`, rank by rank.

    Raises:
        GroupFailed: they did not all connect; everything that was started has ended.
    """

    def __init__(self, way: Way, num_ranks: int, folder: Path) -> None:
        self.way, self.num_ranks = way, num_ranks
        self._folder = folder
        self._processes: list[subprocess.Popen[bytes]] = []
        self._connections: list[Connection] = []
        self._pid_fds: dict[int, int] = {}
        self.pids: list[int] = []
        self._log = folder / f"{way.name}-{num_ranks}.log"
        try:
            self._start()
        except BaseException:
            self.close(is_healthy=False)
            raise

    def _start(self) -> None:
        address = self._folder / f"{self.way.name}-{self.num_ranks}"
        address.unlink(missing_ok=True)
        plan = launch(self.way, self.num_ranks, address)
        # The backlog holds all ranks: they connect at once, and we may be slow.
        with Listener(str(address), family="AF_UNIX", backlog=self.num_ranks) as listener:
            with self._log.open("wb") as log:
                for command, environment in zip(plan.commands, plan.environments, strict=True):
                    self._processes.append(
                        subprocess.Popen(
                            command,
                            env=environment,
                            stdin=subprocess.DEVNULL,
                            stdout=log,
                            stderr=log,
                            # Ctrl-C is for the harness, which ends them in order. Not a session for each: the kernel
                            # schedules sessions as groups (autogroup), and a yield reaches its own group only.
                            process_group=0,
                        )
                    )
            self._accept(listener)

    def _accept(self, listener: Listener) -> None:
        found: dict[int, tuple[Connection, int]] = {}
        socket = listener._listener._socket  # type: ignore[attr-defined]
        socket.settimeout(0.1)
        end = time.monotonic() + START_TIMEOUT_S
        while len(found) < self.num_ranks:
            try:
                connection = listener.accept()
            except TimeoutError:
                if any(process.poll() not in (None, 0) for process in self._processes):
                    raise self._failed("a process ended before it had connected") from None
                if time.monotonic() > end:
                    text = f"{len(found)} of {self.num_ranks} processes connected in {START_TIMEOUT_S:.0f} s"
                    raise self._failed(text) from None
                continue
            hello = take(connection)["hello"]
            self._pid_fds[hello["pid"]] = os.pidfd_open(hello["pid"])
            found[hello["rank"]] = (connection, hello["pid"])
            put(connection, {"num_ranks": self.num_ranks})
        self._connections = [found[rank][0] for rank in range(self.num_ranks)]
        self.pids = [found[rank][1] for rank in range(self.num_ranks)]

    def _failed(self, text: str) -> GroupFailed:
        lines = self._log.read_text("utf-8", "replace").strip().splitlines() if self._log.exists() else []
        said = f": {lines[-1].strip()}" if lines else ""
        return GroupFailed(f"{text}{said}")

    def ask(self, command: Message, *, timeout_s: float = ANSWER_TIMEOUT_S) -> list[Any]:
        """Send `command` to every process and return each one's result, by rank.

        Raises:
            GroupFailed: a process ended, reported an error, or was silent for `timeout_s`. The group is closed.
        """
        try:
            for rank in range(self.num_ranks):
                self._put(rank, {"do": command})
            return self._collect(time.monotonic() + timeout_s)
        except BaseException:
            self.close(is_healthy=False)
            raise

    def _collect(self, end: float) -> list[Any]:
        results: list[Any] = [None] * self.num_ranks
        open_ranks, serving = set(range(self.num_ranks)), set[int]()
        gathered: dict[int, Any] = {}
        while open_ranks:
            for rank, message in self._messages(open_ranks - set(gathered), end):
                if "error" in message:
                    raise GroupFailed(f"rank {rank}: {message['error']}")
                if "gather" in message:
                    gathered[rank] = message["gather"]
                elif "serving" in message:
                    serving.add(rank)
                else:
                    results[rank] = message["done"]
                    open_ranks.discard(rank)
            if len(gathered) == self.num_ranks:
                for rank in range(self.num_ranks):
                    self._put(rank, {"gathered": [gathered[other] for other in range(self.num_ranks)]})
                gathered.clear()
            if serving and serving == open_ranks:
                for rank in serving:
                    self._put(rank, {"stop": {}})
                serving = set()
        return results

    def _messages(self, ranks: set[int], end: float) -> list[tuple[int, Message]]:
        by_connection = {self._connections[rank]: rank for rank in ranks}
        ready = wait(list(by_connection), timeout=max(0.0, end - time.monotonic()))
        if not ready:
            raise self._failed(f"ranks {', '.join(map(str, sorted(ranks)))} gave no answer in time")
        found = []
        for connection in ready:
            rank = by_connection[connection]  # type: ignore[index]
            try:
                found.append((rank, take(self._connections[rank])))
            except (EOFError, OSError):
                raise self._ended(rank) from None
        return found

    def _put(self, rank: int, message: Message) -> None:
        try:
            put(self._connections[rank], message)
        except OSError:
            raise self._ended(rank) from None

    def _ended(self, rank: int) -> GroupFailed:
        return self._failed(f"rank {rank} (pid {self.pids[rank]}) ended")

    def close(self, *, is_healthy: bool = True) -> None:
        """End all processes and wait for them. Idempotent. Those that may hang are not asked to end by themselves."""
        if is_healthy:
            for connection in self._connections:
                with contextlib.suppress(OSError):
                    put(connection, {"end": {}})
            self._wait(END_TIMEOUT_S)
        for connection in self._connections:
            connection.close()
        self._connections = []
        for fd in self._pid_fds.values():
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(fd, signal.SIGKILL)
            os.close(fd)
        self._pid_fds = {}
        self._wait(END_TIMEOUT_S)  # a launcher cleans up after its processes
        for process in self._processes:
            process.kill()
            process.wait()
        self._processes = []

    def _wait(self, timeout_s: float) -> None:
        end = time.monotonic() + timeout_s
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, end - time.monotonic()))


def close_all(groups: Sequence[Group]) -> None:
    """Close every group, also when closing one is interrupted."""
    with contextlib.ExitStack() as stack:
        for group in groups:
            stack.callback(group.close)
