"""Freshly made random checkpoints through real pods, compared with `transformers`, token by token and bit by bit.

    python -m tests.e2e.parity_matrix --python .venv-parity/bin/python

For each variant of a family a new random checkpoint is made (with the interpreter given, which has torch and
transformers) together with transformers' greedy tokens of 20 prompts. Then, for 1 and 2 DP groups and 1, 2 and 4 expert
workers (for the lesser variants one topology), a pod serves it, one more serves it in INT8, and the official `openai`
client streams each prompt as a chat and as token ids, alone and 32 at once. Token ids must equal transformers' (in
INT8: the monolithic oracle's); log-probabilities must have the very bits of the oracle. Prints one line per pod and
ends with exit code 1 if anything differed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import openai

from bus.control.messages import SamplingParams
from services.model.config import load_config
from services.model.reference import ReferenceModel
from services.model.sampling import token_logprob
from services.quantize.layer import Recipe
from services.quantize.quantizer import quantize
from tests.harness.pod import running_pod

MAIN = (
    "qwen3_moe",
    "deepseek_v3",
    "kimi_k2",
    "glm4_moe",
    "minimax_m2_fp8",
)  # one of each family, all topologies
OTHERS = (
    "qwen3_moe_bf16",
    "deepseek_v3_plain",
    "glm4_moe_air",
    "minimax_m2",
    "qwen3",
    "llama",
)  # one topology
VARIANTS = (*MAIN, *OTHERS)
DP_GROUPS = (1, 2)
EXPERT_WORKERS = (1, 2, 4)
NUM_PROMPTS = 20
NUM_TOGETHER = 32

Case = tuple[list[int], list[int]]  # prompt, transformers' greedy tokens


def make_checkpoint(python: str, variant: str, out: Path, seed: int) -> list[Case]:
    """Make a random checkpoint and transformers' answers with the development interpreter; return the answers."""
    command = [python, "-m", "tests.parity.make_goldens", "--variant", variant, "--out", str(out)]
    arguments = ["--seed", str(seed), "--prompts", str(NUM_PROMPTS)]
    subprocess.run([*command, *arguments], cwd=Path(__file__).parents[2], check=True)
    expected = json.loads((out / "expected.json").read_text())
    return list(zip(expected["prompts"], expected["greedy"], strict=True))


async def ask(
    client: openai.AsyncOpenAI, prompt: list[int], max_tokens: int
) -> tuple[list[int], list[float]]:
    """Stream one completion of token ids greedily; return its token ids and log-probabilities."""
    stream = await client.completions.create(
        model="random",
        prompt=prompt,
        max_tokens=max_tokens,
        temperature=0,
        logprobs=1,
        stream=True,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    token_ids: list[int] = []
    logprobs: list[float] = []
    async for chunk in stream:
        for choice in chunk.choices:
            token_ids += getattr(choice, "token_ids", None) or []
            if choice.logprobs is not None:
                logprobs += choice.logprobs.token_logprobs or []
    return token_ids, logprobs


async def chat(client: openai.AsyncOpenAI, max_tokens: int) -> str:
    """Stream one chat; return its text."""
    stream = await client.chat.completions.create(
        model="random",
        messages=[{"role": "user", "content": "def fibonacci("}],
        max_tokens=max_tokens,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    return "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])


def oracle_bits(model: ReferenceModel, prompt: list[int], output: list[int]) -> list[float]:
    """Return the oracle's log-probabilities of `output`, computed in one pass over prompt and output."""
    logits = model.logits([*prompt, *output])
    first = len(prompt) - 1
    return [token_logprob(logits[first + i], token, 0).logprob for i, token in enumerate(output)]


async def compare(url: str, cases: list[Case], model: ReferenceModel) -> list[str]:
    """Return what differs between the pod, transformers and the oracle."""
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=120) as client:
        return await compare_with(client, cases, model)


async def compare_with(client: openai.AsyncOpenAI, cases: list[Case], model: ReferenceModel) -> list[str]:
    """Ask through one client; see `compare`."""
    alone = [await ask(client, p, len(t)) for p, t in cases]
    crowd = [cases[i % len(cases)] for i in range(NUM_TOGETHER)]
    together = await asyncio.gather(*(ask(client, p, len(t)) for p, t in crowd))
    problems = []
    for (prompt, tokens), (got, logprobs) in [
        *zip(cases, alone, strict=True),
        *zip(crowd, together, strict=True),
    ]:
        if got != tokens:
            problems.append(f"tokens of {prompt[:8]}...: {got} instead of transformers' {tokens}")
        elif logprobs != oracle_bits(model, prompt, tokens):
            problems.append(f"log-probabilities of {prompt[:8]}... differ from the oracle's in some bit")
    if not await chat(client, 16):
        problems.append("the chat streamed no text")
    return problems


def topologies(variant: str) -> list[tuple[int, int]]:
    """Return the (DP groups, expert workers) that a variant is served with."""
    if variant in OTHERS:
        return [(2, 4)]
    return [(groups, workers) for groups in DP_GROUPS for workers in EXPERT_WORKERS]


def run_variant(variant: str, python: str, seed: int) -> int:
    """Make the variant's checkpoint and run its pods, then one in INT8; return the number of problems."""
    with tempfile.TemporaryDirectory(prefix="xds-parity-") as folder:
        checkpoint, int8 = Path(folder) / "random", Path(folder) / "int8" / "random"
        cases = make_checkpoint(python, variant, checkpoint, seed)
        count = sum(run_pod(variant, checkpoint, cases, topology, seed) for topology in topologies(variant))
        token_ids = np.random.default_rng(seed).integers(0, load_config(checkpoint).vocab_size, (6, 64))
        quantize(checkpoint, int8, token_ids, Recipe(), lambda *_: None)
        return count + run_pod(f"{variant} in INT8", int8, oracle_cases(int8, cases), (2, 4), seed)


def oracle_cases(checkpoint: Path, cases: list[Case]) -> list[Case]:
    """Return the same prompts with the greedy tokens of the monolithic oracle."""
    model = ReferenceModel.load(checkpoint)
    return [
        (prompt, model.generate(prompt, SamplingParams(max_tokens=len(greedy), temperature=0.0)))
        for prompt, greedy in cases
    ]


def run_pod(name: str, checkpoint: Path, cases: list[Case], topology: tuple[int, int], seed: int) -> int:
    """Serve a checkpoint with (DP groups, expert workers) and compare; return the number of problems."""
    (dp_groups, expert_workers), started = topology, time.monotonic()
    with running_pod(checkpoint, dp_groups=dp_groups, expert_workers=expert_workers) as pod:
        problems = asyncio.run(compare(pod.url, cases, ReferenceModel.load(checkpoint)))
    verdict = "equal" if not problems else f"{len(problems)} DIFFER"
    print(
        f"{name} dp_groups={dp_groups} expert_workers={expert_workers} seed={seed}: "
        f"{NUM_PROMPTS} alone, {NUM_TOGETHER} at once: {verdict} ({time.monotonic() - started:.1f} s)",
        flush=True,
    )
    for problem in problems[:5]:
        print(f"    {problem}")
    return len(problems)


def main() -> int:
    """Run the matrix; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--python", required=True, help="interpreter that has torch and transformers")
    parser.add_argument("--seed", type=int, default=int(time.time()) % 100_000, help="of the random weights")
    parser.add_argument("--variant", choices=VARIANTS, action="append", help="default: all")
    arguments = parser.parse_args()
    variants = arguments.variant or VARIANTS
    return 1 if sum(run_variant(v, arguments.python, arguments.seed) for v in variants) else 0


if __name__ == "__main__":
    sys.exit(main())
