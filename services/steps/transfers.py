"""KV transfers of an executor, between its steps (paper section 6): what the hot loop does besides computing.

An attention worker fetches, a prefill worker offers; an executor of neither kind has no transfers. The hot loop hands
over the messages that are no plans, in the order in which they came, gives the transfers a bounded slice of its time
every turn, and sends what they have to say.
"""

from __future__ import annotations

from typing import Protocol

from bus.clock import NS_PER_MS, now_ns
from bus.control.messages import CancelFetch, FetchKv, KvFetched, Message
from bus.distflow.sink import KvSink

IDLE_POLL_MS = 500
# Copied between two steps, and before each look for the next plan: below a millisecond, so a step is hardly late.
SLICE_BYTES = 4 << 20


class Transfers(Protocol):
    """One side of KV transfer. Used by the hot loop's thread alone; nothing blocks."""

    def handle(self, message: Message) -> None:
        """Do what a message of the planner says, before the next one is looked at."""
        ...

    def progress(self) -> int:
        """Work for a bounded time; return the milliseconds until the next call is worthwhile, 0 = there is more to
        do."""
        ...

    def outgoing(self) -> list[Message]:
        """Return what is to be sent to the planner since the last call."""
        ...

    def reset(self) -> None:
        """End everything and say nothing of it: another planner is followed, which knows none of it."""
        ...

    def counters(self) -> dict[str, int]:
        """Return what was counted here, by name."""
        ...

    def close(self) -> None:
        """End everything and free what is mapped."""
        ...


class KvFetches:
    """The receiving side, in an attention worker of this `incarnation`."""

    def __init__(self, sink: KvSink, incarnation: int) -> None:
        self._sink, self._incarnation = sink, incarnation
        self._look_at_ns = 0  # when to look for dead sources again

    def handle(self, message: Message) -> None:
        """See `Transfers`."""
        match message:
            case FetchKv():
                self._sink.post(message.fetch_id, message.ticket, message.first_block, message.block_ids)
            case CancelFetch():
                self._sink.cancel(message.fetch_id)

    def progress(self) -> int:
        """See `Transfers`."""
        if self._sink.progress(SLICE_BYTES):
            return 0
        now = now_ns()
        if self._sink.num_mapped and now >= self._look_at_ns:
            self._look_at_ns = now + IDLE_POLL_MS * NS_PER_MS
            self._sink.drop_dead()
        return IDLE_POLL_MS

    def outgoing(self) -> list[Message]:
        """See `Transfers`."""
        return [
            KvFetched(fetch_id=done.fetch_id, incarnation=self._incarnation, error=done.error)
            for done in self._sink.completions()
        ]

    def reset(self) -> None:
        """See `Transfers`."""
        self._sink.cancel_all()
        self._sink.completions()

    def counters(self) -> dict[str, int]:
        """See `Transfers`."""
        counted = self._sink.counters
        return {
            "kv_fetches": counted.fetches_completed,
            "kv_blocks_fetched": counted.blocks_fetched,
            "kv_bytes_fetched": counted.bytes_fetched,
        }

    def close(self) -> None:
        """See `Transfers`."""
        self._sink.close()
