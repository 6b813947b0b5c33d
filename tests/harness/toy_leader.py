"""A prefill leader with its workers, for the scheduler's simulation: computes what it is handed, and offers the KV.

An offer holds what `ToyExecutor` would have written: for each position its token and all before it. It stands until it
is fetched, withdrawn or lost with its worker; whatever stands at the end was forgotten by somebody.
"""

from __future__ import annotations

from collections import deque

from bus.control.messages import (
    AbortPrefill,
    AddPrefill,
    FetchKv,
    KvTicket,
    PrefillCompleted,
    PrefillFailed,
    SampledToken,
)
from tests.harness.toy_executor import Entry, kv_entries, next_token, prompt_logprob


class ToyLeader:
    """`queue` waits to be computed; `offers` stand, by task id."""

    def __init__(self, vocab_size: int, block_tokens: int) -> None:
        self.queue: deque[AddPrefill] = deque()
        self.offers: dict[int, list[Entry]] = {}
        self._vocab_size = vocab_size
        self._block_tokens = block_tokens

    def take(self, message: AddPrefill | AbortPrefill) -> None:
        """Queue a task, or forget it, computed or not."""
        if isinstance(message, AddPrefill):
            self.queue.append(message)
            return
        self.queue = deque(task for task in self.queue if task.task_id != message.task_id)
        self.offers.pop(message.task_id, None)

    def forget_all(self) -> None:
        """The leader has died, or the scheduler whose tasks these are."""
        self.queue.clear()
        self.offers.clear()

    def fail(self, *, retryable: bool) -> PrefillFailed:
        """Give the next task back."""
        task = self.queue.popleft()
        return PrefillFailed(task_id=task.task_id, code="toy", message="by chance", retryable=retryable)

    def lose_offers(self) -> list[PrefillFailed]:
        """Their worker has died."""
        lost, self.offers = list(self.offers), {}
        return [PrefillFailed(task_id=task_id, code="offer_lost", message="worker died") for task_id in lost]

    def work(self) -> PrefillCompleted:
        """Compute the next task."""
        task = self.queue.popleft()
        tokens = [*task.prompt_token_ids, *task.output_token_ids]
        self.offers[task.task_id] = kv_entries(tokens)
        num_blocks = -(-len(tokens) // self._block_tokens)
        ticket = KvTicket(
            index=0,
            incarnation=1,
            segment="/toy",
            slot=0,
            serial=task.task_id,
            num_tokens=len(tokens),
            block_ids=tuple(range(num_blocks)),
        )
        return PrefillCompleted(task_id=task.task_id, sampled=self._sampled(task, tokens), ticket=ticket)

    def _sampled(self, task: AddPrefill, tokens: list[int]) -> SampledToken:
        sampling, prompt = task.sampling, task.prompt_token_ids
        allow_stop = len(task.output_token_ids) >= sampling.min_tokens
        token_id = -1
        if sampling.max_tokens > 0:
            token_id = next_token(tokens, sampling, allow_stop=allow_stop, vocab_size=self._vocab_size)
        logprobs = ()
        if sampling.prompt_logprobs >= 0 and not task.output_token_ids:
            logprobs = tuple(prompt_logprob(prompt[:end], prompt[end]) for end in range(1, len(prompt)))
        return SampledToken(request_id=task.request_id, token_id=token_id, prompt_logprobs=logprobs)

    def read(self, fetch: FetchKv) -> list[list[Entry]] | None:
        """Return the blocks that a fetch asks for, None when the offer does not stand."""
        entries = self.offers.get(fetch.ticket.serial)
        if entries is None:
            return None
        first, size = fetch.first_block * self._block_tokens, self._block_tokens
        blocks = [entries[begin : begin + size] for begin in range(first, len(entries), size)]
        assert len(blocks) == len(fetch.block_ids), "a fetch must name one block for each that it reads"
        return blocks
