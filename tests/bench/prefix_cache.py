"""Time to first token of a prompt that is in the prefix cache against one that is not. Asserts none of it.

    python -m tests.bench.prefix_cache [--model DIR] [--prompt-tokens 1000] [--repeats 10] [--json]

One default pod, nothing else running. Each repeat sends a random prompt, then sends it again; both ask for one
token, so the time of the whole answer is the time to its first token.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time

import httpx
import numpy as np

from tests.harness.pod import running_pod


def ask(client: httpx.Client, prompt: list[int]) -> tuple[float, int]:
    """Return the time until the first token in ms, and how many prompt tokens were cached."""
    start = time.monotonic()
    body = {"prompt": prompt, "max_tokens": 1, "temperature": 0, "ignore_eos": True}
    response = client.post("/v1/completions", json=body)
    elapsed_ms = (time.monotonic() - start) * 1000
    response.raise_for_status()
    return elapsed_ms, response.json()["usage"]["prompt_tokens_details"]["cached_tokens"]


def main() -> None:
    """Print medians in ms."""
    parser = argparse.ArgumentParser(description="time to first token with and without a cached prefix")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--prompt-tokens", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    misses, hits = [], []
    with running_pod(options.model) as pod, httpx.Client(base_url=pod.url, timeout=60) as client:
        ask(client, rng.integers(3, 200, options.prompt_tokens).tolist())
        for _ in range(options.repeats):
            prompt = rng.integers(3, 200, options.prompt_tokens).tolist()
            misses.append(ask(client, prompt))
            hits.append(ask(client, prompt))
    result = {
        "prompt_tokens": options.prompt_tokens,
        "miss_ttft_p50_ms": round(statistics.median(ms for ms, _ in misses), 1),
        "miss_cached_tokens": max(cached for _, cached in misses),
        "hit_ttft_p50_ms": round(statistics.median(ms for ms, _ in hits), 1),
        "hit_cached_tokens": min(cached for _, cached in hits),
    }
    lines = json.dumps(result) if options.json else "\n".join(f"{k:20} {v}" for k, v in result.items())
    sys.stdout.write(f"{lines}\n")


if __name__ == "__main__":
    main()
