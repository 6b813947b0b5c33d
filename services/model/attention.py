"""The two attention mechanisms. Both write the rows' KV first and then attend through the block tables.

`GroupedQueryAttention`: heads share K and V in groups. Queries and keys are normalised per head (qwen3_moe, glm4_moe),
over all heads at once (minimax_m2) or not at all (llama); the first `rope.dim` columns of a head are rotated.

`LatentAttention` (MLA; deepseek_v3, kimi_k2): a token's cache row is its normalised latent c and one rotated key part
shared by all heads. It always runs in absorbed form, in prefill too, so that computing a position again gives
the same bits: q_nope . (W_UK c) = (q_nope W_UK) . c, and the weighted sum of values W_UV c is W_UV applied to
the weighted sum of c. Attention is so one KV head of width kv_lora_rank + qk_rope_head_dim, whose values are
the first kv_lora_rank columns. With an INT8 cache a row attends to its own latent as rounded, too, so that a
prompt computed again, in other chunks, gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt

from services.model import numerics
from services.model.batch import Batch
from services.model.checkpoint import TensorSpec, Weights
from services.model.kv_cache import KvCache
from services.model.model_config import ModelConfig
from services.model.rope import yarn_mscale

Float = npt.NDArray[np.float32]
Angles = tuple[Float, Float]

LATENT_NORM_EPS = 1e-6  # fixed by the architecture, whatever rms_norm_eps says


class AttentionLayer(Protocol):
    """One layer's attention."""

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Return its projections."""
        ...

    def forward(self, x: Float, angles: Angles, batch: Batch, kv: KvCache) -> Float:
        """Store the KV of rows x [T, hidden] and return their attention output [T, hidden]."""
        ...


class Linear:
    """A projection with an optional bias. `watch`, if set, sees its name and every input."""

    def __init__(self, weights: Weights, name: str) -> None:
        self.name = name
        self.watch: Callable[[str, Float], None] | None = None
        self.weight = weights.matrix(f"{name}.weight")
        self.bias = weights.optional_vector(f"{name}.bias")

    def __call__(self, x: Float) -> Float:
        if self.watch is not None:
            self.watch(self.name, x)
        out = numerics.matmul_nt(x, self.weight)
        if self.bias is not None:
            out += self.bias
        return out


def linear_specs(name: str, rows: int, columns: int, *, bias: bool) -> list[TensorSpec]:
    """Return the tensors of one `Linear`."""
    specs = [TensorSpec(f"{name}.weight", (rows, columns), quantisable=True)]
    return [*specs, TensorSpec(f"{name}.bias", (rows,))] if bias else specs


class GroupedQueryAttention:
    """Softmax attention with shared KV heads."""

    def __init__(self, config: ModelConfig, layer_idx: int, weights: Weights) -> None:
        prefix = f"model.layers.{layer_idx}.self_attn"
        self._layer_idx = layer_idx
        self._head_dim = config.head_dim
        self._rope_dim = config.rope.dim
        self._qk_norm = config.qk_norm
        self._eps = config.rms_norm_eps
        self._scale = config.head_dim**-0.5
        self._q, self._k = Linear(weights, f"{prefix}.q_proj"), Linear(weights, f"{prefix}.k_proj")
        self._v, self._o = Linear(weights, f"{prefix}.v_proj"), Linear(weights, f"{prefix}.o_proj")
        self._q_norm = weights.optional_vector(f"{prefix}.q_norm.weight")
        self._k_norm = weights.optional_vector(f"{prefix}.k_norm.weight")

    @staticmethod
    def specs(config: ModelConfig, layer_idx: int) -> list[TensorSpec]:
        """Return the tensors of one layer."""
        prefix = f"model.layers.{layer_idx}.self_attn"
        hidden, bias, output_bias = config.hidden_size, config.attention_bias, config.attention_output_bias
        q_dim = config.num_attention_heads * config.head_dim
        kv_dim = config.num_key_value_heads * config.head_dim
        specs = [
            *linear_specs(f"{prefix}.q_proj", q_dim, hidden, bias=bias),
            *linear_specs(f"{prefix}.k_proj", kv_dim, hidden, bias=bias),
            *linear_specs(f"{prefix}.v_proj", kv_dim, hidden, bias=bias),
            *linear_specs(f"{prefix}.o_proj", hidden, q_dim, bias=output_bias),
        ]
        if config.qk_norm == "none":
            return specs
        q_norm_dim, k_norm_dim = (q_dim, kv_dim) if config.qk_norm == "all_heads" else (config.head_dim,) * 2
        return [
            *specs,
            TensorSpec(f"{prefix}.q_norm.weight", (q_norm_dim,)),
            TensorSpec(f"{prefix}.k_norm.weight", (k_norm_dim,)),
        ]

    @property
    def linears(self) -> tuple[Linear, ...]:
        """See `AttentionLayer`."""
        return self._q, self._k, self._v, self._o

    def forward(self, x: Float, angles: Angles, batch: Batch, kv: KvCache) -> Float:
        """See `AttentionLayer`."""
        q = self._rotate(self._heads(self._q(x), self._q_norm), angles)
        k = self._rotate(self._heads(self._k(x), self._k_norm), angles)
        k_cache, v_cache = kv.k(self._layer_idx), kv.v(self._layer_idx)
        where = (batch.block_tables, batch.seq_of_row, batch.positions)
        numerics.kv_store(k, k_cache, *where)
        numerics.kv_store(self._v(x).reshape(len(x), -1, self._head_dim), v_cache, *where)
        attended = numerics.paged_attention(q, k_cache, v_cache, *where, scale=self._scale)
        return self._o(attended.reshape(len(x), -1))

    def _heads(self, projected: Float, norm: Float | None) -> Float:
        """Return projected rows [T, H * D] as heads [T, H, D], normalised in the family's way."""
        heads = (len(projected), -1, self._head_dim)
        if norm is None:
            return projected.reshape(heads)
        if self._qk_norm == "all_heads":
            return numerics.rms_norm(projected, norm, self._eps).reshape(heads)
        return numerics.rms_norm(projected.reshape(heads), norm, self._eps)

    def _rotate(self, x: Float, angles: Angles) -> Float:
        """Return heads x [T, H, D] with their first `rope.dim` columns rotated."""
        if self._rope_dim == self._head_dim:
            return numerics.rope(x, *angles, interleaved=False)
        out = x.copy()
        numerics.rope(x[:, :, : self._rope_dim], *angles, interleaved=False, out=out[:, :, : self._rope_dim])
        return out


class LatentAttention:
    """Multi-head latent attention in absorbed form."""

    def __init__(self, config: ModelConfig, layer_idx: int, weights: Weights) -> None:
        assert config.mla is not None
        prefix = f"model.layers.{layer_idx}.self_attn"
        mla = self._mla = config.mla
        self._layer_idx = layer_idx
        self._num_heads = config.num_attention_heads
        self._scale = softmax_scale(config)
        self._q_a: Linear | None = None
        if mla.q_lora_rank is None:
            self._q = Linear(weights, f"{prefix}.q_proj")
        else:
            self._q_a = Linear(weights, f"{prefix}.q_a_proj")
            self._q_a_norm = weights.vector(f"{prefix}.q_a_layernorm.weight")
            self._q = Linear(weights, f"{prefix}.q_b_proj")
        self._kv_a = Linear(weights, f"{prefix}.kv_a_proj_with_mqa")
        self._kv_a_norm = weights.vector(f"{prefix}.kv_a_layernorm.weight")
        # Absorbed per head, whose rows need not be whole blocks of an 8-bit matrix: written out if it is one.
        kv_b = numerics.dense(weights.matrix(f"{prefix}.kv_b_proj.weight"))
        kv_b = kv_b.reshape(self._num_heads, -1, mla.kv_lora_rank)
        self._w_uk = kv_b[:, : mla.qk_nope_head_dim]  # [H, qk_nope_head_dim, kv_lora_rank]
        self._w_uv = kv_b[:, mla.qk_nope_head_dim :]  # [H, v_head_dim, kv_lora_rank]
        self._o = Linear(weights, f"{prefix}.o_proj")

    @staticmethod
    def specs(config: ModelConfig, layer_idx: int) -> list[TensorSpec]:
        """Return the tensors of one layer."""
        assert config.mla is not None
        mla, hidden, heads = config.mla, config.hidden_size, config.num_attention_heads
        prefix, bias = f"model.layers.{layer_idx}.self_attn", config.attention_bias
        q_dim = heads * (mla.qk_nope_head_dim + mla.qk_rope_head_dim)
        if mla.q_lora_rank is None:
            specs = linear_specs(f"{prefix}.q_proj", q_dim, hidden, bias=False)
        else:
            specs = [
                *linear_specs(f"{prefix}.q_a_proj", mla.q_lora_rank, hidden, bias=bias),
                TensorSpec(f"{prefix}.q_a_layernorm.weight", (mla.q_lora_rank,)),
                *linear_specs(f"{prefix}.q_b_proj", q_dim, mla.q_lora_rank, bias=False),
            ]
        kv_b_rows = heads * (mla.qk_nope_head_dim + mla.v_head_dim)
        return [
            *specs,
            *linear_specs(f"{prefix}.kv_a_proj_with_mqa", config.head_dim, hidden, bias=bias),
            TensorSpec(f"{prefix}.kv_a_layernorm.weight", (mla.kv_lora_rank,)),
            *linear_specs(f"{prefix}.kv_b_proj", kv_b_rows, mla.kv_lora_rank, bias=False),
            *linear_specs(
                f"{prefix}.o_proj", hidden, heads * mla.v_head_dim, bias=config.attention_output_bias
            ),
        ]

    @property
    def linears(self) -> tuple[Linear, ...]:
        """See `AttentionLayer`."""
        found = (self._q, self._kv_a, self._o)
        return found if self._q_a is None else (self._q_a, *found)

    def forward(self, x: Float, angles: Angles, batch: Batch, kv: KvCache) -> Float:
        """See `AttentionLayer`."""
        where = (batch.block_tables, batch.seq_of_row, batch.positions)
        rows, queries = self._cache_rows(x, angles), self._queries(x, angles)
        if kv.spec.is_int8:
            rank, latent = self._mla.kv_lora_rank, kv.latent_rows(self._layer_idx)
            numerics.latent_store(rows[:, 0], rank, latent, *where)
            attended = numerics.latent_attention(queries, rank, latent, *where, scale=self._scale)
        else:
            k_cache, v_cache = kv.k(self._layer_idx), kv.v(self._layer_idx)
            numerics.kv_store(rows, k_cache, *where)
            attended = numerics.paged_attention(queries, k_cache, v_cache, *where, scale=self._scale)
        values = np.empty((len(x), self._num_heads, self._mla.v_head_dim), dtype=np.float32)
        numerics.matmul_nt(attended.transpose(1, 0, 2), self._w_uv, values.transpose(1, 0, 2))
        return self._o(values.reshape(len(x), -1))

    def _queries(self, x: Float, angles: Angles) -> Float:
        """Return absorbed queries [T, H, kv_lora_rank + qk_rope_head_dim]."""
        mla = self._mla
        if self._q_a is not None:
            x = numerics.rms_norm(self._q_a(x), self._q_a_norm, LATENT_NORM_EPS)
        q = self._q(x).reshape(len(x), self._num_heads, -1)
        out = np.empty((len(x), self._num_heads, mla.kv_lora_rank + mla.qk_rope_head_dim), dtype=np.float32)
        nope = q[:, :, : mla.qk_nope_head_dim].transpose(1, 0, 2)
        numerics.matmul_nn(nope, self._w_uk, out[:, :, : mla.kv_lora_rank].transpose(1, 0, 2))
        self._rotate(q[:, :, mla.qk_nope_head_dim :], angles, out[:, :, mla.kv_lora_rank :])
        return out

    def _cache_rows(self, x: Float, angles: Angles) -> Float:
        """Return what is cached of each row, [T, 1, kv_lora_rank + qk_rope_head_dim]."""
        rank = self._mla.kv_lora_rank
        compressed = self._kv_a(x)[:, None]
        out = np.empty(compressed.shape, dtype=np.float32)
        numerics.rms_norm(compressed[:, :, :rank], self._kv_a_norm, LATENT_NORM_EPS, out[:, :, :rank])
        self._rotate(compressed[:, :, rank:], angles, out[:, :, rank:])
        return out

    def _rotate(self, x: Float, angles: Angles, out: Float) -> None:
        numerics.rope(x, *angles, interleaved=self._mla.rope_interleave, out=out)


def softmax_scale(config: ModelConfig) -> float:
    """Return the factor of MLA's scores; YaRN with `mscale_all_dim` sharpens them."""
    assert config.mla is not None
    scale = float((config.mla.qk_nope_head_dim + config.mla.qk_rope_head_dim) ** -0.5)
    if config.rope.kind == "yarn" and config.rope.mscale_all_dim:
        scale *= yarn_mscale(config.rope.factor, config.rope.mscale_all_dim) ** 2
    return scale
