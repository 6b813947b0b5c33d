"""What is asked for, and when: traces, Poisson arrivals, and clients that ask one request after another.

A prompt is a list of token ids drawn from a seed, so that a pod computes exactly the lengths that a load names. Equal
blocks of a trace (`hash_ids`) become equal tokens: real shared prefixes.
"""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np

from bus.errors import ConfigError

FIRST_TOKEN_ID, END_TOKEN_ID = 3, 256  # ids that every served vocabulary has, special ones left out
TRACE_BLOCK_TOKENS = 512  # of Mooncake's `hash_ids`
TRACE_KINDS = ("mooncake", "azure")


@dataclass(frozen=True, slots=True)
class Request:
    """One request: due `at_s` seconds after the start (open loop), prompt token ids, output tokens."""

    at_s: float
    prompt: list[int]
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests in order of arrival.

    clients: 0 = open loop, each request starts when it is due; else that many clients take one after another.
    num_left_out: requests of a trace that do not fit the window.
    """

    requests: tuple[Request, ...]
    clients: int = 0
    num_left_out: int = 0


@dataclass(frozen=True, slots=True)
class Load:
    """A workload for each seed: equal in lengths and, for a trace, in times; different in content."""

    name: str
    make: Callable[[int], Workload]


@dataclass(frozen=True, slots=True)
class TraceRow:
    """A request of a trace, unscaled. `hash_ids`: one for each block of 512 prompt tokens, or none."""

    at_s: float
    prompt_tokens: int
    output_tokens: int
    hash_ids: tuple[int, ...] = ()


def closed_loop(clients: int, num_requests: int, prompt_tokens: int, output_tokens: int) -> Load:
    """`clients` clients share `num_requests` requests."""

    def make(seed: int) -> Workload:
        rng = np.random.default_rng([seed, clients])
        requests = [Request(0.0, _drawn(rng, prompt_tokens), output_tokens) for _ in range(num_requests)]
        return Workload(tuple(requests), clients)

    return Load(f"{_clients(clients)}, {prompt_tokens} -> {output_tokens} tokens", make)


def poisson(rate: float, num_requests: int, prompt_tokens: int, output_tokens: int) -> Load:
    """Requests at exponential intervals, `rate` per second on average."""

    def make(seed: int) -> Workload:
        times = np.cumsum(np.random.default_rng([seed, 1]).exponential(1 / rate, num_requests))
        rng = np.random.default_rng([seed, 2])
        requests = [Request(float(at_s), _drawn(rng, prompt_tokens), output_tokens) for at_s in times]
        return Workload(tuple(requests))

    return Load(f"{rate:g} requests/s, {prompt_tokens} -> {output_tokens} tokens", make)


def replay(
    kind: str, rows: Sequence[TraceRow], *, scale: float, speed: float, window: int, name: str = ""
) -> Load:
    """A trace with lengths times `scale`, times over `speed`; what does not fit `window` tokens is left out."""

    def make(seed: int) -> Workload:
        fitting = [(row, *_scaled(row, scale)) for row in rows]
        fitting = [(row, prompt, output) for row, prompt, output in fitting if prompt + output <= window]
        start_s = fitting[0][0].at_s if fitting else 0.0
        requests = tuple(
            Request((row.at_s - start_s) / speed, _content(row, number, prompt, scale, seed), output)
            for number, (row, prompt, output) in enumerate(fitting)
        )
        return Workload(requests, num_left_out=len(rows) - len(fitting))

    return Load(name or f"{kind} x {len(rows)}, lengths x {scale:g}, speed x {speed:g}", make)


def read_trace(kind: str, path: Path, num_rows: int) -> tuple[TraceRow, ...]:
    """Return the first `num_rows` requests of a trace. Raises ConfigError: no such file, or not this kind."""
    reader = _mooncake if kind == "mooncake" else _azure
    try:
        with path.open(encoding="utf-8", newline="") as lines:
            rows = tuple(itertools.islice(reader(lines), num_rows))
    except OSError as error:
        raise ConfigError(f"--trace {kind} {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"--trace {kind} {path}: not such a trace: {error!r}") from None
    if not rows:
        raise ConfigError(f"--trace {kind} {path}: holds no request")
    return rows


def fitting_scale(rows: Sequence[TraceRow], window: int) -> float:
    """Return the largest 1 / 2^n at which 99 % of the requests fit `window` tokens; it keeps blocks aligned."""
    total = float(np.percentile([row.prompt_tokens + row.output_tokens for row in rows], 99))
    scale = 1.0
    while total * scale > window:
        scale /= 2
    return scale


def ideal_cached_tokens(workload: Workload, block_tokens: int) -> list[int]:
    """Return for each request the prompt tokens that an infinite cache holds when it arrives.

    Twin of no code in the pod: prompts are compared block by block, in order of arrival, each complete at once. The
    last token of a prompt is always computed.
    """
    seen: set[tuple[int, bytes]] = set()
    found = []
    for request in workload.requests:
        blocks = _chain(request.prompt, block_tokens)
        limit = (len(request.prompt) - 1) // block_tokens
        hits = itertools.takewhile(lambda block: block in seen, blocks[:limit])
        found.append(block_tokens * sum(1 for _ in hits))
        seen.update(blocks)
    return found


def _chain(prompt: list[int], block_tokens: int) -> list[tuple[int, bytes]]:
    """Return a key for each full block, which covers all that precedes it."""
    tokens, parent, keys = np.asarray(prompt, np.int32), 0, []
    for end in range(block_tokens, len(prompt) + 1, block_tokens):
        key = (parent, tokens[end - block_tokens : end].tobytes())
        keys.append(key)
        parent = hash(key)
    return keys


def _mooncake(lines: Iterator[str]) -> Iterator[TraceRow]:
    for line in lines:
        row = json.loads(line)
        yield TraceRow(
            row["timestamp"] / 1000, row["input_length"], row["output_length"], tuple(row["hash_ids"])
        )


def _azure(lines: Iterator[str]) -> Iterator[TraceRow]:
    start: datetime | None = None
    for row in csv.DictReader(lines):
        at = datetime.fromisoformat(row["TIMESTAMP"][:26])  # the seventh digit is no microsecond
        start = start or at
        yield TraceRow((at - start).total_seconds(), int(row["ContextTokens"]), int(row["GeneratedTokens"]))


def _scaled(row: TraceRow, scale: float) -> tuple[int, int]:
    return max(1, round(row.prompt_tokens * scale)), max(1, round(row.output_tokens * scale))


def _content(row: TraceRow, number: int, num_tokens: int, scale: float, seed: int) -> list[int]:
    """Return the prompt: each block's tokens depend on its id alone, on the row's number where there are no ids."""
    if not row.hash_ids:
        return _drawn(np.random.default_rng([seed, 3, number]), num_tokens)
    block = max(1, round(TRACE_BLOCK_TOKENS * scale))
    tokens: list[int] = []
    for hash_id in row.hash_ids:
        tokens += _drawn(np.random.default_rng([seed, 4, hash_id]), block)
    rest = num_tokens - len(tokens)  # rounding of the scale
    return tokens[:num_tokens] + _drawn(np.random.default_rng([seed, 5, number]), max(0, rest))


def _drawn(rng: np.random.Generator, num_tokens: int) -> list[int]:
    drawn: list[int] = rng.integers(FIRST_TOKEN_ID, END_TOKEN_ID, num_tokens).tolist()
    return drawn


def _clients(count: int) -> str:
    return f"{count} client{'s' if count > 1 else ''}"
