"""Small random models of every family, and how `transformers` reads their checkpoints. Needs the `parity` extra.

Each variant is a shape in which families differ: gates, norms, rotary positions, biases, dense layers, storage. Every
parameter is drawn at random (norms and biases too), wide enough that the best logit leads clearly.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MiniMaxM2Config,
    MiniMaxM2ForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

Tensors = dict[str, torch.Tensor]
Json = dict[str, Any]

E4M3_MAX = 448.0
BLOCK = (16, 12)  # no multiple of the sizes below, so that last blocks are ragged
COMMON: Json = {
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
QWEN: Json = {
    **COMMON,
    "vocab_size": 512,
    "hidden_size": 36,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "moe_intermediate_size": 20,
    "num_experts": 8,
    "num_experts_per_tok": 3,
}
DEEPSEEK: Json = {
    **COMMON,
    "vocab_size": 512,
    "hidden_size": 36,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 20,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "kv_lora_rank": 20,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 10,
    "num_mtp_layers": 0,
}
SMALL: Json = {
    **COMMON,
    "vocab_size": 288,
    "hidden_size": 28,
    "intermediate_size": 36,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
}
YARN: Json = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32,
    "beta_slow": 1,
}
FP8: Json = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": list(BLOCK),
}


@dataclass
class Variant:
    """An untrained model, how to save it, and what its family's own checkpoints say differently in `config.json`."""

    model: PreTrainedModel
    save: Json = field(default_factory=dict)
    config: Json = field(default_factory=dict)  # None removes a field
    fp8: bool = False
    mtp_layer: bool = False


def _qwen3_moe() -> Variant:
    sizes = {**QWEN, "mlp_only_layers": [1], "norm_topk_prob": True}
    return Variant(Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes)))


def _qwen3_moe_bf16() -> Variant:
    variant = {"norm_topk_prob": False, "tie_word_embeddings": True, "attention_bias": True}
    config = Qwen3MoeConfig(**QWEN, **variant, rope_parameters=dict(YARN))
    return Variant(Qwen3MoeForCausalLM(config).to(torch.bfloat16), save={"max_shard_size": "100KB"})


def _deepseek_v3() -> Variant:
    groups = {"n_group": 4, "topk_group": 2, "n_shared_experts": 2, "first_k_dense_replace": 1}
    rope = {**YARN, "mscale": 0.7, "mscale_all_dim": 1.0}
    return Variant(
        DeepseekV3ForCausalLM(DeepseekV3Config(**DEEPSEEK, **groups, q_lora_rank=20, rope_parameters=rope))
    )


def _deepseek_v3_plain() -> Variant:
    variant = {"n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 0}
    bits = {"rope_interleave": False, "attention_bias": True, "norm_topk_prob": False}
    sizes = {**DEEPSEEK, "num_hidden_layers": 2}
    return Variant(DeepseekV3ForCausalLM(DeepseekV3Config(**sizes, **variant, **bits, q_lora_rank=None)))


def _kimi_k2() -> Variant:
    """The spelling of Kimi K2's own config.json; transformers reads it as deepseek_v3."""
    variant = {"n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1}
    scaling = {**YARN, "beta_fast": 1.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}
    scaling |= {"rope_theta": 50000.0, "original_max_position_embeddings": 64}
    sizes = {**DEEPSEEK, "vocab_size": 288, "hidden_size": 28, "intermediate_size": 36}
    config = DeepseekV3Config(
        **sizes, **variant, q_lora_rank=20, routed_scaling_factor=2.827, rope_parameters=dict(scaling)
    )
    old = {name: value for name, value in scaling.items() if name not in ("rope_theta", "rope_type")}
    spelling: Json = {
        "model_type": "kimi_k2",
        "rope_parameters": None,
        "rope_scaling": {**old, "type": "yarn"},
        "rope_theta": 50000.0,
        "rope_interleave": None,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "moe_layer_freq": 1,
        "aux_loss_alpha": 0.001,
        "seq_aux": True,
        "ep_size": 1,
    }
    return Variant(DeepseekV3ForCausalLM(config).to(torch.bfloat16), config=spelling, fp8=True)


def _glm4_moe() -> Variant:
    """The spelling of GLM-4.5's own config.json, with its multi-token prediction layer."""
    variant = {"n_group": 2, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1}
    experts = {"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 20}
    bits = {"attention_bias": True, "use_qk_norm": True, "routed_scaling_factor": 2.5}
    config = Glm4MoeConfig(**SMALL, **variant, **experts, **bits, num_mtp_layers=1, rope_theta=1e6)
    spelling: Json = {
        "rope_parameters": None,
        "rope_scaling": None,
        "rope_theta": 1e6,
        "partial_rotary_factor": 0.5,
    }
    return Variant(Glm4MoeForCausalLM(config).to(torch.bfloat16), config=spelling, mtp_layer=True)


def _glm4_moe_air() -> Variant:
    variant = {"n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1}
    experts = {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
    rope = {**YARN, "partial_rotary_factor": 0.5}
    config = Glm4MoeConfig(
        **SMALL, **variant, **experts, num_mtp_layers=0, norm_topk_prob=False, rope_parameters=rope
    )
    return Variant(Glm4MoeForCausalLM(config).to(torch.bfloat16))


def _minimax(**changes: Any) -> MiniMaxM2ForCausalLM:
    sizes = {**SMALL, "intermediate_size": 20, "num_hidden_layers": 2}
    rope = {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 8 / 12}
    config = MiniMaxM2Config(
        **sizes, num_local_experts=8, num_experts_per_tok=3, rope_parameters=rope, **changes
    )
    return MiniMaxM2ForCausalLM(config).to(torch.bfloat16)


def _minimax_m2() -> Variant:
    return Variant(_minimax(tie_word_embeddings=True), save={"max_shard_size": "40KB"})


def _minimax_m2_fp8() -> Variant:
    """The spelling of MiniMax-M2's own config.json."""
    spelling: Json = {
        "rope_parameters": None,
        "rope_theta": 5000000,
        "rotary_dim": 8,
        "attn_type_list": [1, 1],
        "qk_norm_type": "per_layer",
        "use_qk_norm": True,
        "use_routing_bias": True,
        "scoring_func": "sigmoid",
        "shared_intermediate_size": 0,
        "use_mtp": True,
        "num_mtp_modules": 3,
        "mtp_transformer_layers": 1,
    }
    return Variant(_minimax(), config=spelling, fp8=True)


def _qwen3() -> Variant:
    config = Qwen3Config(**{**SMALL, "num_hidden_layers": 2}, tie_word_embeddings=True)
    return Variant(Qwen3ForCausalLM(config).to(torch.bfloat16))


def _llama() -> Variant:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    sizes = {**SMALL, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, rope_parameters=rope, attention_bias=True)
    return Variant(LlamaForCausalLM(config).to(torch.bfloat16))


VARIANTS: dict[str, Callable[[], Variant]] = {
    "qwen3_moe": _qwen3_moe,
    "qwen3_moe_bf16": _qwen3_moe_bf16,
    "qwen3": _qwen3,
    "deepseek_v3": _deepseek_v3,
    "deepseek_v3_plain": _deepseek_v3_plain,
    "kimi_k2": _kimi_k2,
    "glm4_moe": _glm4_moe,
    "glm4_moe_air": _glm4_moe_air,
    "minimax_m2": _minimax_m2,
    "minimax_m2_fp8": _minimax_m2_fp8,
    "llama": _llama,
}


def save_random(name: str, out: Path) -> int:
    """Write a random checkpoint of a variant (drawn from torch's generator); return its vocabulary size."""
    variant = VARIANTS[name]()
    _randomise(variant.model)
    variant.model.save_pretrained(out, **variant.save)
    if variant.mtp_layer:
        _rewrite_tensors(out, _add_mtp_layer)
    if variant.fp8:
        _rewrite_tensors(out, _quantise)
        variant.config |= {"quantization_config": FP8}
    config = json.loads((out / "config.json").read_text()) | variant.config
    kept = {key: value for key, value in config.items() if key not in variant.config or value is not None}
    (out / "config.json").write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n")
    return int(variant.model.config.vocab_size)


def load_reference(folder: Path) -> PreTrainedModel:
    """Load a checkpoint into transformers in float32 with eager arithmetic; e4m3 weights are written out before."""
    config = json.loads((folder / "config.json").read_text())
    quantised = config.pop("quantization_config", None) is not None
    if not quantised and config["model_type"] != "kimi_k2":
        return _load(folder)
    if config["model_type"] == "kimi_k2":
        config["model_type"] = "deepseek_v3"
    with tempfile.TemporaryDirectory() as plain:
        (Path(plain) / "config.json").write_text(json.dumps(config))
        tensors = load_file(folder / "model.safetensors")
        save_file(_dequantise(tensors), Path(plain) / "model.safetensors", metadata={"format": "pt"})
        return _load(Path(plain))


def _load(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    return model.eval()


@torch.no_grad()
def _randomise(model: PreTrainedModel) -> None:
    """Draw every parameter and buffer of the checkpoint. Correction biases are stored in float32, as they ship."""
    for name, tensor in model.state_dict().items():
        if name.endswith("norm.weight"):
            tensor.copy_(1.0 + 0.2 * torch.randn(tensor.shape))
        elif tensor.ndim == 1:
            tensor.copy_(0.1 * torch.randn(tensor.shape))
        elif "embed_tokens" in name:
            tensor.copy_(0.7 * torch.randn(tensor.shape))
        else:
            tensor.copy_(1.3 * torch.randn(tensor.shape) / tensor.shape[-1] ** 0.5)
    for module in model.modules():
        if getattr(module, "e_score_correction_bias", None) is not None:
            module.e_score_correction_bias = module.e_score_correction_bias.float()


def _rewrite_tensors(folder: Path, change: Callable[[Tensors, Json], Tensors]) -> None:
    config = json.loads((folder / "config.json").read_text())
    path = folder / "model.safetensors"
    tensors = change(load_file(path), config)
    save_file({name: t.contiguous() for name, t in tensors.items()}, path, metadata={"format": "pt"})


def _add_mtp_layer(tensors: Tensors, config: Json) -> Tensors:
    """Add tensors of a multi-token prediction layer, which transformers and we leave out."""
    hidden, prefix = config["hidden_size"], f"model.layers.{config['num_hidden_layers']}"
    shapes = {"eh_proj": (hidden, 2 * hidden), "enorm": (hidden,), "hnorm": (hidden,)}
    shapes |= {"shared_head.norm": (hidden,)}
    extra = {f"{prefix}.{k}.weight": torch.randn(shape, dtype=torch.bfloat16) for k, shape in shapes.items()}
    return tensors | extra


def _quantise(tensors: Tensors, _: Json) -> Tensors:
    """Store every projection as e4m3 with a factor per block, as DeepSeek and MiniMax do."""
    stored: Tensors = {}
    for name, tensor in tensors.items():
        is_gate, is_table = name.endswith("gate.weight"), "embed_tokens" in name or "lm_head" in name
        if tensor.ndim != 2 or is_gate or is_table:
            stored[name] = tensor
            continue
        weight = tensor.float()
        rows, columns = (-(-n // b) for n, b in zip(weight.shape, BLOCK, strict=True))
        blocks = torch.zeros(rows * BLOCK[0], columns * BLOCK[1])
        blocks[: weight.shape[0], : weight.shape[1]] = weight
        largest = blocks.reshape(rows, BLOCK[0], columns, BLOCK[1]).abs().amax((1, 3))
        scale = largest / E4M3_MAX
        stored[name] = (weight / _spread(scale, weight.shape)).to(torch.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = scale
    return stored


def _dequantise(tensors: Tensors) -> Tensors:
    plain: Tensors = {}
    for name, tensor in tensors.items():
        if tensor.dtype == torch.float8_e4m3fn:
            plain[name] = tensor.float() * _spread(tensors[f"{name}_scale_inv"], tensor.shape)
        elif not name.endswith("_scale_inv"):
            plain[name] = tensor
    return plain


def _spread(scale: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    whole = scale.repeat_interleave(BLOCK[0], 0).repeat_interleave(BLOCK[1], 1)
    return whole[: shape[0], : shape[1]]
