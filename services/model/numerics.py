"""The only file that multiplies or reduces.

Placement, batching and failure may never change a result, so the bits of a row must not depend on the rows
beside it. BLAS does not promise that (its kernels choose an order of summation by shape), so the arithmetic
is in one small C file, `_kernels_impl.h`, whose head states the law and how it is kept. The functions here
give it array shapes and allocate results; the C side checks types and extents and names the argument that is
wrong (`ValueError`). `numerics_reference` is the slow twin of each; `check_row_independence` proves the law
on the machine at hand.

Common to all: float32, C-contiguous rows with any outer strides, inputs are read only, results are new arrays
unless `out` is given. Weights may be float32, float16, bfloat16 stored as uint16, e4m3 with a factor per
block (`BlockScaled`) or INT8 (`Int8Matrix`); they are widened on the way, so a memory-mapped checkpoint is
used as it lies. Calls release the interpreter lock and are safe from any thread.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from services.model import _kernels, int8
from services.model.block_scaled import BlockScaled
from services.model.int8 import Int8Matrix

Float = npt.NDArray[np.float32]
Int = npt.NDArray[np.int32]
Weight = npt.NDArray[Any]
AnyWeight = Weight | BlockScaled | Int8Matrix

CHECK_ELEMENTS = 2**18  # of a weight looked at together: its temporary stays in the second-level cache


def matmul_nt(x: Float, w: AnyWeight, out: Float | None = None) -> Float:
    """Return `x @ w.T`: x [M, K], w [N, K] -> [M, N].

    Batched when both have three axes: x [B, M, K], w [B, N, K] -> [B, M, N]. Each element is one dot product
        with a
    fixed order of summation over K. `out` may be a strided view. An `Int8Matrix` takes x [M, K] only and quantises it;
    so does a `BlockScaled`, and leaves it as it is.
    """
    if out is None:
        out = np.empty((*x.shape[:-1], w.shape[-2]), dtype=np.float32)
    if isinstance(w, Int8Matrix):
        return int8.matmul_nt(x, w, out)
    if isinstance(w, BlockScaled):
        _kernels.matmul_nt_e4m3(x, w.values, w.scale, w.block_rows, w.block_columns, out)
    elif x.ndim == 2:
        _kernels.matmul_nt(x[None], w[None], out[None])
    else:
        _kernels.matmul_nt(x, w, out)
    return out


def matmul_nn(x: Float, w: Weight, out: Float | None = None) -> Float:
    """Return `x @ w`: x [M, K], w [K, N] -> [M, N], summed over k in order; batched like `matmul_nt`."""
    if out is None:
        out = np.empty((*x.shape[:-1], w.shape[-1]), dtype=np.float32)
    if x.ndim == 2:
        _kernels.matmul_nn(x[None], w[None], out[None])
    else:
        _kernels.matmul_nn(x, w, out)
    return out


def mlp(x: Float, gate: AnyWeight, up: AnyWeight, down: AnyWeight, out: Float | None = None) -> Float:
    """Return `(silu(x @ gate.T) * (x @ up.T)) @ down.T`: x [M, H]; gate, up [I, H]; down [H, I] -> [M, H]."""
    if out is None:
        out = np.empty((x.shape[0], down.shape[0]), dtype=np.float32)
    if isinstance(gate, Int8Matrix) and isinstance(up, Int8Matrix) and isinstance(down, Int8Matrix):
        return int8.mlp(x, gate, up, down, out)
    if isinstance(gate, np.ndarray) and isinstance(up, np.ndarray) and isinstance(down, np.ndarray):
        _kernels.mlp(x, gate, up, down, out)
        return out
    return matmul_nt(silu_mul(matmul_nt(x, gate), matmul_nt(x, up)), down, out)  # the kernel's own steps


def silu_mul(gate: Float, up: Float) -> Float:
    """Return `gate / (1 + exp(-gate)) * up`, [R, N] each."""
    out = np.empty(gate.shape, dtype=np.float32)
    _kernels.silu_mul(gate, up, out)
    return out


def rms_norm(x: Float, weight: Float, eps: float, out: Float | None = None) -> Float:
    """Normalise the last axis of x [R, D] or [R, H, D] to unit mean square and scale by weight [D]."""
    if out is None:
        out = np.empty(x.shape, dtype=np.float32)
    if x.ndim == 2:
        _kernels.rms_norm(x[:, None], weight, eps, out[:, None])
    else:
        _kernels.rms_norm(x, weight, eps, out)
    return out


def rope(x: Float, cos: Float, sin: Float, *, interleaved: bool, out: Float | None = None) -> Float:
    """Rotate the heads x [T, H, D] by the angles of their rows, cos and sin [T, D / 2].

    Pairs are (i, i + D/2), or (2i, 2i + 1) when `interleaved`; the result has them at (i, i + D/2) either
    way. `out` must not overlap `x`.
    """
    if out is None:
        out = np.empty(x.shape, dtype=np.float32)
    _kernels.rope(x, cos, sin, interleaved, out)
    return out


def combine(y: Float, weights: Float, residual: Float) -> Float:
    """Return `residual + sum over slots s, in order, of weights[:, s] * y[:, s]`.

    y: [T, S, H], any outer strides, e.g. a view of shared memory.
    weights: [T, k] with k <= S; the slots from k on (the shared expert) weigh 1.
    residual: [T, H].
    """
    out = np.empty(residual.shape, dtype=np.float32)
    _kernels.combine(y, weights, residual, out)
    return out


def route(
    logits: Float,
    *,
    top_k: int,
    correction_bias: Float | None,
    n_group: int,
    topk_group: int,
    norm_topk_prob: bool,
    routed_scaling_factor: float,
) -> tuple[Int, Float]:
    """Choose experts: (topk_idx [T, top_k] int32, topk_weights [T, top_k]), best first, lower id first on a
    tie.

    logits: [T, E]; overwritten with the scores.
    correction_bias: None = softmax scores; [E] = sigmoid scores, with the bias added for the choice only.
    """
    topk_idx = np.empty((logits.shape[0], top_k), dtype=np.int32)
    topk_weights = np.empty((logits.shape[0], top_k), dtype=np.float32)
    _kernels.route(
        logits,
        correction_bias,
        n_group,
        topk_group,
        norm_topk_prob,
        routed_scaling_factor,
        topk_idx,
        topk_weights,
    )
    return topk_idx, topk_weights


def kv_store(x: Float, cache: Float, block_tables: Int, seq_of_row: Int, positions: Int) -> None:
    """Copy rows x [T, KVH, D] to their slots of cache [num_blocks, block_tokens, KVH, D]."""
    _kernels.kv_store(x, cache, block_tables, seq_of_row, positions)


def paged_attention(
    q: Float,
    k: Float,
    v: Float,
    block_tables: Int,
    seq_of_row: Int,
    positions: Int,
    *,
    scale: float,
    out: Float | None = None,
) -> Float:
    """Causal attention of each row over positions 0 .. its own, in order, through the block tables.

    Args:
        q: [T, H, Dk]; head h reads KV head h // (H / KVH).
        k, v: [num_blocks, block_tokens, KVH, Dk or Dv], any outer strides; v may be a view of k.
        block_tables: [S, max_blocks]; entries beyond a row's position are not read.
        seq_of_row, positions: [T].
        scale: factor of the scores before the softmax.

    Returns:
        [T, H, Dv].
    """
    if out is None:
        out = np.empty((q.shape[0], q.shape[1], v.shape[-1]), dtype=np.float32)
    _kernels.paged_attention(q, k, v, block_tables, seq_of_row, positions, scale, out)
    return out


def latent_store(
    x: Float, rank: int, cache: npt.NDArray[np.uint8], block_tables: Int, seq_of_row: Int, positions: Int
) -> None:
    """Put rows x [T, rank + rope] into their slots of an INT8 cache, their first `rank` columns rounded.

    cache: [num_blocks, block_tokens, row bytes] uint8, see `kv_cache`. A row's scale is max|x| / 127 over the latent;
    NaN or inf in the latent makes the scale NaN. The rounding is that of `int8.quantise_rows`.
    """
    _kernels.latent_store(x, rank, cache, block_tables, seq_of_row, positions)


def latent_attention(
    q: Float,
    rank: int,
    cache: npt.NDArray[np.uint8],
    block_tables: Int,
    seq_of_row: Int,
    positions: Int,
    *,
    scale: float,
) -> Float:
    """Return [T, H, rank]: `paged_attention` of q [T, H, rank + rope] over an INT8 cache.

    The bits are those of the same rows in float32, the latent as float32(q) * scale; blocks are written out one by one.
    """
    out = np.empty((q.shape[0], q.shape[1], rank), dtype=np.float32)
    _kernels.latent_attention(q, rank, cache, block_tables, seq_of_row, positions, scale, out)
    return out


def dense(w: AnyWeight) -> Weight:
    """Return a weight as an array: as it is, or written out in float32 if it is in 8 bits."""
    if isinstance(w, Int8Matrix):
        return w.widen()
    if not isinstance(w, BlockScaled):
        return w
    out = np.empty(w.shape, dtype=np.float32)
    _kernels.dequantise_e4m3(w.values, w.scale, w.block_rows, w.block_columns, out)
    return out


def all_finite(stored: Weight) -> bool:
    """Tell whether stored weights (float32, float16, bfloat16 as uint16, e4m3 as uint8) hold no NaN and no infinity."""
    if stored.dtype == np.int8:
        return True
    for start in range(0, stored.size, CHECK_ELEMENTS):
        piece = stored[start : start + CHECK_ELEMENTS]
        if stored.dtype == np.uint16:
            good = bool(((piece & np.uint16(0x7F80)) != 0x7F80).all())
        elif stored.dtype == np.uint8:
            good = bool(((piece & np.uint8(0x7F)) != 0x7F).all())
        else:
            good = bool(np.isfinite(piece).all())
        if not good:
            return False
    return True


def widen(rows: Weight) -> Float:
    """Return weights of any stored dtype as float32; exact. Always a copy."""
    if rows.dtype == np.uint16:
        return (rows.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return rows.astype(np.float32)


def log_softmax(logits_row: Float) -> npt.NDArray[np.float64]:
    """Return the log-probabilities of one row [vocab] in float64."""
    x = np.ascontiguousarray(logits_row, dtype=np.float64)
    shifted = x - x.max()
    return np.asarray(shifted - np.log(np.exp(shifted).sum()), dtype=np.float64)


def check_row_independence() -> None:
    """Prove on this machine that a row's bits depend on that row alone; a few ms.

    Raises:
        RuntimeError: names the operation whose rows depend on their neighbours.
    """
    rng = np.random.default_rng(2024)
    x = rng.standard_normal((13, 76), dtype=np.float32)
    w = rng.standard_normal((45, 76), dtype=np.float32)
    down = rng.standard_normal((76, 45), dtype=np.float32)
    order = rng.permutation(13)
    half = w.astype(np.float16)
    operations: dict[str, Callable[[Float], Float]] = {
        "matmul_nt": lambda rows: matmul_nt(rows, w),
        "matmul_nt float16": lambda rows: matmul_nt(rows, half),
        "matmul_nt bfloat16": lambda rows: matmul_nt(rows, half.view(np.uint16)),
        "matmul_nn": lambda rows: matmul_nn(rows, down),
        "mlp": lambda rows: mlp(rows, w, w, down),
        "rms_norm": lambda rows: rms_norm(rows, down[:, 0].copy(), 1e-6),
    }
    for name, function in operations.items():
        whole = function(x)
        alone = np.concatenate([function(x[i : i + 1]) for i in range(13)])
        if not (_same_bits(whole, alone) and _same_bits(function(x[order]), whole[order])):
            raise RuntimeError(f"{name}: the bits of a row depend on its neighbours on this machine")
    if not _attention_is_independent(rng):
        raise RuntimeError("paged_attention: the bits of a row depend on its neighbours on this machine")


def _attention_is_independent(rng: np.random.Generator) -> bool:
    cache = rng.standard_normal((6, 4, 2, 12), dtype=np.float32)
    moved = cache[::-1].copy()
    q = rng.standard_normal((11, 6, 12), dtype=np.float32)
    table = np.array([[4, 1, 3]], dtype=np.int32)
    seqs, positions = np.zeros(11, dtype=np.int32), np.arange(11, dtype=np.int32)
    whole = paged_attention(q, cache, cache, table, seqs, positions, scale=0.3)
    return all(
        _same_bits(
            paged_attention(q[i : i + 1], moved, moved, 5 - table, seqs[:1], positions[i : i + 1], scale=0.3),
            whole[i : i + 1],
        )
        for i in range(11)
    )


def _same_bits(a: Float, b: Float) -> bool:
    return a.tobytes() == b.tobytes()
