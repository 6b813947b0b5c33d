"""What every engine process does: read a task per line, run it, answer with a line.

A task is {"batch", "prompt_tokens", "output_tokens", "seed", "begin", "end"}: of `batch` prompts of that length, drawn
from the seed, those from `begin` to `end` are prefilled one after the other, then continued together, greedily. The
answer is {"prefill_s", "steps_s", "token_ids"}: seconds of the whole prefill, of each decode step, and the ids
[end - begin][output_tokens] with the one that the prefill gives first. An engine takes prefill and step apart, so that
all are timed alike.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Protocol

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]


class Engine(Protocol):
    """One engine with a loaded model."""

    def reset(self, batch: int, num_tokens: int) -> None:
        """Forget all sequences; make room for `batch` of `num_tokens` each."""
        ...

    def prefill(self, sequence: int, prompt: Ids) -> int:
        """Process the prompt [n] of one sequence; return its greedy next token."""
        ...

    def step(self, token_ids: Ids, position: int) -> Ids:
        """Process one token of each sequence [batch] at `position`; return the greedy next tokens [batch]."""
        ...


def prompts_of(batch: int, prompt_tokens: int, seed: int, vocab_size: int) -> Ids:
    """Return token ids [batch, prompt_tokens], the same in every engine."""
    return np.random.default_rng((seed, batch)).integers(0, vocab_size, (batch, prompt_tokens))


def run(engine: Engine, task: dict[str, int], vocab_size: int) -> dict[str, object]:
    """Run one task."""
    batch, length, outputs = task["batch"], task["prompt_tokens"], task["output_tokens"]
    prompts = prompts_of(batch, length, task["seed"], vocab_size)[task["begin"] : task["end"]]
    batch = len(prompts)
    engine.reset(batch, length + outputs)
    began = time.perf_counter()
    current = np.array([engine.prefill(i, prompts[i]) for i in range(batch)], np.int64)
    prefill_s = time.perf_counter() - began
    token_ids, steps_s = [current], []
    for position in range(length, length + outputs - 1):
        began = time.perf_counter()
        current = engine.step(current, position)
        steps_s.append(time.perf_counter() - began)
        token_ids.append(current)
    return {"prefill_s": prefill_s, "steps_s": steps_s, "token_ids": np.stack(token_ids, 1).tolist()}


def serve(engine: Engine, vocab_size: int) -> None:
    """Answer tasks until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print where they like; only answers go to the driver
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(run(engine, json.loads(line), vocab_size)), file=answers, flush=True)
