"""One HTTP request at work: its choices are submitted together, followed together, and abandoned together."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import NoReturn, Protocol

from bus.clock import NS_PER_S, now_ns
from gateway.choices import Choice, ChoicePlan, Update
from gateway.errors import ApiError
from gateway.events import DeliverAccepted, DeliverError, DeliverFinish, DeliverTokens, Delivery
from gateway.inbox import Inbox
from gateway.metrics import Metrics
from gateway.text import Tokenizer


class Executor(Protocol):
    """What a generation needs of the dispatcher."""

    def submit(self, plan: ChoicePlan, inbox: Inbox) -> None:
        """Have the choice computed; deliveries for it go to `inbox`."""
        ...

    def leave(self, request_id: str, *, stop_string_met: bool) -> None:
        """Nobody wants more of the choice. Unknown ids are ignored."""
        ...


class Generation:
    """Use as: `await start()`, iterate `updates()`, and `close()` in a `finally`."""

    def __init__(
        self,
        plans: Sequence[ChoicePlan],
        *,
        executor: Executor,
        tokenizer: Tokenizer,
        metrics: Metrics,
        backlog_tokens_max: int,
    ) -> None:
        self.choices = [Choice(plan, tokenizer) for plan in plans]
        self._executor = executor
        self._metrics = metrics
        self._inbox = Inbox(backlog_tokens_max)
        self._early: list[tuple[int, Delivery]] = []
        self._clocks = [_ChoiceClock(now_ns()) for _ in plans]

    async def start(self) -> None:
        """Submit every choice; return when each was accepted by a DP group.

        Raises:
            ApiError: one was not; none is computed any more.
        """
        for choice in self.choices:
            self._executor.submit(choice.plan, self._inbox)
        unanswered = {choice.plan.index for choice in self.choices}
        while unanswered:
            for index, delivery in await self._inbox.take():
                if isinstance(delivery, DeliverError):
                    self._raise(delivery)
                unanswered.discard(index)
                if not isinstance(delivery, DeliverAccepted):
                    self._early.append((index, delivery))

    async def updates(self) -> AsyncIterator[list[Update]]:
        """Yield what became known, at most one update per choice at a time, until every choice is finished.

        Raises:
            ApiError: a choice failed; none is computed any more.
        """
        deliveries, self._early = self._early, []
        while True:
            merged: dict[int, Update] = {}
            for index, delivery in deliveries:
                update = self._take(self.choices[index], delivery)
                if update is not None:
                    known = merged.get(index)
                    merged[index] = known.followed_by(update) if known else update
            if merged:
                yield list(merged.values())
            if all(choice.is_finished for choice in self.choices):
                return
            deliveries = await self._inbox.take()

    def close(self) -> None:
        """Have whatever still runs aborted. Safe to call twice."""
        for choice in self.choices:
            if not choice.is_finished:
                choice.is_finished = True
                self._metrics.finished("abort", choice.plan, choice.num_output_tokens, None)
                self._executor.leave(choice.plan.request_id, stop_string_met=False)

    def usage(self) -> dict[str, object]:
        """Return OpenAI's `usage`; a prompt counts once, however many choices it has."""
        by_prompt = {choice.plan.prompt_index: choice for choice in reversed(self.choices)}
        num_prompt = sum(len(choice.plan.prompt_token_ids) for choice in by_prompt.values())
        num_output = sum(choice.num_output_tokens for choice in self.choices)
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_output,
            "total_tokens": num_prompt + num_output,
            "prompt_tokens_details": {
                "cached_tokens": sum(choice.num_cached_tokens for choice in by_prompt.values())
            },
        }

    def _take(self, choice: Choice, delivery: Delivery) -> Update | None:
        if isinstance(delivery, DeliverError):
            self._raise(delivery)
        if choice.is_finished or isinstance(delivery, DeliverAccepted):
            return None
        if isinstance(delivery, DeliverFinish):
            update = choice.finish(delivery.reason, delivery.stop_token_id)
        else:
            update = self._take_tokens(choice, delivery)
        if update.finish_reason:
            clock = self._clocks[choice.plan.index]
            self._metrics.finished(update.finish_reason, choice.plan, choice.num_output_tokens, clock.times())
        return update

    def _take_tokens(self, choice: Choice, delivery: DeliverTokens) -> Update:
        choice.num_cached_tokens = max(choice.num_cached_tokens, delivery.num_cached_tokens)
        update = choice.push(delivery.token_ids, delivery.logprobs, delivery.prompt_logprobs)
        if update.token_ids:
            self._clocks[choice.plan.index].tokens(self._metrics, len(update.token_ids))
        if choice.is_finished:
            self._executor.leave(choice.plan.request_id, stop_string_met=True)
        return update

    def _raise(self, failure: DeliverError) -> NoReturn:
        for choice in self.choices:
            if choice.plan.request_id == failure.request_id:
                choice.is_finished = True
                self._metrics.finished("error", choice.plan, choice.num_output_tokens, None)
        self.close()
        raise ApiError(failure.status, failure.code, failure.message, retry_after_s=failure.retry_after_s)


class _ChoiceClock:
    """When things happened to one choice, monotonic."""

    def __init__(self, submitted_ns: int) -> None:
        self._submitted_ns = submitted_ns
        self._first_ns = 0
        self._last_ns = 0

    def tokens(self, metrics: Metrics, num_tokens: int) -> None:
        now = now_ns()
        if not self._first_ns:
            self._first_ns = now
            metrics.first_token((now - self._submitted_ns) / NS_PER_S)
        else:
            metrics.later_tokens((now - self._last_ns) / NS_PER_S)
        metrics.generated(num_tokens)
        self._last_ns = now

    def times(self) -> tuple[float, float]:
        """Return seconds: whole request, and from the first token to the last."""
        return ((now_ns() - self._submitted_ns) / NS_PER_S, (self._last_ns - self._first_ns) / NS_PER_S)
