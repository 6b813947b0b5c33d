"""Make small random checkpoints and what transformers computes with them.

    python -m tests.parity.make_goldens                                     all goldens, in place
    python -m tests.parity.make_goldens --variant qwen3_moe --out DIR --seed 7 [--prompts 20]

Needs the `parity` extra (torch, transformers); the tests that read the goldens do not. Each folder is a complete
Hugging Face checkpoint with tokenizer, and beside it:

    expected.json   {"max_tokens", "prompts": [[id]], "greedy": [[id]], "logit_prompts": [index]}
    logits.npz      "prompt_<index>": [T, vocab] float32, logits at every position of that prompt

All computed in float32, with eager attention, from the weights as stored. Prompts whose greedy path has a lead below
0.01 are passed over, since rounding must not decide a golden. The variants are in `random_models`.
"""

from __future__ import annotations

import argparse
import inspect
import json
import random
import textwrap
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging

from tests.parity.random_models import VARIANTS, load_reference, save_random

GOLDENS = Path(__file__).parent / "goldens"
MAX_TOKENS = 16
LEAD_MIN = 0.01
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def training_text() -> str:
    """Return text that every Python installation has."""
    return "\n".join(inspect.getsource(module) for module in (argparse, json, random, textwrap))


def make_tokenizer(text: str, vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False
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
def make(variant: str, out: Path, seed: int, num_prompts: int) -> None:
    """Write one checkpoint folder and its expectations."""
    torch.manual_seed(seed)
    vocab_size = save_random(variant, out)
    text = training_text()
    tokenizer = make_tokenizer(text, vocab_size)
    tokenizer.save_pretrained(out)
    loaded = load_reference(out)
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
    parser.add_argument("--variant", choices=VARIANTS, help="make one checkpoint; default: all goldens")
    parser.add_argument("--out", type=Path, help="folder to write, created if needed; with --variant")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=20)
    arguments = parser.parse_args()
    if (arguments.variant is None) != (arguments.out is None):
        parser.error("--variant and --out belong together")
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    if arguments.variant is not None:
        make(arguments.variant, arguments.out, arguments.seed, arguments.prompts)
        return
    for variant in VARIANTS:
        make(variant, GOLDENS / variant, arguments.seed, arguments.prompts)


if __name__ == "__main__":
    main()
