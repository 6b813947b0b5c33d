"""How qwen3_moe differs: grouped-query attention with query and key norms, softmax gate, no shared expert."""

from __future__ import annotations

from services.model.attention import AttentionLayer, GroupedQueryAttention
from services.model.checkpoint import TensorSpec, Weights
from services.model.config import ModelConfig

GATE_HAS_CORRECTION_BIAS = False


def rope_dim(config: ModelConfig) -> int:
    """Return how many columns of a head are rotated."""
    return config.head_dim


def attention_specs(config: ModelConfig, layer_idx: int) -> list[TensorSpec]:
    """Return the attention tensors of one layer."""
    return GroupedQueryAttention.specs(config, layer_idx)


def attention_layer(config: ModelConfig, layer_idx: int, weights: Weights) -> AttentionLayer:
    """Return the attention of one layer."""
    return GroupedQueryAttention(config, layer_idx, weights)
