"""A float32 qwen3_moe checkpoint as GGUF, for llama.cpp: `python -m services.bench.gguf_file CHECKPOINT FILE.gguf`.

Same weights, other names; nothing is rounded. The tokenizer is a placeholder: the benchmark speaks in token ids. Needs
the `gguf` package.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from services.model import numerics
from services.model.checkpoint import Checkpoint, TensorSpec
from services.model.config import ModelConfig, load_config

ATTENTION = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate": "ffn_gate_inp",
}
EXPERTS = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"}


def write_gguf(folder: Path, path: Path) -> None:
    """Write the checkpoint `folder` to `path`. Raises ValueError: not qwen3_moe with experts in every layer."""
    config = load_config(folder)
    if config.model_type != "qwen3_moe" or config.num_moe_layers != config.num_hidden_layers:
        raise ValueError(f"{folder}: only qwen3_moe with experts in every layer is written as GGUF")
    checkpoint = Checkpoint.open(folder)
    writer = import_module("gguf").GGUFWriter(path, "qwen3moe")  # an extra
    _add_config(writer, config)
    for name, theirs in {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}.items():
        writer.add_tensor(f"{theirs}.weight", _tensor(checkpoint, f"{name}.weight"))
    head = "model.embed_tokens" if config.tie_word_embeddings else "lm_head"
    writer.add_tensor("output.weight", _tensor(checkpoint, f"{head}.weight"))
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        for name, theirs in ATTENTION.items():
            writer.add_tensor(f"blk.{layer}.{theirs}.weight", _tensor(checkpoint, f"{prefix}.{name}.weight"))
        for name, theirs in EXPERTS.items():
            stacked = [
                _tensor(checkpoint, f"{prefix}.mlp.experts.{e}.{name}.weight")
                for e in range(config.num_experts)
            ]
            writer.add_tensor(f"blk.{layer}.{theirs}.weight", np.stack(stacked))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_config(writer: Any, config: ModelConfig) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.moe_intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope.theta)
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.top_k)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"<{i}>" for i in range(config.vocab_size)])
    writer.add_token_merges(["< >"])


def _tensor(checkpoint: Checkpoint, name: str) -> np.ndarray:
    stored = checkpoint.tensors[name]
    return numerics.widen(checkpoint.load([TensorSpec(name, stored.shape)]).array(name))


if __name__ == "__main__":
    write_gguf(Path(sys.argv[1]), Path(sys.argv[2]))
