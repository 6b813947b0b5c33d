"""The receiving side of KV transfer: a decode worker pulls offered blocks into its own, slice by slice, between
steps.

Life of a fetch: 1. `post` when the decode side has blocks (before that the ticket waits there, and the blocks stay
pinned at the source: backpressure). 2. `progress` looks at the offer's cell, copies, and looks again after the last
byte. 3. The done cell tells the source; `completions` tells the caller, once. `cancel` ends a fetch at once: nothing
is written any more when it returns.

Pairs take turns, a slice each, so that a slow or broken source never holds up the fetches from another.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bus.control.messages import KvTicket
from bus.distflow.pair import Fetch, KvPair, SinkIdentity
from bus.errors import XcclError

if TYPE_CHECKING:
    from typing_extensions import Buffer

CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Completion:
    """A fetch that is over; its blocks are not written any more. `error` "" = all of it has arrived."""

    fetch_id: int
    error: str = ""
    payload: bytes = b""


@dataclass(slots=True)
class KvSinkCounters:
    """What was received here, by fetches that ended well; `fetches` counts all that were posted."""

    fetches: int = 0
    fetches_completed: int = 0
    blocks_fetched: int = 0
    bytes_fetched: int = 0


class KvSink:
    """All fetches of one decode worker, from any number of sources. One thread. Never blocks.

    Args:
        kv: the own KV blocks, writable, `num_blocks * block_bytes` long or longer.
        index: the sink's row in every source's table.
        incarnation: of this process.
        rank: name in errors.
        service: what sources must be.
    """

    def __init__(
        self,
        kv: Buffer,
        *,
        num_blocks: int,
        block_bytes: int,
        index: int,
        incarnation: int,
        rank: str,
        service: str = "prefill",
    ) -> None:
        self._kv = memoryview(kv).cast("B")
        if self._kv.nbytes < num_blocks * block_bytes:
            raise ValueError(f"kv: {self._kv.nbytes} bytes hold no {num_blocks} blocks of {block_bytes}")
        self._num_blocks, self._block_bytes = num_blocks, block_bytes
        self._identity = SinkIdentity(index, incarnation, rank)
        self._service = service
        self._pairs: dict[tuple[int, int], KvPair] = {}  # by the source's index and incarnation
        self._turns: deque[KvPair] = deque()  # those with fetches; the next one first
        self._by_fetch: dict[int, KvPair] = {}
        self._done: list[Completion] = []
        self.counters = KvSinkCounters()

    @property
    def num_active(self) -> int:
        """Fetches under way."""
        return len(self._by_fetch)

    @property
    def num_mapped(self) -> int:
        """Sources mapped now."""
        return len(self._pairs)

    def post(self, fetch_id: int, ticket: KvTicket, first_block: int, block_ids: Sequence[int]) -> None:
        """Receive blocks `first_block`.. of the ticket into the own `block_ids`, in order.

        A fetch that cannot begin completes with an error. A `fetch_id` that is under way is ignored.
        """
        if fetch_id in self._by_fetch:
            return
        self.counters.fetches += 1
        try:
            self._check(ticket, first_block, block_ids)
            pair = self._pair(ticket)
            payload_bytes = pair.admit(ticket)
        except (ValueError, XcclError) as error:
            self._done.append(Completion(fetch_id, str(error)))
        else:
            runs = _runs(ticket.block_ids[first_block:], block_ids, self._block_bytes)
            pair.fetches.append(Fetch(fetch_id, ticket, len(block_ids), runs, payload_bytes))
            self._by_fetch[fetch_id] = pair
            if len(pair.fetches) == 1:
                self._turns.append(pair)
        self._drop_superseded()

    def cancel(self, fetch_id: int) -> None:
        """End a fetch: no block of it is written any more. Unknown ids are ignored."""
        pair = self._by_fetch.get(fetch_id)
        if pair is None:
            return
        fetch = next(one for one in pair.fetches if one.fetch_id == fetch_id)
        self._end(pair, fetch, Completion(fetch_id, CANCELLED))
        if not pair.fetches:
            self._turns.remove(pair)
        self._drop_superseded()

    def cancel_all(self) -> None:
        """End every fetch."""
        for fetch_id in tuple(self._by_fetch):
            self.cancel(fetch_id)

    def progress(self, bytes_max: int) -> bool:
        """Copy up to `bytes_max` bytes, of the pairs in turn; tell whether work is left."""
        while self._turns and bytes_max > 0:
            pair = self._turns.popleft()
            bytes_max -= self._advance(pair, pair.fetches[0], bytes_max)
            if pair.fetches:
                self._turns.append(pair)
        self._drop_superseded()
        return bool(self._turns)

    def completions(self) -> list[Completion]:
        """Return the fetches that ended since the last call, each once: the completion queue."""
        done, self._done = self._done, []
        return done

    def drop_dead(self) -> None:
        """Unmap sources that have died and from which nothing is being fetched: their memory is free then."""
        for key, pair in tuple(self._pairs.items()):
            if not pair.fetches and not pair.owner_alive():
                self._drop(key)

    def close(self) -> None:
        """Drop all fetches and mappings."""
        self.cancel_all()
        for key in tuple(self._pairs):
            self._drop(key)
        self._kv.release()

    # ------------------------------------------------------------------ one fetch

    def _advance(self, pair: KvPair, fetch: Fetch, bytes_max: int) -> int:
        """Do a slice of `fetch`; return the bytes copied."""
        copied = 0
        try:
            pair.look(fetch.ticket)
            copied = pair.copy(fetch, self._kv, bytes_max)
            if fetch.runs:
                return copied
            payload = pair.read_payload(fetch)
            pair.look(fetch.ticket)
        except XcclError as error:
            self._end(pair, fetch, Completion(fetch.fetch_id, str(error)))
            return copied
        self.counters.fetches_completed += 1
        pair.answer(fetch, self.counters.fetches_completed)
        self.counters.blocks_fetched += fetch.num_blocks
        self.counters.bytes_fetched += fetch.num_blocks * self._block_bytes
        self._end(pair, fetch, Completion(fetch.fetch_id, payload=payload))
        return copied

    def _end(self, pair: KvPair, fetch: Fetch, completion: Completion) -> None:
        pair.fetches.remove(fetch)
        del self._by_fetch[fetch.fetch_id]
        self._done.append(completion)

    def _check(self, ticket: KvTicket, first_block: int, block_ids: Sequence[int]) -> None:
        if not 0 <= first_block <= len(ticket.block_ids):
            raise ValueError(f"first_block: {first_block} is outside 0..{len(ticket.block_ids)}")
        if len(block_ids) != len(ticket.block_ids) - first_block:
            raise ValueError(
                f"block_ids: {len(block_ids)} blocks for {len(ticket.block_ids)} of the ticket from {first_block}"
            )
        if block_ids and not (min(block_ids) >= 0 and max(block_ids) < self._num_blocks):
            raise ValueError(f"block_ids: must be in 0..{self._num_blocks - 1}")

    # ------------------------------------------------------------------ mappings

    def _pair(self, ticket: KvTicket) -> KvPair:
        key = (ticket.index, ticket.incarnation)
        pair = self._pairs.get(key)
        if pair is None:
            pair = KvPair(ticket, self._identity, service=self._service, block_bytes=self._block_bytes)
            self._pairs[key] = pair
        return pair

    def _drop_superseded(self) -> None:
        """Unmap sources of which a newer incarnation is mapped, once nothing is fetched from them."""
        newest: dict[int, int] = {}
        for index, incarnation in self._pairs:
            newest[index] = max(incarnation, newest.get(index, 0))
        for key, pair in tuple(self._pairs.items()):
            if key[1] < newest[key[0]] and not pair.fetches:
                self._drop(key)

    def _drop(self, key: tuple[int, int]) -> None:
        self._pairs.pop(key).close()


def _runs(source_ids: Sequence[int], own_ids: Sequence[int], block_bytes: int) -> deque[tuple[int, int, int]]:
    """Return what to copy, blocks that follow one another on both sides as one run."""
    runs: deque[tuple[int, int, int]] = deque()
    for source_id, own_id in zip(source_ids, own_ids, strict=True):
        source, own = source_id * block_bytes, own_id * block_bytes
        if runs:
            first_source, first_own, num_bytes = runs[-1]
            if (first_source + num_bytes, first_own + num_bytes) == (source, own):
                runs[-1] = (first_source, first_own, num_bytes + block_bytes)
                continue
        runs.append((source, own, block_bytes))
    return runs
