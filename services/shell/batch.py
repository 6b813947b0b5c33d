"""The batch of one prefill worker: prompts that are computed once, then offered.

Theory. As `services/batching/batch.py`, with three differences. A prompt gets the blocks of all its tokens when it
is admitted, so it is never preempted. The step's budget is shared (`shares.py`), not given to the oldest. And a
prompt that has caught up is *offered*: it takes no more part in steps and keeps its blocks, until somebody has
fetched them or the offer is withdrawn. Offers thus hold back new prompts: that is how lack of room at the decode
side comes to be felt here.

If a running prompt is about to compute the very block that a waiting one lacks next, that one waits for it; others may
pass it.
"""

from __future__ import annotations

from collections.abc import Iterable

from services.batching.batch import Batcher, ScheduledRequest
from services.batching.request import Request, RequestStatus
from services.cache.blocks import BlockPool
from services.shell.shares import chunked_shares, whole_shares


class PrefillBatcher(Batcher):
    """See the module's docstring. `max_num_batched_tokens` is exceeded by one long prompt that is not to be chunked."""

    def __init__(
        self,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        enable_prefix_caching: bool,
        enable_chunked_prefill: bool,
        kv_identity: str,
    ) -> None:
        super().__init__(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            enable_prefix_caching=enable_prefix_caching,
            kv_identity=kv_identity,
        )
        self.offered: list[Request] = []
        self._shares = chunked_shares if enable_chunked_prefill else whole_shares

    def schedule(self) -> list[ScheduledRequest]:
        """Choose the next step's work; empty when there is none or no executor."""
        if self.pool is None:
            return []
        self._admit_all(self.pool)
        num_missing = [request.num_tokens - request.num_computed_tokens for request in self.running]
        shares = self._shares(num_missing, self.max_num_batched_tokens)
        return [
            _scheduled(request, num_tokens)
            for request, num_tokens in zip(self.running, shares, strict=True)
            if num_tokens
        ]

    def _admit_all(self, pool: BlockPool) -> None:
        for request in list(self.waiting):
            if len(self.running) >= self.max_num_seqs:
                return
            cached_ids = self._cached_prefix(pool, request)
            if self._is_being_computed(pool, request, len(cached_ids)):
                continue
            num_missing = pool.blocks_for(request.num_tokens) - len(cached_ids)
            if not pool.can_allocate(num_missing, cached_ids):
                return
            self.waiting.remove(request)
            request.move_to(RequestStatus.RUNNING)
            self.running.append(request)
            self.count_lookup(request, len(cached_ids) * pool.block_tokens)
            self._reuse(pool, request, cached_ids)
            request.block_ids += pool.allocate(num_missing)

    def _is_being_computed(self, pool: BlockPool, request: Request, num_cached: int) -> bool:
        """Tell whether a running prompt will compute the first block that `request` lacks."""
        lacking = self._reusable_hashes(pool, request)[num_cached : num_cached + 1]
        return bool(lacking) and any(
            one.num_published_blocks <= num_cached
            and one.block_hashes[num_cached : num_cached + 1] == lacking
            for one in self.running
        )

    @property
    def num_promised_blocks(self) -> int:
        """Blocks that the waiting ones will take, cached or not."""
        pool = self.pool
        return sum(pool.blocks_for(request.num_tokens) for request in self.waiting) if pool else 0

    def offer(self, request: Request) -> None:
        """A running prompt has caught up: name its full blocks, and keep them all, these very ones.

        A block of which the pool knows a copy stays without a name, and so do all after it: somebody else reads them by
        their numbers, so they cannot be exchanged for the copy as `publish` does.
        """
        pool = self.pool
        assert pool is not None and request.num_computed_tokens == request.num_tokens
        if self._enable_prefix_caching:
            hashes = request.extend_block_hashes(self._root, pool.block_tokens)
            for index in range(request.num_published_blocks, len(hashes)):
                if pool.match(hashes[index : index + 1]):
                    break
                pool.publish(request.block_ids[index], hashes[index], hashes[index - 1] if index else None)
                request.num_published_blocks = index + 1
        self.running.remove(request)
        self.offered.append(request)
        request.move_to(RequestStatus.OFFERED)

    def end_offer(self, request: Request) -> None:
        """Nobody reads its blocks any more."""
        self.offered.remove(request)
        self.free(request.block_ids)
        request.block_ids = []
        request.move_to(RequestStatus.FINISHED_LENGTH)

    def give_back(self, request: Request) -> None:
        """Take a running prompt out, to be computed again from its beginning, here or elsewhere."""
        self.running.remove(request)
        self.free(request.block_ids)
        request.block_ids = []
        request.forget_computed()
        request.move_to(RequestStatus.PREEMPTED)

    def take_waiting(self) -> list[Request]:
        """Return all who wait, and forget them."""
        waiting = list(self.waiting)
        self.waiting.clear()
        return waiting

    def check_invariants(self, held_elsewhere: Iterable[list[int]] = ()) -> None:
        """Assert that states, collections and blocks agree."""
        for request in self.offered:
            assert request.status is RequestStatus.OFFERED, request
            assert request.num_computed_tokens == request.num_tokens and request.block_ids, request
        for request in self.running:
            assert self.pool is not None
            assert len(request.block_ids) == self.pool.blocks_for(request.num_tokens), request
        super().check_invariants([*held_elsewhere, *(request.block_ids for request in self.offered)])


def _scheduled(request: Request, num_tokens: int) -> ScheduledRequest:
    catches_up = request.num_computed_tokens + num_tokens == request.num_tokens
    return ScheduledRequest(request, num_tokens, sample=catches_up and request.samples, offer_kv=catches_up)
