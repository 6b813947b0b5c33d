"""Check an exported folder: `python -m services.demo.train.verify FOLDER`.

It must load with transformers' `DeepseekV3ForCausalLM` and give the same logits there as the model that was
trained, the MTP layer included; its tokenizer must return every text unchanged; its chat template must
render in jinja2's sandbox. Then it prints greedy continuations. Any failed check ends with a message and
exit status 1.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoTokenizer, DeepseekV3ForCausalLM
from transformers.modeling_layers import MtpModel

from services.demo.train.model import Model, load
from services.demo.train.tokenizer import SEPARATOR, SEPARATOR_ID

TOLERANCE = 1e-4
TEXT = 'class Stack:\n    """A pile."""\n\n    def __init__(self):\n        self._items = []  # käse ✓\n'
PROMPTS = ("def fibonacci(", "import os\n\ndef", "class Stack:")


@torch.no_grad()
def greedy(model: Model, tokenizer: Tokenizer, prompt: str, count: int = 80) -> str:
    """Return `prompt` and its greedy continuation, up to the separator."""
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids
    for _ in range(count):
        hidden = model.hidden(torch.tensor([ids]))
        ids.append(int(model.logits(hidden[0, -1]).argmax()))
        if ids[-1] == SEPARATOR_ID:
            break
    return tokenizer.decode(ids)


def hf_draft(folder_model: DeepseekV3ForCausalLM, next_ids: Tensor, hidden: Tensor) -> Tensor:
    """Return the logits of transformers' MTP layer over the same inputs as `Model.draft`."""
    mtp = MtpModel.from_pretrained(folder_model).eval()
    positions = torch.arange(next_ids.shape[1])[None]
    embedded = mtp.embed_tokens(next_ids)
    causal = torch.full((next_ids.shape[1],) * 2, float("-inf")).triu(1)[None, None]
    tables = mtp.rotary_emb(embedded, positions)
    drafted = mtp.layers[0](embedded, hidden, tables, causal, positions, None)
    return mtp.shared_head(drafted)


@torch.no_grad()
def check_logits(folder: Path, model: Model, tokenizer: Tokenizer) -> None:
    text = TEXT * 12
    ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False).ids])
    # transformers finds the MTP layer by this pattern, which it knows only for the 61 layers of DeepSeek-V3.
    DeepseekV3ForCausalLM._keys_to_ignore_on_load_unexpected = [
        rf"model\.layers\.{len(model.layers) - 1}\..*"
    ]
    theirs = DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    hidden = model.hidden(ids)
    worst = float((model.logits(hidden) - theirs(ids).logits).abs().max())
    drafts = model.logits(model.draft(ids[:, 1:], hidden[:, :-1]))
    worst_draft = float((drafts - hf_draft(theirs, ids[:, 1:], hidden[:, :-1])).abs().max())
    print(
        f"{ids.shape[1]} tokens: logits differ by {worst:.1e} at most, the MTP layer's by {worst_draft:.1e}"
    )
    if not max(worst, worst_draft) <= TOLERANCE:
        sys.exit(f"logits: expected transformers and the trained model to agree within {TOLERANCE}")


def check_text(folder: Path, tokenizer: Tokenizer) -> None:
    theirs = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.encode(TEXT, add_special_tokens=False).ids
    if tokenizer.decode(ids) != TEXT or theirs(TEXT)["input_ids"] != ids:
        sys.exit("tokenizer: expected the text back, and the same ids from transformers")
    if theirs.eos_token_id != SEPARATOR_ID or tokenizer.token_to_id(SEPARATOR) != SEPARATOR_ID:
        sys.exit(f"tokenizer: expected {SEPARATOR} to have id {SEPARATOR_ID}")
    messages = [{"role": "user", "content": "Return the n-th Fibonacci number."}]
    template = ImmutableSandboxedEnvironment().from_string((folder / "chat_template.jinja").read_text())
    given = {
        "messages": messages,
        "add_generation_prompt": True,
        "bos_token": SEPARATOR,
        "eos_token": SEPARATOR,
    }
    prompt = template.render(given)
    if prompt != theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True):
        sys.exit("chat template: expected jinja2 and transformers to render the same prompt")
    print(f"chat prompt: {prompt!r}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Check an exported demo model.")
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    torch.set_num_threads(1)  # a second thread costs more than it helps at this size
    model = load(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    check_logits(folder, model, tokenizer)
    check_text(folder, tokenizer)
    for prompt in PROMPTS:
        print(f"{'-' * 30} {prompt!r}\n{greedy(model, tokenizer, prompt)}")


if __name__ == "__main__":
    main()
