"""glm4_moe (GLM-4.5, GLM-4.6): deepseek_v3's gate and layers around grouped-query attention.

Half of each head is rotated unless the config says otherwise; query and key norms are optional; the output projection
never has a bias.
"""

from __future__ import annotations

from services.model import config_parts as parts
from services.model.config_fields import Fields
from services.model.config_rope import rope
from services.model.model_config import ModelConfig

ARCHITECTURE = "Glm4MoeForCausalLM"


def parse(fields: Fields) -> ModelConfig:
    """Check one `config.json`. Raises ConfigError."""
    attention = parts.grouped_query(fields) | {"attention_output_bias": False}
    return ModelConfig(
        model_type="glm4_moe",
        **parts.decoder(fields),
        **attention,
        qk_norm="per_head" if fields.flag("use_qk_norm", default=False) else "none",
        rope=rope(fields, attention["head_dim"], partial_rotary_factor=0.5),
        **parts.sigmoid_gate(fields),
        **parts.dense_then_sparse(fields),
    )
