"""Requests whose prompt is computed elsewhere: handed over, offered, fetched (paper section 6).

Theory. Whoever lacks many tokens is handed to the prefill leader instead of waiting for a step here; it holds no block
meanwhile. What comes back is metadata: the next token, and a ticket that says where the KV lies. The KV moves when this
side asks for it, and it asks when the pool has blocks: until then the ticket waits, and the blocks stay pinned over
there, which is the backpressure. Blocks that the pool has cached are not fetched but shared.

    prefilling    handed over; the leader may be gone meanwhile         PREFILLING     by task id
    prefilled     has a ticket, waits for blocks, the oldest first      PREFILLED      in order of arrival
    transferring  has blocks that are being written                     TRANSFERRING   by task id

Blocks of a request that leaves in mid-transfer are free at once: the executor is told to cancel before it is told
anything else, and what it is told it does in order. So is an executor that comes back after it had stalled: whatever
it was receiving (`stale`) is cancelled before it gets its first plan.

Any failure on the way costs time only: the request goes back to the queue, and is handed over again, or computed here
once that has failed `FAILURES_MAX` times in a row.
"""

from __future__ import annotations

from bisect import insort
from typing import NamedTuple

from bus.control.messages import KvTicket
from services.batching.batch import Batcher
from services.batching.request import Request, RequestStatus

FAILURES_MAX = 3


class Fetch(NamedTuple):
    """What to receive: blocks `first_block`.. of the request's ticket, into `block_ids`. Nothing when that is empty."""

    request: Request
    first_block: int
    block_ids: list[int]


class RemotePrefill:
    """The requests of one `Batcher` that are away. `tokens_min`: who lacks fewer is computed here; 0 = everybody.

    `first_task_id` begins the numbers of tasks, which no two incarnations of a scheduler share.
    """

    def __init__(self, batch: Batcher, *, tokens_min: int, first_task_id: int) -> None:
        self.prefilling: dict[int, Request] = {}
        self.prefilled: list[Request] = []
        self.transferring: dict[int, Request] = {}
        self.stale: list[int] = []  # fetches that were under way when the executor was lost
        self.has_leader = False
        self._batch = batch
        self._tokens_min = tokens_min
        self._next_task_id = first_task_id

    @property
    def num_waiting(self) -> int:
        """Requests that are away and hold no block."""
        return len(self.prefilling) + len(self.prefilled)

    def hand_over(self) -> list[Request]:
        """Take from the queue whoever should be computed elsewhere, and return them with their new `task_id`."""
        batch = self._batch
        if not (self._tokens_min and self.has_leader and batch.pool is not None):
            return []
        leaving = [request for request in batch.waiting if not request.stays and self._should_leave(request)]
        for request in leaving:
            batch.waiting.remove(request)
            request.move_to(RequestStatus.PREFILLING)
            request.task_id = self._next_task_id
            self._next_task_id += 1
            self.prefilling[request.task_id] = request
        return leaving

    def _should_leave(self, request: Request) -> bool:
        lacking = request.num_tokens - self._batch.num_cached_tokens(request)
        request.stays = request.num_prefill_failures >= FAILURES_MAX or lacking < self._tokens_min
        return not request.stays

    def offered(self, request: Request, ticket: KvTicket) -> None:
        """The KV of all tokens of a prefilling request is to be had."""
        del self.prefilling[request.task_id]
        request.move_to(RequestStatus.PREFILLED)
        request.ticket = ticket
        insort(self.prefilled, request, key=lambda one: one.arrived_at_ns)

    def start_fetches(self) -> list[Fetch]:
        """Give blocks to prefilled requests, as long as there are any. Who needs no transfer has arrived: say so."""
        batch, fetches = self._batch, []
        while batch.pool is not None and self.prefilled:
            if len(batch.running) + batch.num_arriving >= batch.max_num_seqs:
                break
            request = self.prefilled[0]
            ticket = request.ticket
            assert ticket is not None
            num_shared = batch.take_blocks(request, ticket.num_tokens)
            if num_shared is None:
                break
            del self.prefilled[0]
            request.move_to(RequestStatus.TRANSFERRING)
            self.transferring[request.task_id] = request
            batch.num_arriving = len(self.transferring)
            block_ids = request.block_ids[num_shared : batch.pool.blocks_for(ticket.num_tokens)]
            fetches.append(Fetch(request, num_shared, block_ids))
        return fetches

    def arrived(self, request: Request) -> None:
        """All blocks hold what they should: the request runs from now on."""
        assert request.ticket is not None
        del self.transferring[request.task_id]
        self._batch.num_arriving = len(self.transferring)
        request.num_computed_tokens = request.ticket.num_tokens
        request.num_prefill_failures = 0
        self._forget_task(request)
        self._batch.run(request)

    def give_back(self, request: Request) -> None:
        """Let it wait here again, first in line: its task has failed, or its transfer, which is over."""
        self._leave(request)
        request.forget_computed()
        request.move_to(RequestStatus.PREEMPTED)
        request.stays = False
        self._batch.waiting.appendleft(request)

    def remove(self, request: Request, status: RequestStatus) -> None:
        """Take it out for good."""
        self._leave(request)
        request.move_to(status)

    def leader_lost(self) -> list[Request]:
        """Nobody computes what was handed over; take it back. Offers stand as long as their workers do."""
        self.has_leader = False
        lost = sorted(self.prefilling.values(), key=lambda one: one.arrived_at_ns, reverse=True)
        for request in lost:
            self.give_back(request)
        return lost

    def leader_found(self) -> None:
        """Whoever waits may be handed over."""
        self.has_leader = True
        for request in self._batch.waiting:
            request.stays = False

    def executor_lost(self) -> None:
        """The blocks are gone; offers that were being fetched are not wanted any more (`stale`)."""
        for request in (*self.prefilling.values(), *self.prefilled):
            request.block_hashes = []  # the next executor's blocks may be of another size
        self.stale += self.transferring
        for request in sorted(self.transferring.values(), key=lambda one: one.arrived_at_ns, reverse=True):
            self.give_back(request)

    def _leave(self, request: Request) -> None:
        match request.status:
            case RequestStatus.PREFILLING:
                del self.prefilling[request.task_id]
            case RequestStatus.PREFILLED:
                self.prefilled.remove(request)
            case _:
                del self.transferring[request.task_id]
                self._batch.num_arriving = len(self.transferring)
                self._batch.free(request.block_ids)
                request.block_ids = []
        self._forget_task(request)

    @staticmethod
    def _forget_task(request: Request) -> None:
        request.task_id = 0
        request.ticket = None

    def check_invariants(self) -> None:
        """Assert that states, collections, tickets and blocks agree."""
        for task_id, request in self.prefilling.items():
            assert request.status is RequestStatus.PREFILLING and request.task_id == task_id, request
            assert request.ticket is None and not request.block_ids, request
        assert self.has_leader or not self.prefilling, "handed to nobody"
        for request in self.prefilled:
            assert request.status is RequestStatus.PREFILLED and not request.block_ids, request
            assert request.ticket is not None and request.ticket.num_tokens == request.num_tokens - 1, request
        assert self.prefilled == sorted(self.prefilled, key=lambda one: one.arrived_at_ns)
        for task_id, request in self.transferring.items():
            assert request.status is RequestStatus.TRANSFERRING and request.task_id == task_id, request
            assert request.ticket is not None and request.num_computed_tokens == 0, request
        held = [request.block_ids for request in self.transferring.values()]
        self._batch.check_invariants(held)
        assert self._batch.num_arriving == len(self.transferring)
