"""The attention worker's half of the model: everything but the experts.

One forward pass of a batch:

1. `hidden = embed(batch)`
2. for every layer: `hidden, moe = attend(layer_idx, hidden, batch, kv)`. A dense layer is done then (`moe` is
   None). Otherwise `moe.x` goes to the experts of `moe.topk_idx`, and `hidden = add_moe(hidden, expert_out,
   moe)`.
3. `logits(hidden[rows])` for the rows that sample.

Rows are independent: their bits depend on the model, their sequence and their position only.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from services.model import numerics
from services.model.attention import AttentionLayer, GroupedQueryAttention, LatentAttention
from services.model.batch import Batch
from services.model.checkpoint import Checkpoint, Progress, TensorSpec, Weights
from services.model.inventory import check_inventory
from services.model.kv_cache import KvCache, KvSpec
from services.model.mlp import Mlp, mlp_specs
from services.model.model_config import ModelConfig
from services.model.rope import RopeTable
from services.model.router import Router

if TYPE_CHECKING:
    from typing_extensions import Buffer

Float = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class MoeInput:
    """What one layer's experts need: x [T, hidden] normalised, topk_idx [T, k] int32, topk_weights [T, k]."""

    x: Float
    topk_idx: npt.NDArray[np.int32]
    topk_weights: Float


class AttentionModel:
    """Embedding, attention, gates, dense layers and head over mapped weights. Holds no expert weight."""

    def __init__(self, config: ModelConfig, weights: Weights, kv_cache_dtype: str = "auto") -> None:
        self.config = config
        self.weights = weights
        self.kv_spec = KvSpec.of(config, kv_cache_dtype)
        self._rope = RopeTable(config.rope)
        self._embedding = weights.array("model.embed_tokens.weight")
        self._head = self._embedding if config.tie_word_embeddings else weights.array("lm_head.weight")
        self._final_norm = weights.vector("model.norm.weight")
        self._layers = [
            DecoderLayer(config, layer_idx, weights) for layer_idx in range(config.num_hidden_layers)
        ]

    @classmethod
    def load(
        cls,
        folder: str | Path,
        config: ModelConfig,
        progress: Progress | None = None,
        *,
        kv_cache_dtype: str = "auto",
    ) -> AttentionModel:
        """Map the weights of the attention half.

        Args:
            folder: the checkpoint.
            config: from `load_config` of the same folder.
            progress: called with (tensors mapped, tensors in total).
            kv_cache_dtype: what `allocate_kv` makes, see `KvSpec.of`.

        Raises:
            ConfigError: `kv_cache_dtype` does not fit the model; the checkpoint is damaged or does not fit the config.
                The whole checkpoint's headers are checked, the experts' too.
        """
        checkpoint, specs = Checkpoint.open(folder, config.quantization), attention_specs(config)
        check_inventory(checkpoint, config, specs)
        KvSpec.of(config, kv_cache_dtype)  # refuse it before the weights are read
        return cls(config, checkpoint.load(specs, progress), kv_cache_dtype)

    def kv_bytes(self, num_blocks: int, block_tokens: int) -> int:
        """Return the size of a buffer for so many blocks."""
        return num_blocks * block_tokens * self.kv_spec.bytes_per_token

    def allocate_kv(self, buffer: Buffer | None, num_blocks: int, block_tokens: int) -> KvCache:
        """Return a cache over a writable buffer of `kv_bytes` that outlives it, or over its own memory."""
        return KvCache(self.kv_spec, num_blocks, block_tokens, buffer)

    def embed(self, batch: Batch) -> Float:
        """Return the embeddings [T, hidden] of a batch's tokens.

        Raises:
            ValueError: a token id is outside the vocabulary or a position outside the model's window.
        """
        _check_range("token id", batch.token_ids, self.config.vocab_size)
        _check_range("position", batch.positions, self.config.max_position_embeddings)
        return numerics.widen(self._embedding[batch.token_ids])

    def attend(
        self, layer_idx: int, hidden: Float, batch: Batch, kv: KvCache
    ) -> tuple[Float, MoeInput | None]:
        """Run one layer up to its experts; writes the rows' KV.

        Args:
            layer_idx: 0 .. num_hidden_layers - 1, in order.
            hidden: [T, hidden], left as it is.
            batch: the rows.
            kv: the cache that the block tables point into.

        Returns:
            (hidden, None) after a dense layer; (hidden, MoeInput) when experts come next. Repeating the call
            with the same arguments gives the same bits.
        """
        layer = self._layers[layer_idx]
        x = numerics.rms_norm(hidden, layer.input_norm, self.config.rms_norm_eps)
        hidden = hidden + layer.attention.forward(x, self._rope.rows(batch.positions), batch, kv)
        x = numerics.rms_norm(hidden, layer.post_norm, self.config.rms_norm_eps)
        if layer.dense is not None:
            return hidden + layer.dense.forward(x), None
        return hidden, MoeInput(x, *(layer.router.route(x) if layer.router else _no_routed_experts(len(x))))

    def add_moe(self, hidden: Float, expert_out: Float, moe: MoeInput) -> Float:
        """Return hidden plus the weighted expert outputs, added in slot order.

        Args:
            hidden: [T, hidden] from `attend`.
            expert_out: [T, num_slots, hidden]: outputs in top-k order, then the shared expert's, unweighted.
            moe: from the same `attend`.
        """
        if expert_out.shape[1] != self.config.num_slots:
            raise ValueError(f"expert_out must have {self.config.num_slots} slots, got {expert_out.shape[1]}")
        return numerics.combine(expert_out, moe.topk_weights, hidden)

    def logits(self, hidden_rows: Float) -> Float:
        """Return logits [R, vocab] of final hidden rows [R, hidden]."""
        return numerics.matmul_nt(
            numerics.rms_norm(hidden_rows, self._final_norm, self.config.rms_norm_eps), self._head
        )


class DecoderLayer:
    """One decoder layer without its experts: a router, a dense MLP, or neither (a dense model's layer)."""

    def __init__(self, config: ModelConfig, layer_idx: int, weights: Weights) -> None:
        prefix = f"model.layers.{layer_idx}"
        attention = GroupedQueryAttention if config.mla is None else LatentAttention
        self.attention: AttentionLayer = attention(config, layer_idx, weights)
        self.input_norm = weights.vector(f"{prefix}.input_layernorm.weight")
        self.post_norm = weights.vector(f"{prefix}.post_attention_layernorm.weight")
        sparse = layer_idx in config.moe_layer_indices
        self.router = Router(config, layer_idx, weights) if sparse and config.num_experts else None
        self.dense = None if sparse else Mlp.from_weights(weights, f"{prefix}.{config.names.mlp}")


def attention_specs(config: ModelConfig) -> list[TensorSpec]:
    """Return all tensors of the attention half."""
    specs = [spec for i in range(config.num_hidden_layers) for spec in layer_specs(config, i)]
    specs.append(TensorSpec("model.embed_tokens.weight", (config.vocab_size, config.hidden_size)))
    specs.append(TensorSpec("model.norm.weight", (config.hidden_size,)))
    if not config.tie_word_embeddings:
        specs.append(TensorSpec("lm_head.weight", (config.vocab_size, config.hidden_size)))
    return specs


def layer_specs(config: ModelConfig, layer_idx: int) -> list[TensorSpec]:
    """Return the tensors of one layer without those of its experts."""
    prefix = f"model.layers.{layer_idx}"
    attention = GroupedQueryAttention if config.mla is None else LatentAttention
    specs = [
        *attention.specs(config, layer_idx),
        TensorSpec(f"{prefix}.input_layernorm.weight", (config.hidden_size,)),
        TensorSpec(f"{prefix}.post_attention_layernorm.weight", (config.hidden_size,)),
    ]
    if layer_idx not in config.moe_layer_indices:
        return specs + mlp_specs(f"{prefix}.{config.names.mlp}", config.hidden_size, config.intermediate_size)
    return specs + Router.specs(config, layer_idx) if config.num_experts else specs


def _no_routed_experts(num_rows: int) -> tuple[npt.NDArray[np.int32], Float]:
    """Return the choice of a dense model's rows: the shared expert only."""
    return np.empty((num_rows, 0), dtype=np.int32), np.empty((num_rows, 0), dtype=np.float32)


def _check_range(name: str, values: npt.NDArray[np.int64] | npt.NDArray[np.int32], limit: int) -> None:
    if values.size and not (int(values.min()) >= 0 and int(values.max()) < limit):
        wrong = values[(values < 0) | (values >= limit)][0]
        raise ValueError(f"{name} {wrong} must be in 0 .. {limit - 1}")
