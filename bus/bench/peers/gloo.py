"""torch.distributed with gloo: send and recv, all_to_all_single; one thread of torch per process."""

from __future__ import annotations

from contextlib import ExitStack
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt

from bus.bench.meeting import Meeting, Message
from bus.bench.pingpong import Ends, Link
from bus.bench.rows import MessageWay, RowsWay

Bytes = npt.NDArray[np.uint8]


class Partner:
    """send and recv with the partner."""

    def __init__(self, gloo: Any, torch: Any, peer: int, size_max: int) -> None:
        self._gloo, self._peer = gloo, peer
        self._out, self._into = (
            torch.ones(size_max, dtype=torch.uint8),
            torch.ones(size_max, dtype=torch.uint8),
        )

    def ends(self, num_bytes: int) -> Ends:
        """See `Link`."""
        out, into = self._out[:num_bytes], self._into[:num_bytes]
        return Ends(
            self._gloo.send, (out, self._peer), self._gloo.recv, (into, self._peer), lambda: out.fill_(7)
        )


class Ranks:
    """All ranks; see `bus.bench.rows.Transport`."""

    def __init__(self, gloo: Any, torch: Any) -> None:
        self._gloo, self._tensor = gloo, torch.from_numpy

    def swap_equal(self, out: Bytes, into: Bytes) -> None:
        """See `Transport`."""
        self._gloo.all_to_all_single(self._tensor(into), self._tensor(out))

    def swap(self, out: Bytes, sent: list[int], into: Bytes, received: list[int]) -> None:
        """See `Transport`."""
        out = out[: sum(sent)]
        self._gloo.all_to_all_single(self._tensor(into), self._tensor(out), received, sent)


def open_pairs(meeting: Meeting, stack: ExitStack, size_max: int, options: Message) -> dict[str, Link]:
    """Return the link with the partner."""
    gloo, torch = _join(meeting, stack)
    return {"gloo": Partner(gloo, torch, meeting.rank ^ 1, size_max)}


def open_rows(meeting: Meeting, stack: ExitStack, options: Message) -> dict[str, RowsWay]:
    """Return the way among all ranks."""
    return {"gloo": MessageWay(Ranks(*_join(meeting, stack)), meeting)}


def _join(meeting: Meeting, stack: ExitStack) -> tuple[Any, Any]:
    torch, gloo = import_module("torch"), import_module("torch.distributed")
    torch.set_num_threads(1)
    store = meeting.folder / f"gloo-{meeting.num_ranks}"
    gloo.init_process_group(
        "gloo", init_method=f"file://{store}", rank=meeting.rank, world_size=meeting.num_ranks
    )
    stack.callback(gloo.destroy_process_group)
    return gloo, torch
