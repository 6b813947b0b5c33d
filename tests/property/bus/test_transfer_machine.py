"""Any order of offers, withdrawals, fetches, slices and cancels does what the slow twin does.

Two sources, two sinks; blocks are rewritten as soon as nobody may read them, so that a reader of a wrong one is seen.
"""

from __future__ import annotations

import uuid

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from bus.control.messages import KvTicket
from bus.distflow.reference import SlowFetch, SlowSink, SlowSource
from bus.distflow.source import NoFreeSlot
from bus.distflow.table import SERIAL_MAX
from tests.harness.transfer_world import BLOCK_BYTES, LAYOUT, SinkSide, SourceSide

BLOCKS = st.lists(st.integers(0, LAYOUT.num_blocks - 1), min_size=1, max_size=5, unique=True)
WHICH = st.integers(0, 1)


class TransferMachine(RuleBasedStateMachine):
    @initialize(wraps=st.booleans())
    def make(self, wraps: bool) -> None:
        pod = f"mach{uuid.uuid4().hex[:12]}"
        self.first_serial = SERIAL_MAX - 3 if wraps else 1
        self.sources = [SourceSide(pod, index=i, first_serial=self.first_serial) for i in range(2)]
        self.sinks = [SinkSide(index=i) for i in range(2)]
        self.slow_sources = [SlowSource(list(range(1, LAYOUT.num_blocks + 1))) for _ in range(2)]
        self.slow_sinks = [SlowSink(LAYOUT.num_blocks, i) for i in range(2)]
        self.tickets: list[tuple[int, int, KvTicket]] = []  # source, the twin's serial, ticket
        self.next_fetch, self.next_value = 1, 1000

    def serial_of(self, count: int) -> int:
        """Return the serial of a source's offer number `count`."""
        return (self.first_serial + count - 2) % SERIAL_MAX + 1

    @rule(which=WHICH, block_ids=BLOCKS)
    def offer(self, which: int, block_ids: list[int]) -> None:
        source, slow = self.sources[which].source, self.slow_sources[which]
        if source.num_standing == LAYOUT.num_slots:
            try:
                source.offer(block_ids, 1)
            except NoFreeSlot:
                return
            raise AssertionError("more offers than slots")
        ticket = source.offer(block_ids, 1)
        serial = slow.offer(block_ids)
        assert ticket.serial == self.serial_of(serial)
        self.tickets.append((which, serial, ticket))

    @precondition(lambda self: self.tickets)
    @rule(data=st.data())
    def withdraw(self, data: st.DataObject) -> None:
        which, serial, ticket = data.draw(st.sampled_from(self.tickets))
        self.sources[which].source.withdraw([ticket.serial])
        self.slow_sources[which].withdraw([serial])

    @rule(which=WHICH)
    def poll(self, which: int) -> None:
        ended = self.sources[which].source.ended()
        expected = self.slow_sources[which].take_ended()
        assert sorted(ended) == sorted(map(self.serial_of, expected))
        assert self.sources[which].source.counters.blocks_sent == self.slow_sources[which].blocks_sent

    @rule(which=WHICH)
    def rewrite_free_blocks(self, which: int) -> None:
        slow = self.slow_sources[which]
        pinned = {block_id for block_ids in slow.standing.values() for block_id in block_ids}
        for block_id in set(range(LAYOUT.num_blocks)) - pinned:
            self.next_value += 1
            slow.blocks[block_id] = self.next_value
            self.sources[which].blocks[block_id] = self.next_value

    @precondition(lambda self: self.tickets)
    @rule(data=st.data(), which=WHICH, own=BLOCKS)
    def fetch(self, data: st.DataObject, which: int, own: list[int]) -> None:
        source, serial, ticket = data.draw(st.sampled_from(self.tickets))
        num_blocks = min(len(own), len(ticket.block_ids))
        first = len(ticket.block_ids) - num_blocks
        own = own[:num_blocks]
        self.sinks[which].sink.post(self.next_fetch, ticket, first, own)
        slow = self.slow_sources[source]
        self.slow_sinks[which].post(
            SlowFetch(self.next_fetch, slow, serial, list(ticket.block_ids[first:]), own)
        )
        self.next_fetch += 1

    @rule(which=WHICH, back=st.integers(1, 6))
    def cancel(self, which: int, back: int) -> None:
        self.sinks[which].sink.cancel(self.next_fetch - back)
        self.slow_sinks[which].cancel(self.next_fetch - back)

    @rule(which=WHICH, blocks_max=st.integers(0, 7))
    def progress(self, which: int, blocks_max: int) -> None:
        left = self.sinks[which].sink.progress(blocks_max * BLOCK_BYTES)
        assert left == self.slow_sinks[which].progress(blocks_max)
        done = [(c.fetch_id, c.error == "") for c in self.sinks[which].sink.completions()]
        assert done == self.slow_sinks[which].take_completions()
        blocks = self.sinks[which].blocks
        assert (blocks == blocks[:, :1]).all()
        assert blocks[:, 0].tolist() == self.slow_sinks[which].blocks

    def teardown(self) -> None:
        for side in (*getattr(self, "sinks", ()), *getattr(self, "sources", ())):
            side.close()


TestTransferMachine = TransferMachine.TestCase
TestTransferMachine.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
