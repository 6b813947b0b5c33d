"""Parts of `config.json` that families share: each function checks some fields and returns fields of `ModelConfig`."""

from __future__ import annotations

from typing import Any

from services.model.config_fields import Fields
from services.model.model_config import Fp8Config, Int8Config, TensorNames

Part = dict[str, Any]

LAYERS_MAX = 4096
EXPERTS_MAX = 65_536
MTP_LAYERS_MAX = 16
BLOCK_MAX = 65_536


def decoder(fields: Fields) -> Part:
    """Embeddings, depth, norms, head and storage: what every decoder has."""
    return {
        "vocab_size": fields.integer("vocab_size"),
        "hidden_size": fields.integer("hidden_size"),
        "num_hidden_layers": num_layers(fields),
        "num_mtp_layers": _num_mtp_layers(fields),
        "max_position_embeddings": fields.integer("max_position_embeddings"),
        "rms_norm_eps": fields.number("rms_norm_eps", maximum=1.0),
        "tie_word_embeddings": fields.flag("tie_word_embeddings", default=False),
        "quantization": _quantization(fields),
    }


def num_layers(fields: Fields) -> int:
    """The number of layers that are served."""
    return fields.integer("num_hidden_layers", maximum=LAYERS_MAX)


def _num_mtp_layers(fields: Fields) -> int:
    """Multi-token prediction layers stored after the served ones."""
    return fields.integer(
        "num_nextn_predict_layers", "num_mtp_layers", minimum=0, maximum=MTP_LAYERS_MAX, default=0
    )


def grouped_query(fields: Fields, *, bias_default: bool = False) -> Part:
    """Attention whose heads share K and V in groups. Sliding windows are refused."""
    fields.only("use_sliding_window", False, rule="sliding windows are not supported")
    kinds = fields.raw("layer_types", default=None)
    if kinds is not None and kinds != ["full_attention"] * num_layers(fields):
        fields.fail("layer_types", kinds, f"must be full_attention for all {num_layers(fields)} layers")
    hidden_size, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    kv_heads = fields.optional_integer("num_key_value_heads", default=heads) or heads
    if heads % kv_heads:
        fields.fail("num_key_value_heads", kv_heads, f"must divide num_attention_heads = {heads}")
    bias = fields.flag("attention_bias", default=bias_default)
    return {
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim(fields, hidden_size, heads),
        "attention_bias": bias,
        "attention_output_bias": bias,
    }


def head_dim(fields: Fields, hidden_size: int, heads: int) -> int:
    """Columns of one head: `head_dim`, or the hidden size divided among the heads."""
    value = fields.optional_integer("head_dim", minimum=2, default=None)
    if value is None:
        if hidden_size % heads:
            fields.fail("num_attention_heads", heads, f"must divide hidden_size = {hidden_size}")
        value = hidden_size // heads
    if value % 2:
        fields.fail("head_dim", value, "must be even")
    return value


def softmax_gate(fields: Fields, num_experts: int, *, norm_topk_prob: bool | None = None) -> Part:
    """Scores are a softmax over all experts; no correction bias, no groups, no shared expert.

    `norm_topk_prob` None = the config must say whether the chosen weights are made to add up to 1.
    """
    return {
        "num_experts": num_experts,
        "num_shared_experts": 0,
        "top_k": fields.integer("num_experts_per_tok"),
        "scoring": "softmax",
        "gate_correction_bias": False,
        "norm_topk_prob": fields.flag("norm_topk_prob") if norm_topk_prob is None else norm_topk_prob,
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
    }


def sigmoid_gate(fields: Fields) -> Part:
    """DeepSeek-V3's gate: sigmoid scores, a correction bias for the choice, groups of experts, shared experts."""
    fields.only("scoring_func", "sigmoid", rule="only sigmoid is supported")
    fields.only("topk_method", "noaux_tc", rule="only noaux_tc is supported")
    num_experts = fields.integer("n_routed_experts", "num_local_experts", maximum=EXPERTS_MAX)
    n_group, topk_group = _expert_groups(fields, num_experts)
    shared = fields.optional_integer("n_shared_experts", minimum=0, maximum=EXPERTS_MAX, default=0) or 0
    return {
        "num_experts": num_experts,
        "num_shared_experts": shared,
        "top_k": fields.integer("num_experts_per_tok"),
        "scoring": "sigmoid",
        "gate_correction_bias": True,
        "norm_topk_prob": fields.flag("norm_topk_prob"),
        "routed_scaling_factor": fields.number("routed_scaling_factor"),
        "n_group": n_group,
        "topk_group": topk_group,
    }


def _expert_groups(fields: Fields, num_experts: int) -> tuple[int, int]:
    n_group = fields.optional_integer("n_group") or 1
    topk_group = fields.optional_integer("topk_group") or n_group
    if num_experts % n_group or (n_group > 1 and num_experts // n_group < 2):
        fields.fail("n_group", n_group, f"must divide {num_experts} experts into groups of two or more")
    if topk_group > n_group:
        fields.fail("topk_group", topk_group, f"must be at most n_group = {n_group}")
    reachable = topk_group * (num_experts // n_group)
    top_k = fields.integer("num_experts_per_tok")
    if top_k > reachable:
        fields.fail(
            "num_experts_per_tok", top_k, f"must be at most the {reachable} experts of topk_group groups"
        )
    return n_group, topk_group


def dense_then_sparse(fields: Fields) -> Part:
    """`first_k_dense_replace` layers with a plain MLP, then layers with experts."""
    fields.only("moe_layer_freq", 1, rule="only 1 is supported")
    first = fields.integer("first_k_dense_replace", minimum=0)
    return {
        "intermediate_size": fields.integer("intermediate_size") if first else 0,
        "moe_intermediate_size": fields.integer("moe_intermediate_size"),
        "moe_layer_indices": tuple(range(first, num_layers(fields))),
        "names": TensorNames(),
    }


def dense(fields: Fields) -> Part:
    """No routed experts: each layer's MLP is a shared expert that every token visits."""
    return {
        "intermediate_size": 0,
        "moe_intermediate_size": fields.integer("intermediate_size"),
        "moe_layer_indices": tuple(range(num_layers(fields))),
        "names": TensorNames(shared_expert=""),
        "num_experts": 0,
        "num_shared_experts": 1,
        "top_k": 0,
        "scoring": "softmax",
        "gate_correction_bias": False,
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
    }


def _quantization(fields: Fields) -> Fp8Config | Int8Config | None:
    """How 8-bit weights are stored, or None."""
    section = fields.section("quantization_config")
    if section is None:
        return None
    method = section.raw("quant_method")
    if method == "fp8":
        return _fp8(section)
    if method != "compressed-tensors":
        rule = "supported are fp8 with weight_block_size, and compressed-tensors in INT8"
        section.fail("quant_method", method, rule)
    return _int8(section)


def _int8(section: Fields) -> Int8Config:
    """INT8 weights with a factor per row, INT8 activations with one per token (what `xds quantize` writes)."""
    section.only("format", "int-quantized", rule="supported is int-quantized")
    groups = section.raw("config_groups")
    if not isinstance(groups, dict) or not groups or not all(isinstance(g, dict) for g in groups.values()):
        section.fail("config_groups", groups, "must be an object of groups")
    for name, group in groups.items():
        for part, strategy in (("weights", "channel"), ("input_activations", "token")):
            values = group.get(part)
            rounding = Fields(values if isinstance(values, dict) else {}, f"{section.source}: {name}.{part}")
            for field, wanted in (
                ("num_bits", 8),
                ("type", "int"),
                ("symmetric", True),
                ("strategy", strategy),
            ):
                if rounding.raw(field, default=None) != wanted:
                    rounding.fail(field, rounding.values.get(field), f"supported is {wanted}")
            if part == "input_activations" and rounding.raw("dynamic", default=None) is not True:
                rounding.fail("dynamic", rounding.values.get("dynamic"), "supported is true")
    return Int8Config()


def _fp8(section: Fields) -> Fp8Config:
    """Block-scaled e4m3 as DeepSeek, Kimi, Qwen and MiniMax ship it. Activations stay float32."""
    section.only("fmt", "e4m3", "float8_e4m3fn", rule="supported is e4m3")
    section.only("activation_scheme", "dynamic", rule="supported is dynamic")
    block = section.raw("weight_block_size", default=None)
    if (
        not isinstance(block, list)
        or len(block) != 2
        or not all(type(n) is int and 1 <= n <= BLOCK_MAX for n in block)
    ):
        section.fail("weight_block_size", block, f"must be [rows, columns], each in 1 .. {BLOCK_MAX}")
    return Fp8Config(block_rows=block[0], block_columns=block[1])
