"""Are the stored goldens what today's transformers computes from the stored checkpoints?

    python -m tests.parity.check_goldens        exit code 1 if anything differs; needs the `parity` extra

The weights are not made anew: tokenizer and prompts come from the running Python's own library, so another Python
makes other checkpoints. What must hold everywhere is the arithmetic.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from transformers.utils import logging

from tests.parity.make_goldens import GOLDENS, greedy
from tests.parity.random_models import VARIANTS, load_reference

LOGIT_ERROR_MAX = 1e-5


@torch.no_grad()
def check(folder: Path) -> list[str]:
    """Return what differs between transformers and the goldens of one checkpoint."""
    model = load_reference(folder)
    expected = json.loads((folder / "expected.json").read_text())
    problems = [
        f"{folder.name}: prompt {i}: tokens differ"
        for i, (prompt, tokens) in enumerate(zip(expected["prompts"], expected["greedy"], strict=True))
        if greedy(model, prompt)[0] != tokens
    ]
    with np.load(folder / "logits.npz") as stored:
        for i in expected["logit_prompts"]:
            logits = model(torch.tensor([expected["prompts"][i]])).logits[0].numpy()
            error = float(np.abs(logits - stored[f"prompt_{i}"]).max())
            if error > LOGIT_ERROR_MAX:
                problems.append(f"{folder.name}: prompt {i}: logits differ by {error:.1e}")
    return problems


def main() -> int:
    """Check every golden; return the exit code."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    found = 0
    for variant in VARIANTS:
        problems = check(GOLDENS / variant)
        found += len(problems)
        sys.stdout.write("\n".join([*problems, f"{variant}: {len(problems)} differences"]) + "\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
