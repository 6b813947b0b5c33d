"""Which KV blocks of this prefill worker are offered. Nothing can fetch from here yet: only withdrawal ends offers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bus.control.messages import KvTicket


class OfferTable:
    """`services.steps.offers.KvOffers` of one incarnation of a prefill worker, with a slot for each block."""

    def __init__(self, *, index: int, incarnation: int, segment: str, num_blocks: int) -> None:
        self._index, self._incarnation, self._segment = index, incarnation, segment
        self._free_slots = list(range(num_blocks - 1, -1, -1))
        self._tickets: dict[int, KvTicket] = {}
        self._ended: list[int] = []
        self._last_serial = 0

    @property
    def num_standing(self) -> int:
        """See `KvOffers`."""
        return len(self._tickets)

    def offer(self, block_ids: Sequence[int], num_tokens: int) -> KvTicket:
        """See `KvOffers`."""
        self._last_serial += 1
        ticket = KvTicket(
            index=self._index,
            incarnation=self._incarnation,
            segment=self._segment,
            slot=self._free_slots.pop(),
            serial=self._last_serial,
            num_tokens=num_tokens,
            block_ids=tuple(block_ids),
        )
        self._tickets[ticket.serial] = ticket
        return ticket

    def withdraw(self, serials: Iterable[int]) -> None:
        """See `KvOffers`."""
        for serial in serials:
            ticket = self._tickets.pop(serial, None)
            if ticket is not None:
                self._free_slots.append(ticket.slot)
                self._ended.append(serial)

    def withdraw_all(self) -> None:
        """See `KvOffers`."""
        self.withdraw(list(self._tickets))

    def ended(self) -> list[int]:
        """See `KvOffers`."""
        ended, self._ended = self._ended, []
        return ended
