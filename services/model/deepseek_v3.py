"""How deepseek_v3 differs: latent attention, sigmoid gate with correction bias and groups, shared experts."""

from __future__ import annotations

from services.model.attention import AttentionLayer, LatentAttention
from services.model.checkpoint import TensorSpec, Weights
from services.model.config import ModelConfig

GATE_HAS_CORRECTION_BIAS = True


def rope_dim(config: ModelConfig) -> int:
    """Return how many columns of a head are rotated."""
    assert config.mla is not None
    return config.mla.qk_rope_head_dim


def attention_specs(config: ModelConfig, layer_idx: int) -> list[TensorSpec]:
    """Return the attention tensors of one layer."""
    return LatentAttention.specs(config, layer_idx)


def attention_layer(config: ModelConfig, layer_idx: int, weights: Weights) -> AttentionLayer:
    """Return the attention of one layer."""
    return LatentAttention(config, layer_idx, weights)
