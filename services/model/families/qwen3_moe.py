"""qwen3_moe (Qwen3 MoE): grouped-query attention with query and key norms, softmax gate, no shared expert.

Dense layers stand anywhere: `mlp_only_layers` names them, `decoder_sparse_step` n makes all but every n-th dense.
"""

from __future__ import annotations

from services.model import config_parts as parts
from services.model.config_fields import Fields
from services.model.config_rope import rope
from services.model.model_config import ModelConfig, TensorNames

ARCHITECTURE = "Qwen3MoeForCausalLM"


def parse(fields: Fields) -> ModelConfig:
    """Check one `config.json`. Raises ConfigError."""
    attention = parts.grouped_query(fields)
    num_layers = parts.num_layers(fields)
    sparse = _sparse_layers(fields, num_layers)
    num_experts = fields.integer("num_experts", "num_local_experts", maximum=parts.EXPERTS_MAX)
    return ModelConfig(
        model_type="qwen3_moe",
        names=TensorNames(),
        **parts.decoder(fields),
        **attention,
        qk_norm="per_head",
        rope=rope(fields, attention["head_dim"]),
        **parts.softmax_gate(fields, num_experts),
        intermediate_size=fields.integer("intermediate_size") if len(sparse) < num_layers else 0,
        moe_intermediate_size=fields.integer("moe_intermediate_size"),
        moe_layer_indices=sparse,
    )


def _sparse_layers(fields: Fields, num_layers: int) -> tuple[int, ...]:
    step = fields.integer("decoder_sparse_step", default=1)
    dense = fields.raw("mlp_only_layers", default=None) or []
    if not isinstance(dense, list) or not all(type(i) is int and 0 <= i < num_layers for i in dense):
        fields.fail("mlp_only_layers", dense, f"must be a list of layer indices below {num_layers}")
    return tuple(i for i in range(num_layers) if i not in dense and (i + 1) % step == 0)
