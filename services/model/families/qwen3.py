"""qwen3 (Qwen3, dense): qwen3_moe's attention with a plain MLP in every layer."""

from __future__ import annotations

from services.model import config_parts as parts
from services.model.config_fields import Fields
from services.model.config_rope import rope
from services.model.model_config import ModelConfig

ARCHITECTURE = "Qwen3ForCausalLM"


def parse(fields: Fields) -> ModelConfig:
    """Check one `config.json`. Raises ConfigError."""
    attention = parts.grouped_query(fields)
    return ModelConfig(
        model_type="qwen3",
        **parts.decoder(fields),
        **attention,
        qk_norm="per_head",
        rope=rope(fields, attention["head_dim"]),
        **parts.dense(fields),
    )
