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
_HEADS = (256, 8192)  # how many candidates are sorted before more are


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
    if np.isneginf(logits_row.max()):
        raise ValueError("no token is left to draw")
    u = uniform(seed, position)
    if 0 < top_k < len(logits_row):
        order = _candidates(logits_row, top_k)
        weights = _weights(logits_row[order], temperature, min_p)
        return int(order[_place(np.cumsum(weights) / weights.sum(), top_p, u, is_whole=True)])
    weights = _weights(logits_row, temperature, min_p)
    total = weights.sum()
    # Nearly always the token is among a few; a whole vocabulary takes long to sort.
    for count in (*_HEADS, len(weights)):
        order = _candidates(logits_row, count)
        cumulative = np.cumsum(weights[order]) / total
        place = _place(cumulative, top_p, u, is_whole=len(order) == len(weights))
        if place >= 0:
            break
    return int(order[place])


def _weights(
    logits: Float | npt.NDArray[np.float64], temperature: float, min_p: float
) -> npt.NDArray[np.float64]:
    """Return the softmax's terms, relative to the likeliest: 1 for it, 0 for what min-p cuts off."""
    scaled = logits.astype(np.float64)
    scaled -= scaled.max()
    scaled /= temperature
    weights = np.exp(scaled)
    if min_p > 0.0:
        weights[scaled < np.log(min_p)] = 0.0
    return weights


def _place(cumulative: npt.NDArray[np.float64], top_p: float, u: float, *, is_whole: bool) -> int:
    """Return where `u` falls in the running sums cut by top-p; -1 when that takes more than these."""
    if top_p < 1.0:
        kept = int(np.searchsorted(cumulative, top_p, side="left")) + 1
        if kept > len(cumulative) and not is_whole:
            return -1
        cumulative = cumulative[:kept]
        u *= float(cumulative[-1])
        is_whole = True
    place = int(np.searchsorted(cumulative, u, side="right"))
    if place < len(cumulative):
        return place
    # Rounding may leave the last sum below u: then it is the last that has any weight.
    return int(np.searchsorted(cumulative, cumulative[-1], side="left")) if is_whole else -1


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


def _candidates(values: Float | npt.NDArray[np.float64], top_k: int) -> npt.NDArray[np.int64]:
    """Return ids by falling value, lower id first on a tie; only the `top_k` first when 0 < top_k < len."""
    if not 0 < top_k < len(values):
        return np.argsort(-values, kind="stable")
    kth = np.partition(values, len(values) - top_k)[len(values) - top_k]
    ids = np.flatnonzero(values >= kth)
    return ids[np.argsort(-values[ids], kind="stable")][:top_k]
