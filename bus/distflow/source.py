"""The sending side of KV transfer: a prefill worker offers blocks and learns when nobody reads them any more.

Life of an offer: 1. `offer` writes the slot and publishes its serial; the ticket goes to the decode side as metadata.
2. A sink that has room pulls the blocks; nothing happens here. 3. Its done cell, or `withdraw`, ends the offer: the
source takes the serial out of the slot, which tells any sink that still copies, and `ended` names it once. Only then
may the blocks be written again (paper section 6, steps 3 and 8a).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bus.control.messages import KvTicket
from bus.distflow.table import ENDED, MAGIC, SERIAL_MAX, TransferLayout, digest_of
from bus.errors import ResourceError
from bus.memory import _native
from bus.memory.segment import Segment


class NoFreeSlot(ResourceError):
    """As many offers stand as the table has slots."""


@dataclass(slots=True)
class KvSourceCounters:
    """What was offered here, and what sinks said that they have taken."""

    offers: int = 0
    blocks_offered: int = 0
    offers_fetched: int = 0
    blocks_sent: int = 0
    bytes_sent: int = 0
    offers_withdrawn: int = 0
    corrupt_answers: int = 0  # done cells that cannot be; they end nothing


@dataclass(frozen=True, slots=True)
class _Offer:
    slot: int
    serial: int
    num_blocks: int


class KvSource:
    """The offers of one segment, which the caller owns. One thread. Never blocks.

    Args:
        segment: of this process; its app area is `layout.app_bytes` long.
        layout: of the app area.
        first_serial: of the first offer; serials rise by one and go on with 1 after `SERIAL_MAX`.

    Raises:
        ValueError: the app area has another size.
    """

    def __init__(self, segment: Segment, layout: TransferLayout, *, first_serial: int = 1) -> None:
        if segment.layout.app_bytes != layout.app_bytes:
            raise ValueError(
                f"layout: {layout.app_bytes} bytes must be the app area's {segment.layout.app_bytes}"
            )
        if not 1 <= first_serial <= SERIAL_MAX:
            raise ValueError(f"first_serial: {first_serial} is outside 1..{SERIAL_MAX}")
        self.layout = layout
        self.counters = KvSourceCounters()
        self._segment = segment
        self._base = segment.layout.app_offset
        self._next_serial = first_serial
        self._free = deque(range(layout.num_slots))
        self._standing: dict[int, _Offer] = {}
        self._ended: list[int] = []
        self._news = [0] * layout.num_sinks
        self._write_trailer()

    def _write_trailer(self) -> None:
        trailer, start = self.layout.pack_trailer(), self._base + self.layout.trailer_offset
        self._segment.buf[start + 8 : start + len(trailer)] = trailer[8:]
        _native.store_u64(self._segment.buf, start, MAGIC)  # SYNC: kv-table (publishes the trailer)

    @property
    def num_standing(self) -> int:
        """Offers that were neither fetched nor withdrawn, as far as `ended` has seen."""
        return len(self._standing)

    def offer(self, block_ids: Sequence[int], num_tokens: int, payload: bytes = b"") -> KvTicket:
        """Offer blocks that hold the KV of `num_tokens` tokens; they must not change until `ended` names the serial.

        Raises:
            ValueError: no blocks, a block that does not exist, or a number out of range.
            NoFreeSlot: nothing was offered.
        """
        self._check(block_ids, num_tokens, payload)
        if not self._free:
            raise NoFreeSlot(f"{self._segment.name}: all {self.layout.num_slots} slots have a standing offer")
        slot, serial = self._free.popleft(), self._take_serial()
        if payload:
            start = self._base + self.layout.payload_offset(slot)
            self._segment.buf[start : start + len(payload)] = payload
        sizes = len(block_ids) << 32 | num_tokens
        self._publish(slot, serial, sizes, len(payload), digest_of(block_ids))  # SYNC: kv-offer (publishes)
        self._standing[serial] = _Offer(slot, serial, len(block_ids))
        self.counters.offers += 1
        self.counters.blocks_offered += len(block_ids)
        identity = self._segment.identity
        return KvTicket(
            index=identity.index,
            incarnation=identity.incarnation,
            segment=self._segment.name,
            slot=slot,
            serial=serial,
            num_tokens=num_tokens,
            block_ids=tuple(block_ids),
        )

    def withdraw(self, serials: Iterable[int]) -> None:
        """End these offers now: no fetch of them ends well any more. Serials that do not stand are ignored.

        One that a sink has answered already counts as fetched.
        """
        for serial in serials:
            offer = self._standing.get(serial)
            if offer is None:
                continue
            if not any(self._is_done(offer, sink) for sink in range(self.layout.num_sinks)):
                self.counters.offers_withdrawn += 1
            self._end(offer)

    def withdraw_all(self) -> None:
        """End every offer that stands."""
        self.withdraw(tuple(self._standing))

    def ended(self) -> list[int]:
        """Return the serials of offers that were fetched or withdrawn since the last call: the completion queue.

        Each is named once, and nobody reads its blocks any more. Costs one load per sink when there is no news.
        """
        for sink, seen in enumerate(self._news):
            offset = self._base + self.layout.news_offset(sink)
            news = _native.load_u64(self._segment.buf, offset)  # SYNC: kv-news
            if news != seen:
                self._news[sink] = news
                for offer in [one for one in self._standing.values() if self._is_done(one, sink)]:
                    self._end(offer)
        ended, self._ended = self._ended, []
        return ended

    def _check(self, block_ids: Sequence[int], num_tokens: int, payload: bytes) -> None:
        num_blocks = self.layout.num_blocks
        if not 1 <= len(block_ids) <= num_blocks:
            raise ValueError(f"block_ids: {len(block_ids)} blocks must be 1..{num_blocks}")
        if min(block_ids) < 0 or max(block_ids) >= num_blocks:
            raise ValueError(f"block_ids: must be in 0..{num_blocks - 1}")
        if not 1 <= num_tokens < 1 << 32:
            raise ValueError(f"num_tokens: {num_tokens} is outside 1..{(1 << 32) - 1}")
        if len(payload) > self.layout.payload_bytes_max:
            raise ValueError(f"payload: {len(payload)} bytes exceed {self.layout.payload_bytes_max}")

    def _take_serial(self) -> int:
        while self._next_serial in self._standing:
            self._next_serial = self._next_serial % SERIAL_MAX + 1
        serial = self._next_serial
        self._next_serial = serial % SERIAL_MAX + 1
        return serial

    def _is_done(self, offer: _Offer, sink: int) -> bool:
        """Tell whether `sink` has taken the offer, and count it."""
        offset = self._base + self.layout.done_offset(sink, offer.slot)
        cell = _native.read_cell(self._segment.buf, offset)  # SYNC: kv-done
        if cell is None or cell[1] != offer.serial:
            return False
        _, _, num_blocks, num_bytes = cell
        if num_blocks > offer.num_blocks or num_bytes != num_blocks * self.layout.block_bytes:
            self.counters.corrupt_answers += 1
            return False
        self.counters.offers_fetched += 1
        self.counters.blocks_sent += num_blocks
        self.counters.bytes_sent += num_bytes
        return True

    def _end(self, offer: _Offer) -> None:
        # The cell's first word changes before a fence, and the blocks are written after it: a sink that has copied one
        # of the new bytes finds the word changed when it looks again.
        self._publish(offer.slot, offer.serial | ENDED, 0, 0, 0)  # SYNC: kv-offer (publishes the end)
        del self._standing[offer.serial]
        self._free.append(offer.slot)
        self._ended.append(offer.serial)

    def _publish(self, slot: int, w0: int, w1: int, w2: int, w3: int) -> None:
        offset = self._base + self.layout.offer_offset(slot)
        _native.write_cell(self._segment.buf, offset, w0, w1, w2, w3)  # SYNC: kv-offer
