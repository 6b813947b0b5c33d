"""mpi4py, on Open MPI or on MPICH: Send and Recv of buffers, Alltoall of counts and equal
blocks, as calls and as persistent requests, Alltoallv of rows.

The harness starts the processes under the MPI's own launcher, names the library and sets what was best of what was
tried on two cores with 8 ranks (bus/bench/launch.py): for Open MPI ob1 over shared memory, linear Alltoallv, and
`mpi_yield_when_idle`; for MPICH a yield after 10 polls, which makes small exchanges up to three times faster. Tried and
not better: other eager limits, no single copy (CMA), MPICH's scattered Alltoallv.
"""

from __future__ import annotations

from contextlib import ExitStack
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt

from bus.bench.meeting import Meeting, Message
from bus.bench.pingpong import Ends, Link
from bus.bench.rows import PERSISTENT, PLAIN, MessageWay, RowsWay
from bus.bench.shared import note_mapped

Bytes = npt.NDArray[np.uint8]


class Partner:
    """Send and Recv with the partner."""

    def __init__(self, mpi: Any, peer: int, size_max: int) -> None:
        self._mpi, self._peer = mpi, peer
        self._out, self._into = np.ones(size_max, np.uint8), np.ones(size_max, np.uint8)

    def ends(self, num_bytes: int) -> Ends:
        """See `Link`."""
        world, byte = self._mpi.COMM_WORLD, self._mpi.BYTE
        out, into = [self._out, num_bytes, byte], [self._into, num_bytes, byte]
        payload = self._out[:num_bytes]
        return Ends(world.Send, (out, self._peer), world.Recv, (into, self._peer), lambda: payload.fill(7))


class World:
    """All ranks; see `bus.bench.rows.Transport`."""

    def __init__(self, mpi: Any) -> None:
        self._world, self._byte = mpi.COMM_WORLD, mpi.BYTE

    def swap_equal(self, out: Bytes, into: Bytes) -> None:
        """See `Transport`."""
        self._world.Alltoall([out, self._byte], [into, self._byte])

    def swap(self, out: Bytes, sent: list[int], into: Bytes, received: list[int]) -> None:
        """See `Transport`."""
        self._world.Alltoallv([out, sent, self._byte], [into, received, self._byte])


class PersistentWorld(World):
    """The same with a persistent request for the equal blocks of one pair of buffers (MPI 4)."""

    def __init__(self, mpi: Any) -> None:
        super().__init__(mpi)
        self._request: Any = None
        self._buffers: tuple[Bytes, Bytes] | None = None

    def swap_equal(self, out: Bytes, into: Bytes) -> None:
        """See `Transport`."""
        if self._buffers is None or self._buffers[0] is not out or self._buffers[1] is not into:
            self.free()
            self._request = self._world.Alltoall_init([out, self._byte], [into, self._byte])
            self._buffers = out, into
        self._request.Start()
        self._request.Wait()

    def free(self) -> None:
        """Give the request up."""
        if self._request is not None:
            self._request.Free()
        self._request = self._buffers = None


class PersistentRows(MessageWay):
    """The plain all-to-all over persistent requests."""

    def __init__(self, mpi: Any, meeting: Meeting) -> None:
        self._persistent = PersistentWorld(mpi)
        super().__init__(self._persistent, meeting)

    def supports(self, case: Message) -> bool:
        """See `RowsWay`."""
        return bool(case["form"] == PLAIN)

    def finish(self) -> None:
        """See `RowsWay`."""
        self._persistent.free()
        super().finish()


def open_pairs(meeting: Meeting, stack: ExitStack, size_max: int, options: Message) -> dict[str, Link]:
    """Return the link with the partner."""
    mpi = _load(meeting)
    return {_name(mpi): Partner(mpi, meeting.rank ^ 1, size_max)}


def open_rows(meeting: Meeting, stack: ExitStack, options: Message) -> dict[str, RowsWay]:
    """Return the ways among all ranks."""
    mpi = _load(meeting)
    ways: dict[str, RowsWay] = {_name(mpi): MessageWay(World(mpi), meeting)}
    if _has_persistent_collectives(mpi):
        ways[f"{_name(mpi)} {PERSISTENT}"] = PersistentRows(mpi, meeting)
    return ways


def _load(meeting: Meeting) -> Any:
    """Initialise MPI; what MPICH's ranks leave in /dev/shm when they are killed is noted for the harness."""
    mpi: Any = import_module("mpi4py.MPI")
    note_mapped(meeting.folder, "mpich_shm_")
    return mpi


def _has_persistent_collectives(mpi: Any) -> bool:
    block = np.zeros(1, np.uint8)
    try:
        mpi.COMM_SELF.Alltoall_init([block, mpi.BYTE], [block.copy(), mpi.BYTE]).Free()
    except (NotImplementedError, mpi.Exception):
        return False
    return True


def _name(mpi: Any) -> str:
    return "Open MPI" if "Open MPI" in mpi.Get_library_version() else "MPICH"
