"""Random qwen3_moe checkpoints to measure with, where none is given."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from services.model.checkpoint_writer import CheckpointWriter

# 28.6M parameters: small enough for a laptop, too large for a second-level cache.
SHAPE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 4096,
    "hidden_size": 256,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "intermediate_size": 512,
    "moe_intermediate_size": 128,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "dtype": "float32",
}

# Next to nothing to compute, and a long window: 32K tokens go through it in seconds.
LONG_WINDOW = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 135_168,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "rope_theta": 1_000_000.0,
}


def write_random(folder: Path, seed: int = 0, changes: Mapping[str, object] | None = None) -> None:
    """Write the checkpoint `SHAPE` with `changes`, float32, drawn from `seed`."""
    fields = {**SHAPE, **(changes or {})}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields, indent=1))
    rng = np.random.default_rng(seed)
    writer = CheckpointWriter(folder)
    for name, shape in _shapes(fields):
        writer.add(name, np.ones(shape, np.float32) if len(shape) == 1 else _drawn(rng, shape))
    writer.finish()


def add_tokenizer(folder: Path) -> None:
    """Give a checkpoint the demo model's tokenizer, so that a gateway serves it."""
    demo = Path(__file__).resolve().parent.parent / "demo"
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(demo / name, folder)


def _drawn(rng: np.random.Generator, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    return np.asarray(rng.standard_normal(shape, dtype=np.float32) / np.float32(np.sqrt(shape[-1])))


def _shapes(fields: Mapping[str, object]) -> list[tuple[str, tuple[int, ...]]]:
    def size(name: str) -> int:
        value = fields[name]
        assert isinstance(value, int)
        return value

    hidden, vocab, inner = size("hidden_size"), size("vocab_size"), size("moe_intermediate_size")
    head = size("head_dim")
    q, kv = size("num_attention_heads") * head, size("num_key_value_heads") * head
    found: list[tuple[str, tuple[int, ...]]] = [
        ("model.embed_tokens.weight", (vocab, hidden)),
        ("lm_head.weight", (vocab, hidden)),
        ("model.norm.weight", (hidden,)),
    ]
    for layer in range(size("num_hidden_layers")):
        prefix = f"model.layers.{layer}"
        found += [
            (f"{prefix}.self_attn.q_proj.weight", (q, hidden)),
            (f"{prefix}.self_attn.k_proj.weight", (kv, hidden)),
            (f"{prefix}.self_attn.v_proj.weight", (kv, hidden)),
            (f"{prefix}.self_attn.o_proj.weight", (hidden, q)),
            (f"{prefix}.self_attn.q_norm.weight", (head,)),
            (f"{prefix}.self_attn.k_norm.weight", (head,)),
            (f"{prefix}.input_layernorm.weight", (hidden,)),
            (f"{prefix}.post_attention_layernorm.weight", (hidden,)),
            (f"{prefix}.mlp.gate.weight", (size("num_experts"), hidden)),
        ]
        for expert in range(size("num_experts")):
            at = f"{prefix}.mlp.experts.{expert}"
            found += [(f"{at}.gate_proj.weight", (inner, hidden)), (f"{at}.up_proj.weight", (inner, hidden))]
            found += [(f"{at}.down_proj.weight", (hidden, inner))]
    return found
