"""`cost`: where the prompt is done first.

What a prompt costs grows with the tokens that are not cached, and with the context that attention reads for each of
them.
"""

from __future__ import annotations

from collections.abc import Sequence

from services.shell.policies.views import PromptView, WorkerView

CONTEXT_TOKENS = 4096  # of context, read for one token, cost about as much as all else done for that token


def prefill_cost(num_tokens: int, num_done_tokens: int) -> float:
    """Return what it takes to compute tokens `num_done_tokens` .. `num_tokens`, in tokens without context."""
    mean_context = (num_done_tokens + num_tokens) / 2
    return (num_tokens - num_done_tokens) * (1 + mean_context / CONTEXT_TOKENS)


def choose(prompt: PromptView, workers: Sequence[WorkerView]) -> int:
    """Return the worker whose load and this prompt together cost the least."""
    return min(
        workers,
        key=lambda worker: (
            worker.load + prefill_cost(prompt.num_tokens, worker.num_cached_tokens),
            worker.index,
        ),
    ).index
