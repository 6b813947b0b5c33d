"""A toy prefill worker: a `ToyExecutor` that offers, and checks that no offered block is written."""

from __future__ import annotations

import msgspec

from bus.control.messages import ExecutorReady, KvTicket, PlannedSequence, StepCompleted, StepPlan
from tests.harness.toy_executor import Entry, ToyExecutor, kv_entries


class ToyPrefillWorker:
    """One incarnation. `offers` stand, by serial, with the tokens that their blocks must hold."""

    def __init__(self, ready: ExecutorReady) -> None:
        self.ready = ready
        self.offers: dict[int, tuple[KvTicket, list[Entry]]] = {}
        self._executor = ToyExecutor(ready)
        self._last_serial = 0

    def run(self, plan: StepPlan) -> StepCompleted:
        """Compute a step; offer what it says. No offer may be harmed."""
        done = self._executor.run(plan)
        sampled = tuple(
            msgspec.structs.replace(one, ticket=self._offer(sequence)) if sequence.offer_kv else one
            for one, sequence in zip(done.sampled, plan.sequences, strict=True)
        )
        for serial in self.offers:
            self.read(serial)
        return msgspec.structs.replace(done, sampled=sampled)

    def harmed_by(self, plan: StepPlan) -> tuple[int, ...]:
        """Return the offers that stand whose blocks `plan` writes."""
        size = self.ready.block_tokens
        written = {
            sequence.block_table[position // size]
            for sequence in plan.sequences
            for position in range(sequence.start, sequence.start + len(sequence.token_ids))
        }
        return tuple(s for s, (ticket, _) in self.offers.items() if written & set(ticket.block_ids))

    def _offer(self, sequence: PlannedSequence) -> KvTicket:
        self._last_serial += 1
        num_tokens = sequence.start + len(sequence.token_ids)
        ticket = KvTicket(
            index=self.ready.index,
            incarnation=self.ready.incarnation,
            segment="/toy",
            slot=0,
            serial=self._last_serial,
            num_tokens=num_tokens,
            block_ids=sequence.block_table,
        )
        entries = self._entries(ticket)
        tokens = [token for _, token, _ in entries]
        assert entries == kv_entries(tokens), "what is offered was not computed as a whole"
        self.offers[ticket.serial] = (ticket, entries)
        return ticket

    def read(self, serial: int) -> list[Entry]:
        """Return what a fetch of this offer reads; it must be what was offered."""
        ticket, offered = self.offers[serial]
        entries = self._entries(ticket)
        assert entries == offered, f"blocks of offer {serial} were written while it stood"
        return entries

    def _entries(self, ticket: KvTicket) -> list[Entry]:
        size = self.ready.block_tokens
        return self._executor.read_blocks(ticket.block_ids, ticket.num_tokens, size)

    def withdraw(self, serials: tuple[int, ...]) -> tuple[int, ...]:
        """End these offers; return those that stood."""
        ended = tuple(serial for serial in serials if serial in self.offers)
        for serial in ended:
            del self.offers[serial]
        return ended
