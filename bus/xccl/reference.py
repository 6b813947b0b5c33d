"""The slow twins: what the collectives compute, in one process, sequential and obvious. Fast paths must equal them."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from bus.errors import EventMismatch, PeerStalled
from bus.xccl.endpoint import Rank
from bus.xccl.message import MessageHeader, check_array
from bus.xccl.p2p import check_out

Float32Array = npt.NDArray[np.float32]
Int32Array = npt.NDArray[np.int32]


def exchange(
    x: Float32Array,
    slot_rank: Int32Array,
    slot_expert: Int32Array,
    product: Callable[[int, Float32Array], Float32Array],
) -> Float32Array:
    """Return what `a2e_send` followed by `e2a_recv` must yield (twin of `bus.xccl.a2e`).

    Args:
        x: [num_rows, hidden] float32.
        slot_rank, slot_expert: [num_rows, num_slots] int32; rank -1 = no expert for this slot.
        product: (expert, [1, hidden]) -> [1, hidden]; what an expert makes of one row.

    Returns:
        [num_rows, num_slots, hidden] float32, zero where the rank is -1. Ranks do not matter to the result.
    """
    num_rows, num_slots = slot_rank.shape
    out = np.zeros((num_rows, num_slots, x.shape[1]), np.float32)
    for row in range(num_rows):
        for slot in range(num_slots):
            if slot_rank[row, slot] >= 0:
                out[row, slot] = product(int(slot_expert[row, slot]), x[row : row + 1])[0]
    return out


class P2pReference:
    """Point-to-point in one process (twin of `bus.xccl.p2p.P2p`): a mailbox per sender and receiver.

    Nobody waits here: `recv` of a message that was not sent is the stall that the fast path reports at its
    deadline.
    """

    def __init__(self) -> None:
        self._mail: dict[tuple[Rank, Rank], deque[tuple[int, npt.NDArray[Any]]]] = defaultdict(deque)

    def send(self, array: npt.NDArray[Any], sender: Rank, receiver: Rank, event_id: int) -> None:
        """Put a copy of `array` into the mailbox."""
        check_array(array)
        self._mail[sender, receiver].append((event_id, array.copy()))

    def recv(
        self, out: npt.NDArray[Any] | None, sender: Rank, receiver: Rank, event_id: int
    ) -> npt.NDArray[Any]:
        """Take the oldest message. Raises EventMismatch, Truncated, ValueError (it stays), PeerStalled."""
        found_id, array = self._oldest(sender, receiver, event_id)
        if found_id != event_id:
            text = f"the next message is event {found_id:#x}"
            raise EventMismatch(text, rank=str(receiver), peer=str(sender), event_id=event_id)
        if out is None:
            out = np.empty_like(array)
        header = MessageHeader.of(array)
        check_out(out, header, rank=str(receiver), peer=str(sender), event_id=event_id)
        out[...] = array
        self._mail[sender, receiver].popleft()
        return out

    def discard(self, sender: Rank, receiver: Rank) -> int:
        """Drop the oldest message and return its event id. Raises PeerStalled."""
        event_id, _ = self._oldest(sender, receiver, 0)
        self._mail[sender, receiver].popleft()
        return event_id

    def _oldest(self, sender: Rank, receiver: Rank, event_id: int) -> tuple[int, npt.NDArray[Any]]:
        mail = self._mail[sender, receiver]
        if not mail:
            raise PeerStalled("nothing was sent", rank=str(receiver), peer=str(sender), event_id=event_id)
        return mail[0]
