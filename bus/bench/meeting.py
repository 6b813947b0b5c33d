"""The wire between the harness and the processes of a way: JSON over a Unix socket, one message at a time.

    process -> harness   hello {rank, pid}; then for each command one or more of
                         gather {value}: wait until all have sent theirs, get the list
                         serving {}:     this process only serves; tell it when the others are done
                         done {...}:     the result          error {text}: it failed; the process ends
    harness -> process   do {...}; gathered {values}; stop {}; end {}

A process whose harness is gone ends at once, wherever it waits: a thread watches the socket for the hang-up.
"""

from __future__ import annotations

import json
import os
import select
import threading
from collections.abc import Callable
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import Any

ADDRESS, RANK = "XDS_BENCH_ADDRESS", "XDS_BENCH_RANK"
# The variable that names the rank: ours, Open MPI's, MPICH's.
RANK_VARIABLES = (RANK, "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK")

Message = dict[str, Any]


def put(connection: Connection, message: Message) -> None:
    """Send one message."""
    connection.send_bytes(json.dumps(message).encode())


def take(connection: Connection) -> Message:
    """Receive one message. EOFError, OSError: the other side is gone."""
    message: Message = json.loads(connection.recv_bytes())
    return message


class Meeting:
    """A process's end. One thread."""

    def __init__(self, connection: Connection, rank: int, num_ranks: int, folder: Path) -> None:
        self.rank, self.num_ranks, self.folder = rank, num_ranks, folder
        self._connection = connection

    @property
    def name(self) -> str:
        """A name for what this run creates on the machine; the harness removes what begins with it."""
        return self.folder.name

    @classmethod
    def join(cls) -> Meeting:
        """Connect to the harness that the environment names."""
        rank = next(int(os.environ[name]) for name in RANK_VARIABLES if name in os.environ)
        address = os.environ[ADDRESS]
        connection = Client(address, family="AF_UNIX")
        put(connection, {"hello": {"rank": rank, "pid": os.getpid()}})
        welcome = take(connection)
        threading.Thread(target=_end_with, args=(connection.fileno(),), daemon=True).start()
        return cls(connection, rank, welcome["num_ranks"], Path(address).parent)

    def gather(self, value: Any = None) -> list[Any]:
        """Return the values of all ranks once all have called this."""
        self.put({"gather": value})
        values: list[Any] = self.take()["gathered"]
        return values

    def serve(self, stopped: Callable[[], None]) -> threading.Thread:
        """Tell the harness that this process serves; `stopped` is called, in a thread, when the others are done.

        Returns the started thread; join it before anything else is sent.
        """
        self.put({"serving": {}})

        def await_stop() -> None:
            self.take()
            stopped()

        thread = threading.Thread(target=await_stop)
        thread.start()
        return thread

    def put(self, message: Message) -> None:
        """Send a message to the harness."""
        put(self._connection, message)

    def take(self) -> Message:
        """Receive a message from the harness."""
        return take(self._connection)


def _end_with(fd: int) -> None:
    poll = select.poll()
    poll.register(fd, select.POLLRDHUP)
    poll.poll()
    os._exit(1)
