"""Drawing a token from one row of logits.

A draw depends on the row, the parameters, the request's own tokens, the seed and the absolute position, and on
nothing else: the uniform number comes from Philox, a counter-based generator, keyed by the seed with the
position as counter. So a token drawn again after a failure, or in another batch, is the same token.

The order is vLLM's: a row is adjusted (allowed tokens, bias, bans, then penalties: repetition, frequency,
presence), then drawn from: temperature, min-p, top-k, top-p. The distribution is the softmax in float64 over
candidates in one fixed order (most likely first, lower id first on a tie), cut, then inverted.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt

from bus.control.messages import SamplingParams, TokenLogprob
from services.model import numerics

Float = npt.NDArray[np.float32]


def adjust(
    logits_row: Float,
    params: SamplingParams,
    *,
    prompt_token_ids: Sequence[int] = (),
    output_token_ids: Sequence[int] = (),
    allowed: npt.NDArray[np.bool_] | None = None,
) -> npt.NDArray[np.float64]:
    """Return what a request's parameters make of a row [vocab]: -inf where a token must not be drawn.

    Args:
        logits_row: [vocab] float32, left as it is.
        params: bias and penalties; what `sample` takes is not looked at.
        prompt_token_ids, output_token_ids: all tokens of the request, where the parameters use them. Ids
            outside the row are ignored.
        allowed: [vocab] True where the grammar allows the token; None = everywhere.
    """
    row = logits_row.astype(np.float64)
    if allowed is not None:
        row[~allowed] = -np.inf
    for token_id, bias in params.logit_bias:
        if 0 <= token_id < len(row):
            row[token_id] += bias
    if params.repetition_penalty != 1.0:
        seen = _known_ids([*prompt_token_ids, *output_token_ids], len(row))
        values = row[seen]
        factor = params.repetition_penalty
        row[seen] = np.where(values > 0, values / factor, values * factor)
    if params.frequency_penalty or params.presence_penalty:
        ids, counts = np.unique(_known_ids(output_token_ids, len(row)), return_counts=True)
        row[ids] -= params.frequency_penalty * counts + params.presence_penalty
    return row


def _known_ids(token_ids: Sequence[int], vocab_size: int) -> npt.NDArray[np.int64]:
    ids = np.asarray(token_ids, dtype=np.int64)
    return ids[(ids >= 0) & (ids < vocab_size)]


def sample(
    logits_row: Float | npt.NDArray[np.float64],
    *,
    temperature: float,
    top_p: float,
    top_k: int,
    seed: int,
    position: int,
    min_p: float = 0.0,
    banned_ids: Collection[int] = (),
) -> int:
    """Draw one token id.

    Args:
        logits_row: [vocab] float32, or float64 as `adjust` returned it; left as it is.
        temperature: 0 = the likeliest, the lowest id among equals.
        top_p: keep the likeliest tokens until they reach this mass, 0 < top_p <= 1; at least one stays.
        top_k: keep so many; 0 = all.
        seed: 63-bit.
        position: absolute position of the token drawn.
        min_p: keep tokens at least this share as likely as the likeliest; 0 = all.
        banned_ids: never drawn, e.g. stop tokens before the minimum length; ids outside the row are ignored.

    Raises:
        ValueError: every token is banned or -inf.
    """
    banned = [token_id for token_id in banned_ids if 0 <= token_id < len(logits_row)]
    if banned:
        logits_row = logits_row.copy()
        logits_row[banned] = -np.inf
    if temperature <= 0.0 or top_k == 1:
        token_id = int(np.argmax(logits_row))
        if np.isneginf(logits_row[token_id]):
            raise ValueError("no token is left to draw")
        return token_id
    row = logits_row.astype(np.float64)
    order = _candidates(row, top_k)
    scaled = row[order]
    if np.isneginf(scaled[0]):
        raise ValueError("no token is left to draw")
    scaled = (scaled - scaled[0]) / temperature
    if min_p > 0.0:
        # The order is falling: what is likely enough is a prefix.
        scaled = scaled[: int(np.count_nonzero(scaled >= np.log(min_p)))]
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
