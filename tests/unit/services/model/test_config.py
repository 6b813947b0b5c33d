"""config.json: spellings accepted, mistakes refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bus.errors import ConfigError
from services.model import load_config
from services.model.config import Fp8Config, Int8Config, ModelConfig, RopeConfig

QWEN: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "moe_intermediate_size": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
}
DEEPSEEK: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
GLM: dict[str, Any] = {
    **{name: value for name, value in DEEPSEEK.items() if not name.endswith(("_rank", "_head_dim"))},
    "model_type": "glm4_moe",
    "num_key_value_heads": 2,
    "head_dim": 16,
    "partial_rotary_factor": 0.5,
    "use_qk_norm": True,
}
MINIMAX: dict[str, Any] = {
    "model_type": "minimax_m2",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rotary_dim": 8,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
}
WHOLE = {"num_bits": 8, "type": "int", "symmetric": True}
INT8 = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": WHOLE | {"strategy": "channel"},
            "input_activations": WHOLE | {"strategy": "token", "dynamic": True},
        }
    },
    "ignore": ["lm_head"],
}
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


def parse(tmp_path: Path, values: dict[str, Any], **changes: Any) -> ModelConfig:
    merged = {key: value for key, value in (values | changes).items() if value != "absent"}
    (tmp_path / "config.json").write_text(json.dumps(merged))
    return load_config(tmp_path)


def test_old_and_new_spellings_mean_the_same(tmp_path: Path) -> None:
    old = parse(tmp_path, QWEN, rope_theta=5e5, rope_scaling={"type": "yarn", "factor": 4.0})
    rope = {"rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0}
    new = parse(tmp_path, QWEN, num_experts="absent", num_local_experts=8, rope_parameters=rope)
    assert old == new
    assert old.rope.original_max_position_embeddings == 128
    written_out = parse(tmp_path, DEEPSEEK, scoring_func="sigmoid", topk_method="noaux_tc", moe_layer_freq=1)
    assert written_out == parse(tmp_path, DEEPSEEK)


def test_derived_values(tmp_path: Path) -> None:
    qwen = parse(tmp_path, QWEN, mlp_only_layers=[1], decoder_sparse_step=2)
    assert qwen.moe_layer_indices == (3,)
    assert (qwen.head_dim, qwen.has_shared_expert, qwen.num_slots, qwen.num_moe_layers) == (8, False, 2, 1)
    deepseek = parse(tmp_path, DEEPSEEK)
    assert deepseek.moe_layer_indices == (1, 2)
    assert (deepseek.has_shared_expert, deepseek.num_slots, deepseek.num_key_value_heads) == (True, 3, 1)
    assert deepseek.rope == RopeConfig(dim=8, theta=10000.0)
    assert parse(tmp_path, QWEN, num_nextn_predict_layers=2).num_mtp_layers == 2


def test_what_families_say_of_themselves(tmp_path: Path) -> None:
    glm = parse(tmp_path, GLM, attention_bias=True)
    assert (glm.rope.dim, glm.qk_norm, glm.attention_bias, glm.attention_output_bias) == (
        8,
        "per_head",
        True,
        False,
    )
    assert (glm.mla, glm.head_dim, glm.scoring, glm.has_shared_expert) == (None, 16, "sigmoid", True)
    assert parse(tmp_path, GLM, partial_rotary_factor="absent").rope.dim == 8
    assert parse(tmp_path, GLM, use_qk_norm="absent").qk_norm == "none"
    minimax = parse(tmp_path, MINIMAX)
    assert (minimax.rope.dim, minimax.rope.theta, minimax.qk_norm) == (8, 5e6, "all_heads")
    assert (minimax.scoring, minimax.norm_topk_prob, minimax.moe_intermediate_size) == ("sigmoid", True, 16)
    new = {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.5}
    assert parse(tmp_path, MINIMAX, rotary_dim="absent", rope_parameters=new) == minimax
    kimi = parse(tmp_path, DEEPSEEK, model_type="kimi_k2", architectures=["DeepseekV3ForCausalLM"])
    assert kimi.model_type == "kimi_k2"
    assert kimi.mla == parse(tmp_path, DEEPSEEK).mla


def test_a_dense_model_has_one_expert_that_every_token_visits(tmp_path: Path) -> None:
    llama = parse(tmp_path, LLAMA, rope_scaling=LLAMA3, rope_theta=5e5)
    assert (llama.num_experts, llama.top_k, llama.num_slots, llama.num_moe_layers) == (0, 0, 1, 2)
    assert (llama.num_key_value_heads, llama.head_dim, llama.rope.kind) == (4, 8, "llama3")
    assert parse(tmp_path, LLAMA, model_type="qwen3").qk_norm == "per_head"


def test_eight_bit_weights(tmp_path: Path) -> None:
    config = parse(tmp_path, DEEPSEEK, quantization_config=FP8)
    assert config.quantization == Fp8Config(block_rows=128, block_columns=128)
    released = FP8 | {"fmt": "float8_e4m3fn", "modules_to_not_convert": ["gate", "lm_head"]}
    assert parse(tmp_path, MINIMAX, quantization_config=released).quantization == config.quantization
    assert parse(tmp_path, QWEN, quantization_config=INT8).quantization == Int8Config()


@pytest.mark.parametrize(
    ("base", "changes", "text"),
    [
        (QWEN, {"model_type": "gpt2"}, 'model_type = "gpt2": supported are deepseek_v3, glm4_moe'),
        (QWEN, {"model_type": "absent"}, "model_type: missing"),
        (QWEN, {"model_type": ["qwen3_moe"]}, "model_type = "),
        (QWEN, {"num_local_experts": 4}, "num_local_experts = 4: contradicts num_experts = 8"),
        (QWEN, {"num_experts": "absent"}, "num_experts or num_local_experts: missing"),
        (QWEN, {"norm_topk_prob": "absent"}, "norm_topk_prob: missing"),
        (QWEN, {"norm_topk_prob": 1}, "norm_topk_prob = 1: must be true or false"),
        (QWEN, {"hidden_size": 0}, "hidden_size = 0: must be a whole number of at least 1"),
        (QWEN, {"hidden_size": 32.0}, "hidden_size = 32.0: must be a whole number"),
        (QWEN, {"hidden_size": True}, "hidden_size = true: must be a whole number"),
        (QWEN, {"rms_norm_eps": float("inf")}, "rms_norm_eps = Infinity: must be a finite number"),
        (QWEN, {"num_key_value_heads": 3}, "num_key_value_heads = 3: must divide num_attention_heads = 4"),
        (QWEN, {"head_dim": 9}, "head_dim = 9: must be even"),
        (QWEN, {"num_experts_per_tok": 9}, "num_experts_per_tok = 9: must be at most 8"),
        (QWEN, {"mlp_only_layers": [7]}, "mlp_only_layers = [7]: must be a list of layer indices below 4"),
        (QWEN, {"mlp_only_layers": [0, 1, 2, 3]}, "no layer has experts"),
        (QWEN, {"hidden_act": "gelu"}, 'hidden_act = "gelu": only silu'),
        (QWEN, {"use_sliding_window": True}, "use_sliding_window = true"),
        (
            QWEN,
            {"architectures": ["Qwen3MoeForSequenceClassification"]},
            "supported as Qwen3MoeForCausalLM only",
        ),
        (QWEN, {"architectures": "Qwen3MoeForCausalLM"}, "architectures = "),
        (QWEN, {"num_hidden_layers": 2**31 - 1}, "num_hidden_layers = 2147483647: must be at most 4096"),
        (QWEN, {"num_experts": 10**9}, "num_experts = 1000000000: must be at most 65536"),
        (QWEN, {"vocab_size": 2**31}, "vocab_size = 2147483648: must be at most"),
        (QWEN, {"rms_norm_eps": 2}, "rms_norm_eps = 2: must be at most 1.0"),
        (QWEN, {"rms_norm_eps": -1e-6}, "rms_norm_eps = -1e-06: must be at least 0.0"),
        (
            QWEN,
            {"layer_types": ["full_attention", "sliding_attention"] * 2},
            "must be full_attention for all 4",
        ),
        (QWEN, {"num_nextn_predict_layers": 17}, "num_nextn_predict_layers = 17: must be at most 16"),
        (QWEN, {"quantization_config": {}}, "quantization_config: quant_method: missing"),
        (QWEN, {"quantization_config": {"quant_method": "gptq"}}, 'quant_method = "gptq": supported are fp8'),
        (QWEN, {"quantization_config": FP8 | {"fmt": "e5m2"}}, 'fmt = "e5m2": supported is e4m3'),
        (QWEN, {"quantization_config": FP8 | {"activation_scheme": "static"}}, "supported is dynamic"),
        (QWEN, {"quantization_config": INT8 | {"format": "pack-quantized"}}, "supported is int-quantized"),
        (
            QWEN,
            {"quantization_config": INT8 | {"config_groups": {"g": {"weights": WHOLE}}}},
            "g.weights: strategy = null: supported is channel",
        ),
        (QWEN, {"quantization_config": {"quant_method": "fp8"}}, "weight_block_size = null: must be [rows"),
        (
            QWEN,
            {"quantization_config": FP8 | {"weight_block_size": [0, 128]}},
            "weight_block_size = [0, 128]",
        ),
        (QWEN, {"rope_scaling": {"rope_type": "longrope"}}, 'rope_type = "longrope": supported are default'),
        (QWEN, {"rope_scaling": {"rope_type": ["yarn"]}}, 'rope_type = ["yarn"]: supported are default'),
        (QWEN, {"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, "low_freq_factor = 4.0: must be above 0"),
        (
            QWEN,
            {"rope_scaling": {**YARN, "low_freq_factor": 1.0}},
            "low_freq_factor = 1.0: does not belong to",
        ),
        (
            QWEN,
            {"rope_scaling": {**YARN, "beta_slow": 64}},
            "beta_slow = 64.0: must be at most beta_fast = 32.0",
        ),
        (QWEN, {"rope_scaling": {**YARN, "factor": 0.5}}, "factor = 0.5: must be at least 1.0"),
        (QWEN, {"rope_theta": 0}, "rope_theta = 0: must be at least 2.0"),
        (LLAMA, {"mlp_bias": True}, "mlp_bias = true: a bias in the MLP"),
        (LLAMA, {"num_attention_heads": 5, "num_key_value_heads": 5}, "must divide hidden_size = 32"),
        (GLM, {"partial_rotary_factor": 1.5}, "partial_rotary_factor = 1.5: must be at most 1.0"),
        (GLM, {"partial_rotary_factor": 0.1}, "must leave an even number of a head's 16 columns, got 1"),
        (GLM, {"partial_rotary_factor": 0.01}, "must leave an even number of a head's 16 columns, got 0"),
        (GLM, {"topk_method": "greedy"}, 'topk_method = "greedy"'),
        (MINIMAX, {"rotary_dim": 32}, "rotary_dim = 32: must be at most 16"),
        (MINIMAX, {"partial_rotary_factor": 0.25}, "rotary_dim = 8: contradicts partial_rotary_factor"),
        (MINIMAX, {"attn_type_list": [1, 0]}, "attn_type_list = [1, 0]: must be 1"),
        (MINIMAX, {"qk_norm_type": "per_head"}, "only per_layer is supported"),
        (MINIMAX, {"use_routing_bias": False}, "use_routing_bias = false"),
        (MINIMAX, {"shared_intermediate_size": 16}, "a shared expert is not supported"),
        (DEEPSEEK, {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5: only 1"),
        (DEEPSEEK, {"first_k_dense_replace": 3}, "no layer has experts"),
        (QWEN, {"rope_scaling": {**YARN, "type": "linear"}}, 'type = "linear": contradicts rope_type'),
        (QWEN, {"rope_scaling": YARN, "rope_parameters": {}}, "rope_scaling = "),
        (QWEN, {"rope_scaling": {**YARN, "short_factor": [1]}}, "short_factor = [1]: unknown field"),
        (QWEN, {"rope_scaling": {"rope_type": "yarn"}}, "factor: missing"),
        (
            QWEN,
            {"rope_theta": 5e5, "rope_parameters": {"rope_theta": 1e4}},
            "rope_theta = 500000.0: contradicts",
        ),
        (QWEN, {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5: only 1"),
        (DEEPSEEK, {"scoring_func": "softmax"}, 'scoring_func = "softmax"'),
        (DEEPSEEK, {"topk_method": "greedy"}, 'topk_method = "greedy"'),
        (DEEPSEEK, {"moe_layer_freq": 2}, "moe_layer_freq = 2"),
        (DEEPSEEK, {"n_group": 3}, "n_group = 3: must divide 8 experts"),
        (DEEPSEEK, {"n_group": 8}, "groups of two or more"),
        (DEEPSEEK, {"topk_group": 5}, "topk_group = 5: must be at most n_group = 4"),
        (DEEPSEEK, {"num_experts_per_tok": 5}, "must be at most the 4 experts"),
        (DEEPSEEK, {"q_lora_rank": "absent"}, "q_lora_rank: missing"),
        (DEEPSEEK, {"qk_rope_head_dim": 7}, "qk_rope_head_dim = 7: must be even"),
        (DEEPSEEK, {"num_key_value_heads": 2}, "num_key_value_heads = 2: must equal num_attention_heads"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, base: dict[str, Any], changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(tmp_path, base, **changes)
    assert text in str(caught.value)
    assert str(tmp_path / "config.json") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_folders_that_are_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must be a folder"):
        load_config(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        load_config(tmp_path)
    for content, text in [
        (b"{", "not readable as JSON"),
        (b"[1]", "must hold one JSON object"),
        (b"\xff\xfe{}", "not readable as JSON"),
        (b'{"a": 1, "a": 2}', "'a' occurs twice"),
        (b"[" * 100_000, "not readable as JSON"),
        (b" " * (1024 * 1024 + 1), "must be at most"),
    ]:
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(ConfigError, match=text):
            load_config(tmp_path)
