"""The offering side of KV transfer, in a prefill worker: which offers stand, and of which blocks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from bus.control.messages import KvTicket, Message, OffersEnded, PlannedSequence, WithdrawOffers
from bus.distflow.source import KvSourceCounters
from services.steps.transfers import IDLE_POLL_MS

OFFERS_POLL_MS = 5  # while offers stand, which may end at any time


class KvOffers(Protocol):
    """Offers of KV blocks, each known by a serial that no other offer that stands has. One thread; never blocks.

    An offer ends once: fetched, or withdrawn. From then on nobody reads its blocks. `bus.distflow.source.KvSource` is
    one.
    """

    counters: KvSourceCounters

    @property
    def num_standing(self) -> int:
        """How many offers have not ended, as far as `ended` has seen."""
        ...

    def offer(self, block_ids: Sequence[int], num_tokens: int) -> KvTicket:
        """Offer the KV of `num_tokens` tokens, which lies in these blocks."""
        ...

    def withdraw(self, serials: Iterable[int]) -> None:
        """End these offers; unknown ones are ignored."""
        ...

    def withdraw_all(self) -> None:
        """End all offers."""
        ...

    def ended(self) -> list[int]:
        """Return the offers that have ended since the last call, each once."""
        ...


class Offers:
    """`Transfers` of a prefill worker of this `incarnation`: its offers, with the blocks that they are about.

    Every offer has a block that no other has, so there are never more of them than blocks.
    """

    def __init__(self, source: KvOffers, incarnation: int) -> None:
        self._source, self._incarnation = source, incarnation
        self._blocks: dict[int, frozenset[int]] = {}

    @property
    def num_standing(self) -> int:
        """See `KvOffers`."""
        return self._source.num_standing

    def offer(self, sequence: PlannedSequence, block_tokens: int) -> KvTicket:
        """Offer a sequence whose last planned token has been computed."""
        num_tokens = sequence.start + len(sequence.token_ids)
        ticket = self._source.offer(sequence.block_table[: -(-num_tokens // block_tokens)], num_tokens)
        self._blocks[ticket.serial] = frozenset(ticket.block_ids)
        return ticket

    def withdraw(self, serials: Iterable[int]) -> None:
        """See `KvOffers`."""
        self._source.withdraw(serials)

    def withdraw_written(self, sequences: Iterable[PlannedSequence], block_tokens: int) -> None:
        """End offers whose blocks these sequences are about to write: whoever planned that has given them up."""
        written: set[int] = set()
        for sequence in sequences:
            end = sequence.start + len(sequence.token_ids)
            written.update(sequence.block_table[sequence.start // block_tokens : -(-end // block_tokens)])
        self.withdraw([serial for serial, block_ids in self._blocks.items() if block_ids & written])

    def handle(self, message: Message) -> None:
        """See `Transfers`."""
        if isinstance(message, WithdrawOffers):
            self.withdraw(message.serials)

    def progress(self) -> int:
        """See `Transfers`; the copying is done by whoever fetches."""
        return OFFERS_POLL_MS if self.num_standing else IDLE_POLL_MS

    def outgoing(self) -> list[Message]:
        """See `Transfers`."""
        serials = self.ended()
        return [OffersEnded(incarnation=self._incarnation, serials=serials)] if serials else []

    def counters(self) -> dict[str, int]:
        """See `Transfers`."""
        counted = self._source.counters
        return {
            "kv_offers": counted.offers,
            "kv_blocks_offered": counted.blocks_offered,
            "kv_blocks_sent": counted.blocks_sent,
            "kv_bytes_sent": counted.bytes_sent,
        }

    def close(self) -> None:
        """See `Transfers`."""
        self._source.withdraw_all()

    def reset(self) -> None:
        """See `Transfers`."""
        self._source.withdraw_all()
        self._source.ended()
        self._blocks.clear()

    def ended(self) -> tuple[int, ...]:
        """See `KvOffers`."""
        serials = tuple(self._source.ended())
        for serial in serials:
            self._blocks.pop(serial, None)
        return serials
