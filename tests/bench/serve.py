"""Numbers of a whole pod over HTTP: throughput, time to first token, time between tokens. Asserts none of them.

    python -m tests.bench.serve [--model DIR] [--concurrency 1 8 32] [--requests 64] [--max-tokens 128] [--json]

One default pod; at each level of concurrency that many clients send one request after another, each a different
prompt, greedily and past any end token. TTFT is from sending the request to its first token, ITL between two
chunks of tokens of one stream, tokens per second over the whole level.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass

import httpx

from tests.harness.client import Stream, stream_completion
from tests.harness.pod import running_pod

PROMPT = "def function_{}(self, value):\n    "
WARM_UP_REQUESTS = 4


@dataclass(frozen=True)
class Level:
    """What one level of concurrency measured."""

    concurrency: int
    num_requests: int
    num_output_tokens: int
    tokens_per_s: float
    ttft_p50_ms: float
    ttft_p99_ms: float
    itl_p50_ms: float
    itl_p99_ms: float


async def timed(client: httpx.AsyncClient, number: int, max_tokens: int) -> list[float]:
    """Stream one completion; return the moments of its start and of each chunk of tokens, in ms."""
    moments = [time.monotonic() * 1000]

    num_seen = 0

    def note(stream: Stream) -> None:
        nonlocal num_seen
        if len(stream.token_ids) > num_seen:  # the last chunk may bring nothing but the reason of the end
            num_seen = len(stream.token_ids)
            moments.append(time.monotonic() * 1000)

    stream = await stream_completion(
        client, PROMPT.format(number), max_tokens=max_tokens, ignore_eos=True, on_tokens=note
    )
    if stream.error is not None or len(stream.token_ids) != max_tokens:
        raise RuntimeError(f"request {number}: {stream.error or f'{len(stream.token_ids)} tokens'}")
    return moments


async def measure(url: str, concurrency: int, num_requests: int, max_tokens: int) -> Level:
    """Run one level."""
    numbers = iter(range(num_requests))
    streams: list[list[float]] = []

    async def one_client(client: httpx.AsyncClient) -> None:
        for number in numbers:
            streams.append(await timed(client, number, max_tokens))

    limits = httpx.Limits(max_connections=concurrency)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:
        started = time.monotonic()
        await asyncio.gather(*(one_client(client) for _ in range(concurrency)))
        took_s = time.monotonic() - started
    ttft = percentiles([moments[1] - moments[0] for moments in streams])
    itl = percentiles([b - a for moments in streams for a, b in itertools.pairwise(moments[1:])])
    tokens = num_requests * max_tokens
    return Level(concurrency, num_requests, tokens, tokens / took_s, *ttft, *itl)


def percentiles(values: list[float]) -> tuple[float, float]:
    """Return the 50th and the 99th percentile."""
    if len(values) < 2:
        return (values[0], values[0]) if values else (0.0, 0.0)
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return cuts[49], cuts[98]


def main() -> int:
    """Start a pod and print one line for each level."""
    parser = argparse.ArgumentParser(description="throughput and latency of a default pod")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with running_pod(options.model) as pod:
        asyncio.run(measure(pod.url, 1, WARM_UP_REQUESTS, options.max_tokens))
        if not options.json:
            print("clients  requests  tokens/s  TTFT p50/p99 ms   ITL p50/p99 ms")
        for concurrency in options.concurrency:
            level = asyncio.run(measure(pod.url, concurrency, options.requests, options.max_tokens))
            print(json.dumps(asdict(level)) if options.json else row(level), flush=True)
    return 0


def row(level: Level) -> str:
    """Return a level as a line of the table."""
    ttft = f"{level.ttft_p50_ms:.1f} / {level.ttft_p99_ms:.1f}"
    itl = f"{level.itl_p50_ms:.2f} / {level.itl_p99_ms:.2f}"
    return f"{level.concurrency:7}  {level.num_requests:8}  {level.tokens_per_s:8.0f}  {ttft:>15}  {itl:>15}"


if __name__ == "__main__":
    sys.exit(main())
