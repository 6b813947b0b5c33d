"""Make small random checkpoints and what transformers computes with them.

    python tests/parity/make_goldens.py                                     all goldens, in place
    python tests/parity/make_goldens.py --family qwen3_moe --out DIR --seed 7 [--prompts 20]

Needs the `parity` extra (torch, transformers); the tests that read the goldens do not. Each folder is a complete
Hugging Face checkpoint with tokenizer, and beside it:

    expected.json   {"max_tokens", "prompts": [[id]], "greedy": [[id]], "logit_prompts": [index]}
    logits.npz      "prompt_<index>": [T, vocab] float32, logits at every position of that prompt

All computed in float32, with eager attention, from the weights as stored. Every parameter is drawn at random (norms
and biases too), wide enough that the best logit leads clearly; prompts whose greedy path has a lead below 0.01 are
passed over, since rounding must not decide a golden.
"""

from __future__ import annotations

import argparse
import inspect
import json
import random
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.utils import logging

GOLDENS = Path(__file__).parent / "goldens"
VOCAB_SIZE = 512
MAX_TOKENS = 16
LEAD_MIN = 0.01
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
QWEN: dict[str, Any] = {
    **COMMON,
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
DEEPSEEK: dict[str, Any] = {
    **COMMON,
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
YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32,
    "beta_slow": 1,
}


def build_model(family: str) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Return an untrained model of a family and the arguments of its `save_pretrained`."""
    if family == "qwen3_moe":
        sizes = {**QWEN, "mlp_only_layers": [1], "norm_topk_prob": True}
        return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes)), {}
    if family == "qwen3_moe_bf16":
        variant = {"norm_topk_prob": False, "tie_word_embeddings": True, "attention_bias": True}
        config = Qwen3MoeConfig(**QWEN, **variant, rope_parameters=dict(YARN))
        return Qwen3MoeForCausalLM(config).to(torch.bfloat16), {"max_shard_size": "100KB"}
    if family == "deepseek_v3":
        groups = {"n_group": 4, "topk_group": 2, "n_shared_experts": 2, "first_k_dense_replace": 1}
        rope = {**YARN, "mscale": 0.7, "mscale_all_dim": 1.0}
        config = DeepseekV3Config(**DEEPSEEK, **groups, q_lora_rank=20, rope_parameters=rope)
        return DeepseekV3ForCausalLM(config), {}
    if family == "deepseek_v3_plain":
        variant = {"n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 0}
        bits = {"rope_interleave": False, "attention_bias": True, "norm_topk_prob": False}
        config = DeepseekV3Config(**{**DEEPSEEK, "num_hidden_layers": 2}, **variant, **bits, q_lora_rank=None)
        return DeepseekV3ForCausalLM(config), {}
    raise SystemExit(f"--family {family}: must be one of {', '.join(FAMILIES)}")


FAMILIES = ("qwen3_moe", "deepseek_v3", "deepseek_v3_plain", "qwen3_moe_bf16")


@torch.no_grad()
def randomise(model: PreTrainedModel) -> None:
    """Draw every parameter and buffer of the checkpoint."""
    for name, tensor in model.state_dict().items():
        if name.endswith("norm.weight"):
            tensor.copy_(1.0 + 0.2 * torch.randn(tensor.shape))
        elif tensor.ndim == 1:
            tensor.copy_(0.1 * torch.randn(tensor.shape))
        elif "embed_tokens" in name:
            tensor.copy_(0.7 * torch.randn(tensor.shape))
        else:
            tensor.copy_(1.3 * torch.randn(tensor.shape) / tensor.shape[-1] ** 0.5)


def training_text() -> str:
    """Return text that every Python installation has."""
    return "\n".join(inspect.getsource(module) for module in (argparse, json, random, textwrap))


def make_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text], trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=256
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


@torch.no_grad()
def greedy(model: PreTrainedModel, prompt: list[int]) -> tuple[list[int], float]:
    """Return the greedy continuation, past any end token, and the smallest lead of a best logit on the way."""
    ids, cache, output, lead = torch.tensor([prompt]), None, list[int](), float("inf")
    for _ in range(MAX_TOKENS):
        result = model(ids, past_key_values=cache, use_cache=True)
        cache = result.past_key_values
        best = result.logits[0, -1].topk(2)
        lead = min(lead, float(best.values[0] - best.values[1]))
        output.append(int(best.indices[0]))
        ids = torch.tensor([[output[-1]]])
    return output, lead


def choose_prompts(
    model: PreTrainedModel, text_ids: list[int], count: int, seed: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Return prompts of 1 to 60 tokens and their greedy continuations."""
    rng = random.Random(seed)
    prompts: list[list[int]] = []
    outputs: list[list[int]] = []
    for _ in range(20 * count):
        if len(prompts) == count:
            break
        length = [1, 5, 12, 17, 60][len(prompts)] if len(prompts) < 5 else rng.randint(2, 48)
        start = rng.randrange(len(text_ids) - length)
        prompt = text_ids[start : start + length]
        output, lead = greedy(model, prompt)
        if lead >= LEAD_MIN:
            prompts.append(prompt)
            outputs.append(output)
    if len(prompts) < count:
        raise SystemExit(f"only {len(prompts)} of {count} prompts have a clear greedy path; try another seed")
    return prompts, outputs


@torch.no_grad()
def make(family: str, out: Path, seed: int, num_prompts: int) -> None:
    """Write one checkpoint folder and its expectations."""
    torch.manual_seed(seed)
    model, save_arguments = build_model(family)
    randomise(model)
    model.save_pretrained(out, **save_arguments)
    text = training_text()
    tokenizer = make_tokenizer(text)
    tokenizer.save_pretrained(out)
    loaded = AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    prompts, outputs = choose_prompts(loaded, tokenizer.backend_tokenizer.encode(text).ids, num_prompts, seed)
    with_logits = [index for index in (1, 3) if index < num_prompts]
    logits = {f"prompt_{i}": loaded(torch.tensor([prompts[i]])).logits[0].numpy() for i in with_logits}
    np.savez_compressed(out / "logits.npz", **logits)
    expected = {
        "max_tokens": MAX_TOKENS,
        "prompts": prompts,
        "greedy": outputs,
        "logit_prompts": with_logits,
    }
    (out / "expected.json").write_text(json.dumps(expected) + "\n")


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description="random checkpoints and what transformers computes with them"
    )
    parser.add_argument("--family", choices=FAMILIES, help="make one checkpoint; default: all goldens")
    parser.add_argument("--out", type=Path, help="folder to write, created if needed; with --family")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=20)
    arguments = parser.parse_args()
    if (arguments.family is None) != (arguments.out is None):
        parser.error("--family and --out belong together")
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    if arguments.family is not None:
        make(arguments.family, arguments.out, arguments.seed, arguments.prompts)
        return
    for family in FAMILIES:
        make(family, GOLDENS / family, arguments.seed, arguments.prompts)


if __name__ == "__main__":
    main()
