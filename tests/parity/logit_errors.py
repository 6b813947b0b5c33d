"""How far are our logits from those of transformers? One line per golden.

python -m tests.parity.logit_errors
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from bus.control.messages import SamplingParams
from services.model import ReferenceModel
from tests.parity.test_goldens import GOLDENS, NAMES


def line(folder: Path) -> str:
    """Return the largest logit error of one golden and how many greedy outputs are equal."""
    model = ReferenceModel.load(folder)
    expected = json.loads((folder / "expected.json").read_text())
    with np.load(folder / "logits.npz") as stored:
        logits = {i: stored[f"prompt_{i}"] for i in expected["logit_prompts"]}
    error = max(
        float(np.abs(model.logits(expected["prompts"][i]) - them).max()) for i, them in logits.items()
    )
    largest = max(float(np.abs(them).max()) for them in logits.values())
    greedy = SamplingParams(max_tokens=expected["max_tokens"], temperature=0.0, ignore_eos=True)
    pairs = list(zip(expected["prompts"], expected["greedy"], strict=True))
    equal = sum(model.generate(prompt, greedy) == tokens for prompt, tokens in pairs)
    version = json.loads((folder / "config.json").read_text())["transformers_version"]
    return (
        f"{folder.name:18s} transformers {version}: largest logit error {error:.1e} of {largest:.1f}, "
        f"greedy outputs equal {equal}/{len(pairs)}"
    )


def main() -> int:
    """Print all lines."""
    for name in NAMES:
        sys.stdout.write(line(GOLDENS / name) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
