"""Read a block back, or compute it again? The cost model of the host tier, pure.

Both are measured on the machine at hand: the executor measures its file when it starts, and tells how long its steps
take. A step computes many tokens for the price of one pass over the weights, so only steps that are at least half full
tell what a token of prefill costs.
"""

from __future__ import annotations

_WEIGHT_OF_NEWS = 0.25


class TierCost:
    """Compares reading one block with computing its tokens.

    Args:
        block_bytes, bytes_per_s: of one block, and of the file; 0 = not measured, which counts as free.
        step_tokens: tokens of a full step.
    """

    def __init__(self, *, block_tokens: int, block_bytes: int, bytes_per_s: int, step_tokens: int) -> None:
        self.read_us = block_bytes / bytes_per_s * 1e6 if bytes_per_s else 0.0
        self.token_us = 0.0  # of prefill; 0 = not known yet
        self._block_tokens = block_tokens
        self._step_tokens = step_tokens

    def observe(self, num_tokens: int, duration_us: int) -> None:
        """Take note of a step that computed `num_tokens` tokens."""
        if 2 * num_tokens < self._step_tokens or duration_us <= 0:
            return
        token_us = duration_us / num_tokens
        self.token_us = (
            token_us
            if self.token_us == 0
            else ((1 - _WEIGHT_OF_NEWS) * self.token_us + _WEIGHT_OF_NEWS * token_us)
        )

    @property
    def reading_pays(self) -> bool:
        """Whether a block is read sooner than computed; assumed as long as nothing is known of computing."""
        return self.token_us == 0 or self.read_us < self.token_us * self._block_tokens
