"""Can the executor's answer be trusted?"""

from __future__ import annotations

from bus.control.messages import SampledToken
from services.batching.batch import ScheduledRequest


def complaint(scheduled: ScheduledRequest, sampled: SampledToken | None, vocab_size: int) -> str | None:
    """Return what is wrong with the executor's answer for one request, None when it is as planned."""
    if sampled is None:
        return "the executor left a planned request out of its answer"
    if scheduled.sample and not sampled.error and not 0 <= sampled.token_id < vocab_size:
        return f"the executor drew token id {sampled.token_id}; vocab_size is {vocab_size}"
    if len(sampled.prompt_logprobs) != scheduled.num_prompt_logprobs:
        return (
            f"the executor sent {len(sampled.prompt_logprobs)} prompt log-probabilities "
            f"instead of {scheduled.num_prompt_logprobs}"
        )
    return None
