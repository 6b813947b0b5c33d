"""`round_robin`: one after the other, whatever they have cached."""

from __future__ import annotations

from collections.abc import Sequence

from services.shell.policies.views import PromptView, WorkerView


def choose(prompt: PromptView, workers: Sequence[WorkerView]) -> int:
    """Return the worker whose turn it is among those with room."""
    return workers[prompt.number % len(workers)].index
