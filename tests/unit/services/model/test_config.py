"""config.json: spellings accepted, mistakes refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bus.errors import ConfigError
from services.model import load_config
from services.model.config import ModelConfig, RopeConfig

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
    assert deepseek.rope == RopeConfig(theta=10000.0)


@pytest.mark.parametrize(
    ("base", "changes", "text"),
    [
        (QWEN, {"model_type": "llama"}, 'model_type = "llama": supported are deepseek_v3, qwen3_moe'),
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
        (QWEN, {"quantization_config": {"quant_method": "fp8"}}, "quantised checkpoints are not supported"),
        (QWEN, {"rope_scaling": {"rope_type": "llama3"}}, 'rope_type = "llama3": supported are default'),
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
