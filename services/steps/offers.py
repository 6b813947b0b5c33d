"""What a prefill worker's executor and hot loop need of the side that offers KV."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from bus.control.messages import KvTicket


class KvOffers(Protocol):
    """Offers of KV blocks, each known by a serial that is unique within the incarnation. One thread.

    An offer ends once: fetched, or withdrawn. From then on nobody reads its blocks.
    """

    def offer(self, num_tokens: int, block_ids: Sequence[int]) -> KvTicket:
        """Offer the KV of `num_tokens` tokens, which lies in these blocks.

        Every offer has a block that no other has, so there are never more of them than blocks.
        """
        ...

    def withdraw(self, serials: Iterable[int]) -> None:
        """End these offers; unknown ones are ignored."""
        ...

    def standing(self) -> dict[int, tuple[int, ...]]:
        """Return the blocks of every offer that stands, by serial."""
        ...

    def ended(self) -> tuple[int, ...]:
        """Return the offers that have ended since the last call. Never blocks."""
        ...
