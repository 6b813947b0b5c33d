"""deepseek_v3 (DeepSeek-V3, V3.1, R1): latent attention, sigmoid gate with bias and groups, shared experts."""

from __future__ import annotations

from services.model import config_parts as parts
from services.model.config_fields import Fields
from services.model.config_rope import rope
from services.model.model_config import MlaConfig, ModelConfig

ARCHITECTURE = "DeepseekV3ForCausalLM"


def parse(fields: Fields) -> ModelConfig:
    """Check one `config.json`. Raises ConfigError."""
    heads = fields.integer("num_attention_heads")
    fields.only("num_key_value_heads", heads, rule=f"must equal num_attention_heads = {heads}")
    mla = _latent(fields)
    bias = fields.flag("attention_bias", default=False)
    return ModelConfig(
        model_type="deepseek_v3",
        **parts.decoder(fields),
        num_attention_heads=heads,
        num_key_value_heads=1,
        head_dim=mla.kv_lora_rank + mla.qk_rope_head_dim,
        attention_bias=bias,
        attention_output_bias=bias,
        qk_norm="none",
        rope=rope(fields, mla.qk_rope_head_dim),
        mla=mla,
        **parts.sigmoid_gate(fields),
        **parts.dense_then_sparse(fields),
    )


def _latent(fields: Fields) -> MlaConfig:
    rope_dim = fields.integer("qk_rope_head_dim", minimum=2)
    if rope_dim % 2:
        fields.fail("qk_rope_head_dim", rope_dim, "must be even")
    return MlaConfig(
        q_lora_rank=fields.optional_integer("q_lora_rank"),
        kv_lora_rank=fields.integer("kv_lora_rank"),
        qk_nope_head_dim=fields.integer("qk_nope_head_dim"),
        qk_rope_head_dim=rope_dim,
        v_head_dim=fields.integer("v_head_dim"),
        rope_interleave=fields.flag("rope_interleave", default=True),
    )
