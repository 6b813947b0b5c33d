"""Streams token ids from a gateway, for comparison with the oracle."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx


@dataclass
class Stream:
    """What one streamed completion has brought so far."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    error: dict[str, Any] | None = None
    logprobs: list[float] = field(default_factory=list)
    done: bool = False


async def stream_completion(
    client: httpx.AsyncClient,
    prompt: Sequence[int] | str,
    *,
    max_tokens: int,
    on_tokens: Callable[[Stream], None] = lambda stream: None,
    **fields: Any,
) -> Stream:
    """Stream `/v1/completions` with token ids; greedy unless `temperature` is given."""
    body = {
        "prompt": prompt if isinstance(prompt, str) else list(prompt),
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "return_token_ids": True,
        **fields,
    }
    stream = Stream()
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            stream.error = json.loads(await response.aread())["error"]
            return stream
        async for line in response.aiter_lines():
            if not line.startswith("data: "):
                continue
            if line == "data: [DONE]":
                stream.done = True
                break
            _absorb(stream, json.loads(line[6:]))
            on_tokens(stream)
    return stream


def _absorb(stream: Stream, chunk: dict[str, Any]) -> None:
    if "error" in chunk:
        stream.error = chunk["error"]
        return
    for choice in chunk.get("choices", []):
        stream.token_ids += choice.get("token_ids") or []
        stream.text += choice.get("text") or ""
        stream.finish_reason = choice.get("finish_reason") or stream.finish_reason
        if choice.get("logprobs"):
            stream.logprobs += choice["logprobs"]["token_logprobs"]
