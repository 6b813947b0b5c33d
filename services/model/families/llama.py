"""llama (Llama 2, 3): grouped-query attention without query and key norms, a plain MLP in every layer."""

from __future__ import annotations

from services.model import config_parts as parts
from services.model.config_fields import Fields
from services.model.config_rope import rope
from services.model.model_config import ModelConfig

ARCHITECTURE = "LlamaForCausalLM"


def parse(fields: Fields) -> ModelConfig:
    """Check one `config.json`. Raises ConfigError."""
    fields.only("mlp_bias", False, rule="a bias in the MLP is not supported")
    attention = parts.grouped_query(fields)
    return ModelConfig(
        model_type="llama",
        **parts.decoder(fields),
        **attention,
        qk_norm="none",
        rope=rope(fields, attention["head_dim"]),
        **parts.dense(fields),
    )
