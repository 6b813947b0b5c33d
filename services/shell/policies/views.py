"""What a policy sees."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PromptView:
    """A prompt that waits."""

    number: int  # grows by one with each prompt
    num_tokens: int


@dataclass(frozen=True, slots=True)
class WorkerView:
    """A prefill worker that could take the prompt."""

    index: int
    num_cached_tokens: int  # of this prompt, from its beginning
    load: float  # `services.shell.policies.cost.prefill_cost` of all that it has still to compute
    num_free_blocks: int
