"""minimax_m2 (MiniMax-M2): query and key norms over all heads at once, part of each head rotated, sigmoid gate.

`intermediate_size` is an expert's; every layer has experts and none is shared. Its tensors keep Mixtral's names:
`block_sparse_moe.experts.N.w1` is the gate, `w3` up, `w2` down.
"""

from __future__ import annotations

from services.model import config_parts as parts
from services.model.config_fields import Fields
from services.model.config_rope import rope
from services.model.model_config import ModelConfig, RopeConfig, TensorNames

ARCHITECTURE = "MiniMaxM2ForCausalLM"
NAMES = TensorNames(
    mlp="block_sparse_moe",
    correction_bias="e_score_correction_bias",
    projections=("w1", "w3", "w2"),
)


def parse(fields: Fields) -> ModelConfig:
    """Check one `config.json`. Raises ConfigError."""
    _refuse_variants(fields)
    attention = parts.grouped_query(fields)
    return ModelConfig(
        model_type="minimax_m2",
        names=NAMES,
        **parts.decoder(fields),
        **attention,
        qk_norm="all_heads",
        rope=_rope(fields, attention["head_dim"]),
        intermediate_size=0,
        moe_intermediate_size=fields.integer("intermediate_size"),
        moe_layer_indices=tuple(range(parts.num_layers(fields))),
        num_experts=fields.integer("num_local_experts", "num_experts", maximum=parts.EXPERTS_MAX),
        num_shared_experts=0,
        top_k=fields.integer("num_experts_per_tok"),
        scoring="sigmoid",
        gate_correction_bias=True,
        norm_topk_prob=True,
        routed_scaling_factor=1.0,
        n_group=1,
        topk_group=1,
    )


def _rope(fields: Fields, head_dim: int) -> RopeConfig:
    """`rotary_dim` counts the rotated columns; newer configs say `partial_rotary_factor` instead."""
    rotary_dim = fields.optional_integer("rotary_dim", minimum=2, maximum=head_dim, default=None)
    factor = 1.0 if rotary_dim is None else rotary_dim / head_dim
    result = rope(fields, head_dim, theta=5e6, partial_rotary_factor=factor)
    if rotary_dim not in (None, result.dim):
        fields.fail("rotary_dim", rotary_dim, f"contradicts partial_rotary_factor, which leaves {result.dim}")
    return result


def _refuse_variants(fields: Fields) -> None:
    """Fields of MiniMax's other models that would change results."""
    fields.only("scoring_func", "sigmoid", rule="only sigmoid is supported")
    fields.only("use_routing_bias", True, rule="only true is supported")
    fields.only("use_qk_norm", True, rule="only true is supported")
    fields.only("qk_norm_type", "per_layer", rule="only per_layer is supported")
    fields.only("shared_intermediate_size", 0, rule="a shared expert is not supported")
    fields.only("attention_bias", False, rule="a bias in attention is not supported")
    fields.only("sliding_window", rule="sliding windows are not supported")
    kinds = fields.raw("attn_type_list", default=None)
    if kinds is not None and kinds != [1] * parts.num_layers(fields):
        fields.fail("attn_type_list", kinds, "must be 1 (full attention) for every layer")
