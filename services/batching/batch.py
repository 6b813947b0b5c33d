"""Continuous batching: which tokens of which requests the next step computes, and in which blocks.

Theory. There is no prefill phase and no decode phase. Every request has `num_computed_tokens`, which chases
its `num_tokens`; a step lets each request catch up as far as the token budget goes. A decoding request lacks
one token, a new prompt lacks many and gets them in chunks, a preempted request lacks everything again: it is
all one rule.

Running requests come first, in order of admission, so nobody who streams waits for a newcomer's prompt. Then
waiting requests are admitted first come, first served, when all tokens known of them find blocks; the head of
the queue is never overtaken. When a running request needs a block and none is free, the newest running
request is preempted: its blocks are taken back and it waits, first in line, to be computed again from prompt
and output. Preemption is not an error and loses no token. The oldest running request is never preempted and
every admitted request fits the pool alone, so every step makes progress.

Full blocks whose tokens are computed are published by content (`services/cache`). A request that is admitted
takes over the longest prefix of its tokens that is cached, and is computed from there; at least its last
token always is, because its logits are needed. If a request of the same step is about to publish the very
block that the next in line lacks, that one waits for it instead of computing the same again. A request that
wants the log-probabilities of its prompt needs every row of it, so it takes over nothing.

Where the cached blocks end, blocks of the host tier follow if there is one: they are read back before the step, when
that is sooner done than computing them. And where these end, the tokens may go on as those of a running request
do, in a block that is not full, or not the same to its end: that block is copied before the step, and the request is
computed from where the two part. So the choices of one prompt compute its last, partial block once.

Blocks of a request that ends while a step is under way retire: the executor may still write them, so they are
free only when the step is over, and the one that was sent ahead of it if there is one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

from bus.block_hash import BlockHash, root_hash
from bus.control.messages import DRAWN_BEFORE, PlannedSequence
from services.batching.request import Request, RequestStatus
from services.cache.blocks import BlockPool
from services.cache.tier_cost import TierCost


@dataclass(frozen=True, slots=True, eq=False)
class ScheduledRequest:
    """`num_tokens` tokens of `request` from its `num_computed_tokens` on; if `sample`, one more is drawn.

    `offer_kv`: afterwards its KV is offered to whoever goes on with it. `is_ahead`: planned while the step before is
    under way, which draws the token that this one computes.
    """

    request: Request
    num_tokens: int
    sample: bool
    offer_kv: bool = False
    is_ahead: bool = False

    @property
    def num_prompt_logprobs(self) -> int:
        """How many prompt log-probabilities this chunk yields: one per row that a prompt token follows."""
        request = self.request
        if not request.wants_prompt_logprobs:
            return 0
        end = min(request.num_computed_tokens + self.num_tokens, request.num_prompt_tokens - 1)
        return max(0, end - request.num_computed_tokens)

    def planned(self) -> PlannedSequence:
        """Return the executor's view of it; self-contained."""
        request, ahead = self.request, int(self.is_ahead)
        drawn = (DRAWN_BEFORE,) * ahead
        start = request.num_tokens if ahead else request.num_computed_tokens
        num_prompt_logprobs = 0 if ahead else self.num_prompt_logprobs
        num_prompt_tokens = request.num_prompt_tokens
        prompt: tuple[int, ...] = ()
        output: tuple[int, ...] = ()
        if self.sample and request.sampling.uses_outputs:
            output = (*request.token_ids[num_prompt_tokens:], *drawn)
            if request.sampling.uses_prompt:
                prompt = tuple(request.token_ids[:num_prompt_tokens])
        return PlannedSequence(
            request_id=request.request_id,
            token_ids=drawn or tuple(request.token_ids[start : start + self.num_tokens]),
            start=start,
            block_table=tuple(request.block_ids),
            sample=self.sample,
            sampling=request.sampling if self.sample or num_prompt_logprobs else None,
            num_prompt_tokens=num_prompt_tokens,
            allow_stop=request.num_output_tokens + ahead >= request.sampling.min_tokens,
            next_prompt_token_ids=tuple(request.token_ids[start + 1 : start + 1 + num_prompt_logprobs]),
            prompt_token_ids=prompt,
            output_token_ids=output,
            offer_kv=self.offer_kv,
        )


class Moves(NamedTuple):
    """Whole blocks to move before a step, in this order; see `StepPlan`."""

    stores: tuple[tuple[int, int], ...]
    loads: tuple[tuple[int, int], ...]
    copies: tuple[tuple[int, int], ...]


class Prefix(NamedTuple):
    """What an admitted request need not compute: shared blocks, slots to load, and part of a block to copy."""

    block_ids: list[int]
    slots: list[int]
    open_block: int = -1  # of a running request
    num_open_tokens: int = 0

    @property
    def num_blocks(self) -> int:
        """Whole blocks."""
        return len(self.block_ids) + len(self.slots)


class Batcher:
    """The waiting queue, the running list and the blocks of one DP group. One step at a time."""

    def __init__(
        self, *, max_num_seqs: int, max_num_batched_tokens: int, enable_prefix_caching: bool, kv_identity: str
    ) -> None:
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.pool: BlockPool | None = None
        self.retiring_block_ids: list[int] = []
        self._retiring_later_ids: list[int] = []  # of two steps under way, the first is over
        self.num_arriving = 0  # seats kept for requests whose KV is on its way
        self.num_preemptions = 0
        self.prefix_cache_queries = 0  # tokens of requests that were looked up when first admitted
        self.prefix_cache_hits = 0  # those of them that were found
        self.host_cache_queries = 0  # tokens that were looked for in the host tier
        self.host_cache_hits = 0  # those of them that were found
        self.num_copied_tokens = 0  # taken over from running requests' open blocks
        self.cost: TierCost | None = None
        self._loads: list[tuple[int, int]] = []
        self._copies: list[tuple[int, int]] = []
        self._enable_prefix_caching = enable_prefix_caching
        self._kv_identity = kv_identity
        self._root = b""

    def attach(self, pool: BlockPool, cost: TierCost | None = None) -> None:
        """Begin with an executor's empty blocks. `cost` decides about the pool's host tier."""
        assert self.pool is None and not self.running and not self.num_retiring
        self.pool = pool
        self.cost = cost
        self._root = root_hash(self._kv_identity, pool.block_tokens)
        for request in self.waiting:
            request.block_hashes = []  # they may have been made for another block size
            request.stays = False

    def detach(self) -> None:
        """The blocks are gone, and the index with them: all who run are preempted, the oldest first in line."""
        self.release_retired()
        self.release_retired()
        while self.running:
            self._preempt(self.running.pop())
        self.pool = None
        self.cost = None

    def enqueue(self, request: Request) -> None:
        """Put a new request at the end of the queue."""
        self.waiting.append(request)

    def remove(self, request: Request, status: RequestStatus, *, step_under_way: bool) -> None:
        """Take a request out for good; `step_under_way` = the executor may still write its blocks."""
        if request.status is RequestStatus.RUNNING:
            self.running.remove(request)
        else:
            self.waiting.remove(request)
        if step_under_way:
            self.retiring_block_ids += request.block_ids
        else:
            self.free(request.block_ids)
        request.block_ids = []
        request.move_to(status)

    def run(self, request: Request) -> None:
        """Begin with a request whose blocks hold its computed tokens already."""
        request.move_to(RequestStatus.RUNNING)
        self.running.append(request)
        self.publish(request)

    def take_blocks(self, request: Request, num_tokens: int) -> int | None:
        """Give it blocks for all its tokens, shared ones where the first `num_tokens` are cached in whole blocks.

        Returns: how many are shared; None, and nothing has changed, when the others cannot be had.
        """
        pool = self.pool
        assert pool is not None and not request.block_ids
        hashes = (
            request.extend_block_hashes(self._root, pool.block_tokens) if self._enable_prefix_caching else []
        )
        shared_ids = pool.match(hashes[: num_tokens // pool.block_tokens])
        num_missing = pool.blocks_for(request.num_tokens) - len(shared_ids)
        if not pool.can_allocate(num_missing, shared_ids):
            return None
        pool.share(shared_ids)
        request.block_ids = shared_ids + pool.allocate(num_missing)
        request.num_published_blocks = len(shared_ids)
        return len(shared_ids)

    def num_cached_tokens(self, request: Request) -> int:
        """Return how many of its tokens need not be computed here."""
        assert self.pool is not None
        cached_ids = self._cached_prefix(self.pool, request)
        slots = self._host_prefix(self.pool, request, len(cached_ids))
        return (len(cached_ids) + len(slots)) * self.pool.block_tokens

    def count_lookup(self, request: Request, num_cached_tokens: int, num_host_tokens: int = 0) -> None:
        """Note, the first time, how many of its tokens were found cached, and how many more in the host tier."""
        if not self._enable_prefix_caching or request.wants_prompt_logprobs or request.num_cached_tokens >= 0:
            return
        request.num_cached_tokens = min(num_cached_tokens + num_host_tokens, request.num_prompt_tokens)
        self.prefix_cache_queries += request.num_tokens
        self.prefix_cache_hits += num_cached_tokens
        if self.pool is not None and self.pool.host is not None:
            self.host_cache_queries += request.num_tokens - num_cached_tokens
            self.host_cache_hits += num_host_tokens

    def publish(self, request: Request) -> None:
        """Name the blocks of a running request that have become full; no step may be under way."""
        pool = self.pool
        assert pool is not None and request.status is RequestStatus.RUNNING
        if not self._enable_prefix_caching:
            return
        hashes = request.extend_block_hashes(self._root, pool.block_tokens)
        for index in range(request.num_published_blocks, request.num_computed_tokens // pool.block_tokens):
            parent = hashes[index - 1] if index else None
            request.block_ids[index] = pool.publish(request.block_ids[index], hashes[index], parent)
            request.num_published_blocks = index + 1

    def release_retired(self, *, step_follows: bool = False) -> None:
        """A step is over: nobody writes retired blocks any more, unless another step was under way already."""
        later = self.retiring_block_ids
        self.free(self._retiring_later_ids)
        self.retiring_block_ids, self._retiring_later_ids = [], later
        if not step_follows:
            self.free(later)
            self._retiring_later_ids = []

    @property
    def num_retiring(self) -> int:
        """Blocks that nobody holds any more, but that a step under way may still write."""
        return len(self.retiring_block_ids) + len(self._retiring_later_ids)

    def schedule(self) -> list[ScheduledRequest]:
        """Choose the next step's work and allocate its blocks; empty when there is none or no executor."""
        if self.pool is None:
            return []
        num_preemptions = self.num_preemptions
        step = self._schedule_running(self.pool)
        if self.num_preemptions == num_preemptions:
            self._admit_waiting(self.pool, step)
        return step

    def schedule_ahead(self, step: list[ScheduledRequest]) -> list[ScheduledRequest]:
        """Choose the work of the step after `step`, which is under way, and allocate its blocks.

        From counts alone: whoever draws a token in `step` computes it in the next, unless that one is its last. A
        token may turn out to have stopped its request; then what is computed after it is in vain. Empty whenever there
        is more to decide: somebody has not caught up, could be admitted, or would have to be preempted, or a block is
        to be stored.
        """
        pool = self.pool
        has_seats = len(self.running) + self.num_arriving < self.max_num_seqs
        if pool is None or (self.waiting and has_seats):
            return []
        drawing = {id(one.request) for one in step if one.sample}
        if not all(id(request) in drawing for request in self.running):
            return []
        going_on = [r for r in self.running if r.num_output_tokens + 1 < r.sampling.max_tokens]
        num_missing = [max(0, pool.blocks_for(r.num_tokens + 1) - len(r.block_ids)) for r in going_on]
        if len(going_on) > self.max_num_batched_tokens or not pool.can_allocate(sum(num_missing)):
            return []
        if pool.host is not None and sum(num_missing) > pool.num_free - pool.num_cached:
            return []  # what would be evicted is to be stored, and a step that proves needless is not executed
        for request, count in zip(going_on, num_missing, strict=True):
            request.block_ids += pool.allocate(count)
        return [ScheduledRequest(request, 1, sample=True, is_ahead=True) for request in going_on]

    def take_moves(self) -> Moves:
        """Return what must be moved before the step that `schedule` has just chosen, once."""
        pool = self.pool
        if pool is None:
            return Moves((), (), ())
        moves = Moves(tuple(pool.stores), tuple(self._loads), tuple(self._copies))
        pool.stores, self._loads, self._copies = [], [], []
        if pool.host is not None:
            pool.host.unpin()
        return moves

    def _schedule_running(self, pool: BlockPool) -> list[ScheduledRequest]:
        step: list[ScheduledRequest] = []
        budget = self.max_num_batched_tokens
        position = 0
        # The victim is always the last, never one that is already in the step, so the list may shrink under
        # us.
        while position < len(self.running) and budget > 0:
            request = self.running[position]
            num_tokens = min(request.num_tokens - request.num_computed_tokens, budget)
            if not self._make_room(pool, request, num_tokens):
                break
            step.append(_scheduled(request, num_tokens))
            budget -= num_tokens
            position += 1
        return step

    def _make_room(self, pool: BlockPool, request: Request, num_tokens: int) -> bool:
        """Allocate what `request` lacks, preempting the newest as needed; False = it was the newest."""
        num_missing = pool.blocks_for(request.num_computed_tokens + num_tokens) - len(request.block_ids)
        while not pool.can_allocate(num_missing):
            victim = self.running.pop()
            self._preempt(victim)
            if victim is request:
                return False
        request.block_ids += self._allocate(pool, max(0, num_missing))
        return True

    def _allocate(self, pool: BlockPool, num_blocks: int) -> list[int]:
        """Take blocks for the plan that is being made; what must go for them may be kept in the host tier."""
        return pool.allocate(num_blocks, stores=self.cost is not None and self.cost.reading_pays)

    def _admit_waiting(self, pool: BlockPool, step: list[ScheduledRequest]) -> None:
        budget = self.max_num_batched_tokens - sum(scheduled.num_tokens for scheduled in step)
        while self.waiting and budget > 0 and len(self.running) + self.num_arriving < self.max_num_seqs:
            request = self.waiting[0]
            cached_ids = self._cached_prefix(pool, request)
            slots = self._host_prefix(pool, request, len(cached_ids))
            if self._is_coming(pool, request, len(cached_ids) + len(slots), step):
                return
            # Room for all of it, not just for the first chunk: otherwise a long prompt would be let in only
            # to be preempted half-way, again and again.
            if not pool.can_allocate(pool.blocks_for(request.num_tokens) - len(cached_ids), cached_ids):
                return
            self.waiting.popleft()
            prefix = self._with_open_block(pool, request, Prefix(cached_ids, slots))
            request.move_to(RequestStatus.RUNNING)
            self.running.append(request)
            num_tokens = self._take_over(pool, request, prefix, budget)
            step.append(_scheduled(request, num_tokens))
            budget -= num_tokens

    def _cached_prefix(self, pool: BlockPool, request: Request) -> list[int]:
        """Return the blocks that hold the longest reusable prefix; its last token is always computed."""
        return pool.match(self._reusable_hashes(pool, request))

    def _reusable_hashes(self, pool: BlockPool, request: Request) -> list[BlockHash]:
        if not self._enable_prefix_caching or request.wants_prompt_logprobs:
            return []
        hashes = request.extend_block_hashes(self._root, pool.block_tokens)
        return hashes[: (request.num_tokens - 1) // pool.block_tokens]

    def _is_coming(
        self, pool: BlockPool, request: Request, num_cached: int, step: list[ScheduledRequest]
    ) -> bool:
        """Tell whether someone in `step` computes the first block that `request` lacks."""
        lacking = self._reusable_hashes(pool, request)[num_cached : num_cached + 1]
        for one in step if lacking else ():
            hashes, index = one.request.block_hashes, one.request.num_computed_tokens // pool.block_tokens
            if index < len(hashes) and hashes[index] == lacking[0]:
                return True
        return False

    def _host_prefix(self, pool: BlockPool, request: Request, num_cached: int) -> list[int]:
        """Return the slots of the host tier that hold what follows the first `num_cached` blocks, if reading pays."""
        if pool.host is None or self.cost is None or not self.cost.reading_pays:
            return []
        return pool.host.match(self._reusable_hashes(pool, request)[num_cached:])

    def _with_open_block(self, pool: BlockPool, request: Request, prefix: Prefix) -> Prefix:
        """Add the running request's block that agrees the furthest with what `request` lacks first."""
        if not self._enable_prefix_caching or request.wants_prompt_logprobs:
            return prefix
        index = prefix.num_blocks
        start = index * pool.block_tokens
        wanted = request.token_ids[start : min(start + pool.block_tokens, request.num_tokens) - 1]
        for one in self.running:
            if one.num_computed_tokens <= start or not _begin_alike(one, request, index):
                continue
            known = one.token_ids[start : min(start + len(wanted), one.num_computed_tokens)]
            num_equal = _num_equal(wanted, known)
            if num_equal > prefix.num_open_tokens:
                prefix = prefix._replace(open_block=one.block_ids[index], num_open_tokens=num_equal)
        return prefix

    def _take_over(self, pool: BlockPool, request: Request, prefix: Prefix, budget: int) -> int:
        """Give an admitted request its blocks; return how many tokens the step computes behind `prefix`."""
        num_here = len(prefix.block_ids) * pool.block_tokens + prefix.num_open_tokens
        self.count_lookup(request, num_here, len(prefix.slots) * pool.block_tokens)
        self._reuse(pool, request, prefix.block_ids)
        self._load(pool, request, prefix.slots)
        request.num_computed_tokens += prefix.num_open_tokens
        self.num_copied_tokens += prefix.num_open_tokens
        num_tokens = min(request.num_tokens - request.num_computed_tokens, budget)
        num_blocks = pool.blocks_for(request.num_computed_tokens + num_tokens)
        request.block_ids += self._allocate(pool, num_blocks - prefix.num_blocks)
        if prefix.num_open_tokens:
            self._copies.append((prefix.open_block, request.block_ids[prefix.num_blocks]))
        return num_tokens

    def _load(self, pool: BlockPool, request: Request, slots: list[int]) -> None:
        """Have blocks of the host tier read before the step. They count as cached at once: nobody reads them sooner."""
        host = pool.host
        if host is None or not slots:
            return
        first = len(request.block_ids)
        hashes = request.block_hashes
        host.pin(hashes[first : first + len(slots)])
        block_ids = self._allocate(pool, len(slots))
        self._loads += zip(slots, block_ids, strict=True)
        for index, block_id in enumerate(block_ids, first):
            request.block_ids.append(
                pool.publish(block_id, hashes[index], hashes[index - 1] if index else None)
            )
        request.num_published_blocks = len(request.block_ids)
        request.num_computed_tokens = len(request.block_ids) * pool.block_tokens

    def _reuse(self, pool: BlockPool, request: Request, cached_ids: list[int]) -> None:
        pool.share(cached_ids)
        request.block_ids = cached_ids.copy()
        request.num_computed_tokens = len(cached_ids) * pool.block_tokens
        request.num_published_blocks = len(cached_ids)

    def _preempt(self, request: Request) -> None:
        self.free(request.block_ids)
        request.block_ids = []
        request.forget_computed()
        request.move_to(RequestStatus.PREEMPTED)
        request.stays = False
        self.waiting.appendleft(request)
        self.num_preemptions += 1

    def free(self, block_ids: list[int]) -> None:
        """Give back one reference to each."""
        if block_ids:
            assert self.pool is not None, "blocks outlived their pool"
            self.pool.free(block_ids)

    def check_invariants(self, held_elsewhere: Iterable[list[int]] = ()) -> None:
        """Assert that states, collections and blocks agree; `held_elsewhere` names blocks of requests not in here."""
        held = [*self.retiring_block_ids, *self._retiring_later_ids, *chain.from_iterable(held_elsewhere)]
        for request in self.waiting:
            assert request.status in (RequestStatus.WAITING, RequestStatus.PREEMPTED), request
            assert not request.block_ids and request.num_computed_tokens == 0, request
        for request in self.running:
            assert request.status is RequestStatus.RUNNING, request
            assert 0 <= request.num_computed_tokens < request.num_tokens, request
            assert self.pool is not None
            assert len(request.block_ids) >= self.pool.blocks_for(request.num_computed_tokens), request
            if self._enable_prefix_caching:
                self._check_published(self.pool, request)
            held += request.block_ids
        everyone = [*self.waiting, *self.running]
        assert len({id(request) for request in everyone}) == len(everyone), "a request is in two places"
        assert len(self.running) + self.num_arriving <= self.max_num_seqs
        if self.pool is None:
            assert not self.running and not held, "blocks without an executor"
        else:
            self.pool.check_invariants()
            self.pool.check_references(held)

    @staticmethod
    def _check_published(pool: BlockPool, request: Request) -> None:
        num_full = request.num_computed_tokens // pool.block_tokens
        assert request.num_published_blocks == num_full, "a full block is not published, or an open one is"
        assert pool.match(request.block_hashes[:num_full]) == request.block_ids[:num_full], request
        for block_id in request.block_ids[num_full:]:
            assert not pool.is_published(block_id), f"block {block_id} is written and shared"


def _begin_alike(one: Request, other: Request, num_blocks: int) -> bool:
    """Tell whether the first `num_blocks` blocks of both hold the same. The hash of the last says it all."""
    if num_blocks == 0:
        return True
    return one.num_published_blocks >= num_blocks and (
        one.block_hashes[num_blocks - 1] == other.block_hashes[num_blocks - 1]
    )


def _num_equal(some: list[int], others: list[int]) -> int:
    for index, (one, other) in enumerate(zip(some, others, strict=False)):
        if one != other:
            return index
    return min(len(some), len(others))


def _scheduled(request: Request, num_tokens: int) -> ScheduledRequest:
    catches_up = request.num_computed_tokens + num_tokens == request.num_tokens
    return ScheduledRequest(request, num_tokens, sample=catches_up and request.samples)
