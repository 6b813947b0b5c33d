"""Drawing a token from one row of logits.

A draw depends on the row, the parameters, the seed and the absolute position, and on nothing else: the
uniform number comes from Philox, a counter-based generator, keyed by the seed with the position as counter.
So a token drawn again after a failure is the same token. The distribution is the softmax in float64 over
candidates in one fixed order (most likely first, lower id first on a tie), cut by top-k, then by top-p, then
inverted.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import numpy.typing as npt

from bus.control.messages import TokenLogprob
from services.model import numerics

Float = npt.NDArray[np.float32]


def sample(
    logits_row: Float,
    *,
    temperature: float,
    top_p: float,
    top_k: int,
    seed: int,
    position: int,
    banned_ids: Collection[int] = (),
) -> int:
    """Draw one token id.

    Args:
        logits_row: [vocab] float32, left as it is.
        temperature: 0 = the likeliest, the lowest id among equals.
        top_p: keep the likeliest tokens until they reach this mass, 0 < top_p <= 1; at least one stays.
        top_k: keep so many; 0 = all.
        seed: 63-bit.
        position: absolute position of the token drawn.
        banned_ids: never drawn, e.g. stop tokens before the minimum length; ids outside the row are ignored.

    Raises:
        ValueError: every token is banned.
    """
    row = logits_row.astype(np.float64)
    banned = [token_id for token_id in banned_ids if 0 <= token_id < len(row)]
    if banned:
        row[banned] = -np.inf
        if np.isneginf(row).all():
            raise ValueError("banned_ids leave no token to draw")
    if temperature <= 0.0 or top_k == 1:
        return int(np.argmax(row))
    order = _candidates(row, top_k)
    scaled = row[order]
    scaled = (scaled - scaled[0]) / temperature
    cumulative = numerics.cumulative_probs(scaled)
    if top_p < 1.0:
        kept = int(np.searchsorted(cumulative, top_p, side="left")) + 1
        cumulative = cumulative[:kept]
    threshold = uniform(seed, position) * cumulative[-1]
    return int(order[min(int(np.searchsorted(cumulative, threshold, side="right")), len(cumulative) - 1)])


def uniform(seed: int, position: int) -> float:
    """Return the number in [0, 1) that belongs to (seed, position)."""
    generator = np.random.Philox(key=seed & (2**64 - 1), counter=[0, position, 0, 0])
    return float(np.random.Generator(generator).random())


def token_logprob(logits_row: Float, token_id: int, num_top: int) -> TokenLogprob:
    """Return the log-probability and rank of a token, and the `num_top` likeliest (temperature 1)."""
    logprobs = numerics.log_softmax(logits_row)
    best = _candidates(logprobs, num_top)[:num_top] if num_top > 0 else np.empty(0, dtype=np.int64)
    better = logprobs > logprobs[token_id]
    better[:token_id] |= logprobs[:token_id] == logprobs[token_id]
    return TokenLogprob(
        token_id=token_id,
        logprob=float(logprobs[token_id]),
        rank=int(np.count_nonzero(better)) + 1,
        top_token_ids=tuple(int(i) for i in best),
        top_logprobs=tuple(float(logprobs[i]) for i in best),
    )


def _candidates(values: npt.NDArray[np.float64], top_k: int) -> npt.NDArray[np.int64]:
    """Return ids by falling value, lower id first on a tie; only the `top_k` first when 0 < top_k < len."""
    if not 0 < top_k < len(values):
        return np.argsort(-values, kind="stable")
    kth = np.partition(values, len(values) - top_k)[len(values) - top_k]
    ids = np.flatnonzero(values >= kth)
    return ids[np.argsort(-values[ids], kind="stable")][:top_k]
