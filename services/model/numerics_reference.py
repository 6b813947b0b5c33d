"""The slow twin of `numerics`: the same functions in plain NumPy, equal up to rounding."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from services.model.block_scaled import BlockScaled

Array = npt.NDArray[Any]
Weight = Array | BlockScaled


def e4m3_values() -> Array:
    """Return the value of each of the 256 bytes as e4m3, [256] float32, from the format's definition."""
    byte = np.arange(256)
    sign, exponent, mantissa = np.where(byte & 0x80, -1.0, 1.0), byte >> 3 & 15, byte & 7
    normal = (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    values = sign * np.where(exponent == 0, mantissa / 8 * 2.0**-6, normal)
    values[[0x7F, 0xFF]] = np.nan
    return values.astype(np.float32)


def dequantise(w: BlockScaled) -> Array:
    """Return a block-scaled matrix written out in float32."""
    scale = w.scale.repeat(w.block_rows, axis=0).repeat(w.block_columns, axis=1)
    rows, columns = w.shape
    return np.asarray(e4m3_values()[w.values] * scale[:rows, :columns])


def widen(rows: Weight) -> Array:
    """Return stored weights as float64."""
    if isinstance(rows, BlockScaled):
        return dequantise(rows).astype(np.float64)
    if rows.dtype == np.uint16:
        return (rows.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
    return rows.astype(np.float64)


def matmul_nt(x: Array, w: Weight) -> Array:
    """Twin of `numerics.matmul_nt`."""
    return np.asarray(widen(x) @ widen(w).swapaxes(-1, -2))


def matmul_nn(x: Array, w: Array) -> Array:
    """Twin of `numerics.matmul_nn`."""
    return np.asarray(widen(x) @ widen(w))


def silu_mul(gate: Array, up: Array) -> Array:
    """Twin of `numerics.silu_mul`."""
    gate = gate.astype(np.float64)
    return np.asarray(gate / (1 + np.exp(-gate)) * up)


def mlp(x: Array, gate: Weight, up: Weight, down: Weight) -> Array:
    """Twin of `numerics.mlp`."""
    return matmul_nt(silu_mul(matmul_nt(x, gate), matmul_nt(x, up)), down)


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """Twin of `numerics.rms_norm`."""
    x = x.astype(np.float64)
    return np.asarray(weight * x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps))


def rope(x: Array, cos: Array, sin: Array, *, interleaved: bool) -> Array:
    """Twin of `numerics.rope`."""
    half = x.shape[-1] // 2
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    cos, sin = cos[:, None], sin[:, None]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def combine(y: Array, weights: Array, residual: Array) -> Array:
    """Twin of `numerics.combine`."""
    ones = np.ones((y.shape[0], y.shape[1] - weights.shape[1]))
    return np.asarray(residual + np.einsum("ts,tsh->th", np.concatenate([weights, ones], axis=1), y))


def route(
    logits: Array,
    *,
    top_k: int,
    correction_bias: Array | None,
    n_group: int,
    topk_group: int,
    norm_topk_prob: bool,
    routed_scaling_factor: float,
) -> tuple[Array, Array]:
    """Twin of `numerics.route`; leaves `logits` alone."""
    logits = logits.astype(np.float64)
    if correction_bias is None:
        scores = np.exp(logits - logits.max(axis=-1, keepdims=True))
        scores /= scores.sum(axis=-1, keepdims=True)
        choice = scores.copy()
    else:
        scores = 1 / (1 + np.exp(-logits))
        choice = scores + correction_bias
    if n_group > 1:
        grouped = choice.reshape(len(choice), n_group, -1)
        best_two = np.sort(grouped, axis=-1)[..., -2:].sum(axis=-1)
        kept = np.argsort(-best_two, axis=-1, kind="stable")[:, :topk_group]
        mask = np.zeros(best_two.shape, dtype=bool)
        np.put_along_axis(mask, kept, True, axis=1)
        choice = np.where(mask[..., None], grouped, -np.inf).reshape(choice.shape)
    topk_idx = np.argsort(-choice, axis=-1, kind="stable")[:, :top_k]
    weights = np.take_along_axis(scores, topk_idx, axis=1)
    if norm_topk_prob:
        weights = weights / weights.sum(axis=-1, keepdims=True)
    return topk_idx.astype(np.int32), weights * routed_scaling_factor


def paged_attention(
    q: Array, k: Array, v: Array, block_tables: Array, seq_of_row: Array, positions: Array, *, scale: float
) -> Array:
    """Twin of `numerics.paged_attention`."""
    num_heads, num_kv_heads, block_tokens = q.shape[1], k.shape[2], k.shape[1]
    out = np.zeros((*q.shape[:2], v.shape[-1]))
    for t, (seq, position) in enumerate(zip(seq_of_row, positions, strict=True)):
        where = np.arange(position + 1)
        blocks, offsets = block_tables[seq, where // block_tokens], where % block_tokens
        for h in range(num_heads):
            kv_head = h // (num_heads // num_kv_heads)
            scores = k[blocks, offsets, kv_head].astype(np.float64) @ q[t, h] * scale
            terms = np.exp(scores - scores.max())
            out[t, h] = terms / terms.sum() @ v[blocks, offsets, kv_head]
    return out


def latent_rows(cache: Array, rank: int) -> Array:
    """Return the rows of an INT8 cache [num_blocks, block_tokens, row bytes] in float32, [.., 1, rank + rope]."""
    scale_at = -(-rank // 4) * 4
    q = cache[..., :rank].view(np.int8).astype(np.float32)
    scale, rope = np.split(np.ascontiguousarray(cache[..., scale_at:]).view(np.float32), [1], axis=-1)
    return np.concatenate([q * scale, rope], axis=-1)[:, :, None]


def latent_row(x: Array, rank: int) -> Array:
    """Return the bytes [row bytes] uint8 that `numerics.latent_store` keeps of a row x [rank + rope]."""
    q, scale = int8_rows(x[None, :rank])
    latent = np.zeros(-(-rank // 4) * 4, np.int8)
    latent[:rank] = q[0]
    parts = (latent, scale, x[rank:].astype(np.float32))
    return np.concatenate([part.view(np.uint8) for part in parts])


def int8_rows(x: Array) -> tuple[Array, Array]:
    """Twin of `int8.quantise_rows`: whole numbers as int64, scales float32."""
    largest = np.abs(x).max(axis=1, initial=0)
    scale = np.where(np.isfinite(largest), largest / np.float32(127), np.float32(np.nan)).astype(np.float32)
    usable = scale > 0
    shifted = np.where(usable[:, None], x / np.where(usable, scale, np.float32(1))[:, None], 0)
    return np.clip(np.rint(shifted), -127, 127).astype(np.int64), scale


def int8_matmul_nt(x: Array, q: Array, scale: Array) -> Array:
    """Twin of `int8.matmul_nt`, equal to the bit."""
    rows, row_scale = int8_rows(x)
    return np.asarray((rows @ q.astype(np.int64).T).astype(np.float32) * (row_scale[:, None] * scale))
