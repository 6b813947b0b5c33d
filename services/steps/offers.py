"""What a prefill worker's executor needs of the side that offers KV (`bus.distflow`), and the offers that stand."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from bus.control.messages import KvTicket, PlannedSequence


class KvOffers(Protocol):
    """Offers of KV blocks, each known by a serial that no other offer that stands has. One thread; never blocks.

    An offer ends once: fetched, or withdrawn. From then on nobody reads its blocks.
    """

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
    """The offers of one executor, with the blocks that they are about.

    Every offer has a block that no other has, so there are never more of them than blocks.
    """

    def __init__(self, source: KvOffers) -> None:
        self._source = source
        self._blocks: dict[int, frozenset[int]] = {}

    @property
    def num_standing(self) -> int:
        """See `KvOffers`."""
        return self._source.num_standing

    def offer(self, sequence: PlannedSequence) -> KvTicket:
        """Offer a sequence whose last planned token has been computed."""
        num_tokens = sequence.start + len(sequence.token_ids)
        ticket = self._source.offer(sequence.block_table, num_tokens)
        self._blocks[ticket.serial] = frozenset(sequence.block_table)
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

    def forget_all(self) -> None:
        """End all offers, and say nothing of them: whoever plans from now on knows none of them."""
        self._source.withdraw_all()
        self._source.ended()
        self._blocks.clear()

    def ended(self) -> tuple[int, ...]:
        """See `KvOffers`."""
        serials = tuple(self._source.ended())
        for serial in serials:
            self._blocks.pop(serial, None)
        return serials
