"""May this request be queued at all? Pure checks; each refusal names field, value and rule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from bus.control.messages import AddRequest, ExecutorReady

RefusalCode = Literal["queue_full", "too_long", "invalid"]


class Refusal(NamedTuple):
    """Why a request is not queued."""

    code: RefusalCode
    message: str


@dataclass(frozen=True, slots=True)
class Limits:
    """What one request may use. 0 = not known until an executor says it; checked again then."""

    cache_tokens: int = 0
    max_model_len: int = 0
    vocab_size: int = 0

    def narrowed_by(self, ready: ExecutorReady) -> Limits:
        """Return the limits once the executor has said its own."""
        windows = [length for length in (self.max_model_len, ready.max_model_len) if length > 0]
        return Limits(
            cache_tokens=ready.num_blocks * ready.block_tokens,
            max_model_len=min(windows, default=0),
            vocab_size=ready.vocab_size,
        )


def refusal(message: AddRequest, limits: Limits) -> Refusal | None:
    """Return why `message` can never be served within `limits`, None when it can."""
    return content_refusal(message, limits) or length_refusal(
        len(message.prompt_token_ids), message.sampling.max_tokens, limits
    )


def length_refusal(num_prompt_tokens: int, max_tokens: int, limits: Limits) -> Refusal | None:
    """Return why so many tokens can never fit, None when they can."""
    num_tokens = num_prompt_tokens + max_tokens
    text = f"prompt tokens {num_prompt_tokens} + max_tokens {max_tokens} = {num_tokens} must not exceed"
    if 0 < limits.max_model_len < num_tokens:
        return Refusal("too_long", f"{text} max_model_len {limits.max_model_len}")
    if 0 < limits.cache_tokens < num_tokens:
        return Refusal("too_long", f"{text} the KV cache of {limits.cache_tokens} tokens")
    return None


def vocabulary_refusal(token_ids: list[int] | tuple[int, ...], limits: Limits) -> Refusal | None:
    """Return which token the model does not have, None when it has all."""
    if not token_ids:
        return None
    if min(token_ids) < 0:
        return Refusal("invalid", f"token id {min(token_ids)} must not be negative")
    if 0 < limits.vocab_size <= max(token_ids):
        return Refusal("invalid", f"token id {max(token_ids)} must be below vocab_size {limits.vocab_size}")
    return None


def content_refusal(message: AddRequest, limits: Limits) -> Refusal | None:
    """Return what in `message` makes no sense, None when all does. Says nothing of its length."""
    sampling = message.sampling
    if not message.prompt_token_ids:
        return Refusal("invalid", "prompt_token_ids is empty; it must have at least one token")
    if sampling.max_tokens < 0:
        return Refusal("invalid", f"max_tokens {sampling.max_tokens} must not be negative")
    if not 0 <= sampling.min_tokens <= sampling.max_tokens:
        return Refusal(
            "invalid",
            f"min_tokens {sampling.min_tokens} must be between 0 and max_tokens {sampling.max_tokens}",
        )
    if len(message.output_token_ids) > sampling.max_tokens:
        return Refusal(
            "invalid",
            f"output_token_ids has {len(message.output_token_ids)} tokens; it must not exceed "
            f"max_tokens {sampling.max_tokens}",
        )
    return vocabulary_refusal(message.prompt_token_ids + message.output_token_ids, limits)
