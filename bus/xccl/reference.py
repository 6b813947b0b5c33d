"""The slow twins: what the collectives compute, in one process, sequential and obvious. Fast paths must equal them."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from bus.errors import EventMismatch, PeerStalled
from bus.xccl.endpoint import Rank
from bus.xccl.message import MessageHeader, check_array
from bus.xccl.p2p import check_out

Float32Array = npt.NDArray[np.float32]
Int32Array = npt.NDArray[np.int32]
Int8Array = npt.NDArray[np.int8]


def exchange(
    x: Float32Array,
    slot_rank: Int32Array,
    slot_expert: Int32Array,
    product: Callable[[int, Float32Array], Float32Array],
    *,
    int8: bool = False,
) -> Float32Array:
    """Return what `a2e_send` followed by `e2a_recv` must yield (twin of `bus.xccl.trampoline`).

    Args:
        x: [num_rows, hidden] float32.
        slot_rank, slot_expert: [num_rows, num_slots] int32; rank -1 = no expert for this slot.
        product: (expert, [1, hidden]) -> [1, hidden]; what an expert makes of one row.
        int8: rows and results are quantised on their way.

    Returns:
        [num_rows, num_slots, hidden] float32, zero where the rank is -1. Ranks do not matter to the result.
    """
    num_rows, num_slots = slot_rank.shape
    out = np.zeros((num_rows, num_slots, x.shape[1]), np.float32)
    sent = transport(x, int8=int8)
    for row in range(num_rows):
        for slot in range(num_slots):
            if slot_rank[row, slot] >= 0:
                y = product(int(slot_expert[row, slot]), sent[row : row + 1])
                out[row, slot] = transport(y, int8=int8)[0]
    return out


def exchange_int8(
    x: Float32Array,
    slot_rank: Int32Array,
    slot_expert: Int32Array,
    product: Callable[[int, Int8Array, Float32Array], tuple[Int8Array, Float32Array]],
) -> Float32Array:
    """Return what `exchange` returns where INT8 is delivered (twin of `poll_int8`).

    product: (expert, q [1, hidden] int8, scale [1] float32) -> the same of its result; no other rounding takes place.
    """
    num_rows, num_slots = slot_rank.shape
    out = np.zeros((num_rows, num_slots, x.shape[1]), np.float32)
    q, scale = quantise_rows(x)
    for row in range(num_rows):
        for slot in range(num_slots):
            if slot_rank[row, slot] >= 0:
                part = slice(row, row + 1)
                y, y_scale = product(int(slot_expert[row, slot]), q[part], scale[part])
                out[row, slot] = y[0].astype(np.float32) * y_scale[0]
    return out


def quantise_rows(x: Float32Array) -> tuple[npt.NDArray[np.int8], Float32Array]:
    """Return (q [num_rows, hidden] int8, scale [num_rows] float32) of rows (twin of `bus.xccl.int8.quantise`)."""
    q = np.zeros(x.shape, np.int8)
    scale = np.zeros(x.shape[0], np.float32)
    for i, row in enumerate(x):
        if not np.isfinite(row).all():
            scale[i] = np.nan
            continue
        # Clipped below: a subnormal scale is too coarse to keep the quotient within 127.
        scale[i] = np.max(np.abs(row), initial=np.float32(0)) / np.float32(127)
        if scale[i] > 0:
            with np.errstate(over="ignore"):
                quotient = row / scale[i]
            q[i] = np.rint(np.clip(quotient, -127, 127)).astype(np.int8)
    return q, scale


def transport(x: Float32Array, *, int8: bool) -> Float32Array:
    """Return what a receiver sees of rows: the rows themselves, or what INT8 transport leaves of them."""
    if not int8:
        return x.copy()
    q, scale = quantise_rows(x)
    with np.errstate(over="ignore"):
        return q.astype(np.float32) * scale[:, None]


def dispatch_rows(
    xs: Sequence[Float32Array], topk_idx: Sequence[Int32Array], num_local_experts: int, *, int8: bool = False
) -> list[tuple[Float32Array, Int32Array]]:
    """Return (x, expert_counts) that each rank's `dispatch` must yield (twin of `bus.xccl.dispatch`).

    Args:
        xs: per rank [num_tokens, hidden] float32.
        topk_idx: per rank [num_tokens, top_k] int32 physical experts, -1 = none.
        num_local_experts: rank r holds r * num_local_experts onward. int8: rows are quantised on their way.
    """
    results = []
    sent = [transport(x, int8=int8) for x in xs]
    for rank in range(len(xs)):
        rows, counts = [], np.zeros(num_local_experts, np.int32)
        for local in range(num_local_experts):
            for source, idx in enumerate(topk_idx):
                for token in np.nonzero(idx == rank * num_local_experts + local)[0]:
                    rows.append(sent[source][token])
                    counts[local] += 1
        x = np.array(rows, np.float32).reshape(len(rows), xs[rank].shape[1])
        results.append((x, counts))
    return results


def dispatch_combine(
    xs: Sequence[Float32Array],
    topk_idx: Sequence[Int32Array],
    topk_weights: Sequence[Float32Array],
    product: Callable[[int, Float32Array], Float32Array],
    *,
    int8: bool = False,
) -> list[Float32Array]:
    """Return what each rank's `combine` must yield (twin of `bus.xccl.dispatch`).

    Args:
        xs, topk_idx, int8: as in `dispatch_rows`. topk_weights: per rank [num_tokens, top_k] float32.
        product: (expert, [1, hidden]) -> [1, hidden]; what an expert makes of one row.

    Returns:
        Per rank [num_tokens, hidden] float32: 0 + weight * y over slots 0..top_k-1, each step rounded to float32.
    """
    outs = []
    for x, idx, weights in zip(xs, topk_idx, topk_weights, strict=True):
        out = np.zeros(x.shape, np.float32)
        sent = transport(x, int8=int8)
        for token in range(x.shape[0]):
            for slot in range(idx.shape[1]):
                if idx[token, slot] >= 0:
                    y = transport(product(int(idx[token, slot]), sent[token : token + 1]), int8=int8)[0]
                    out[token] = out[token] + weights[token, slot] * y
        outs.append(out)
    return outs


def dispatch_rows_int8(
    xs: Sequence[Float32Array], topk_idx: Sequence[Int32Array], num_local_experts: int
) -> list[tuple[Int8Array, Float32Array, Int32Array]]:
    """Return (x, x_scale, expert_counts) that each rank's `dispatch_int8` must yield; see `dispatch_rows`."""
    results = []
    sent = [quantise_rows(x) for x in xs]
    # What is routed are the numbers of the rows in the order of ranks: a row testifies by its number whose it is.
    first = np.cumsum([0, *map(len, xs)])
    numbers = [first[r] + np.arange(len(x), dtype=np.float32)[:, None] for r, x in enumerate(xs)]
    q, scale = np.concatenate([q for q, _ in sent]), np.concatenate([scale for _, scale in sent])
    for places, counts in dispatch_rows([n.astype(np.float32) for n in numbers], topk_idx, num_local_experts):
        rows = places[:, 0].astype(np.int64)
        results.append((q[rows], scale[rows], counts))
    return results


def dispatch_combine_int8(
    xs: Sequence[Float32Array],
    topk_idx: Sequence[Int32Array],
    topk_weights: Sequence[Float32Array],
    product: Callable[[int, Int8Array, Float32Array], tuple[Int8Array, Float32Array]],
) -> list[Float32Array]:
    """Return what each rank's `combine` after `dispatch_int8` must yield; arguments: `dispatch_combine`.

    product: (expert, q [1, hidden] int8, scale [1] float32) -> the same of its result; no other rounding takes place.
    """
    outs = []
    for x, idx, weights in zip(xs, topk_idx, topk_weights, strict=True):
        out = np.zeros(x.shape, np.float32)
        q, scale = quantise_rows(x)
        for token in range(x.shape[0]):
            for slot in range(idx.shape[1]):
                if idx[token, slot] >= 0:
                    row = slice(token, token + 1)
                    y, y_scale = product(int(idx[token, slot]), q[row], scale[row])
                    out[token] = out[token] + weights[token, slot] * (y[0].astype(np.float32) * y_scale[0])
        outs.append(out)
    return outs


def all_to_all(
    arrays: Sequence[npt.NDArray[Any]], counts: Sequence[npt.NDArray[np.int64]]
) -> list[tuple[npt.NDArray[Any], npt.NDArray[np.int64]]]:
    """Return (rows, counts) that each rank's `exchange` must yield (twin of `bus.xccl.alltoall`).

    Args:
        arrays: per rank [num_rows, ...], all of one dtype and row shape.
        counts: per rank [num_ranks] int64: its next counts[r] rows are for rank r.
    """
    pieces = [np.split(a, np.cumsum(c)[:-1]) for a, c in zip(arrays, counts, strict=True)]
    results = []
    for rank in range(len(arrays)):
        mine = [given[rank] for given in pieces]
        results.append((np.concatenate(mine), np.array([len(piece) for piece in mine], np.int64)))
    return results


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
