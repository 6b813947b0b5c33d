"""One streamed completion over HTTP, with the moment of each chunk of tokens. Raw asyncio.

The generator runs beside the pod, so it must cost little. CPU of 64 streamed requests of 64 tokens, 4 at a time, on two
cores of a Xeon, where the pod itself needs 13 s: this file 0.28 s; the same over httpx 0.81 s; aiperf 0.13 14 s in 9
processes (142 packages, 1.2 GB), of which 8 s are its start, so at 460 tokens/s it takes 0.7 of a core from the pod.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import orjson

from services.bench.serve.workload import Request

TIMEOUT_S = 300.0
LINE_BYTES_MAX = 1 << 24  # the first event of a stream holds the prompt's token ids
EVENT_PREFIX = b"data: "


@dataclass(slots=True)
class Outcome:
    """What one request brought. Times are monotonic seconds.

    due_s: when it had to start; chunks_s and chunk_tokens: arrival and token count of each chunk that brought tokens.
    """

    due_s: float
    sent_s: float = 0.0
    end_s: float = 0.0
    chunks_s: list[float] = field(default_factory=list)
    chunk_tokens: list[int] = field(default_factory=list)
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    error: str = ""

    @property
    def num_output_tokens(self) -> int:
        """Tokens that arrived."""
        return sum(self.chunk_tokens)

    @property
    def ttft_s(self) -> float:
        """From when it was due to its first token."""
        return self.chunks_s[0] - self.due_s

    @property
    def tpot_s(self) -> float:
        """Mean time per token after the first chunk; 0 when there is only one."""
        later = sum(self.chunk_tokens[1:])
        return (self.chunks_s[-1] - self.chunks_s[0]) / later if later else 0.0


class Client:
    """Sends requests to one gateway; each has a connection of its own, as different users have."""

    def __init__(self, url: str, *, model: str, api_key: str = "") -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "127.0.0.1", parts.port or 80
        self._model = model
        key = f"Authorization: Bearer {api_key}\r\n" if api_key else ""
        self._head = f"Host: {self._host}:{self._port}\r\n{key}Connection: close\r\n"

    async def stream(self, request: Request, due_s: float) -> Outcome:
        """Send `request` now and read its stream to the end; failures are in `Outcome.error`."""
        outcome = Outcome(due_s, sent_s=time.monotonic())
        try:
            async with asyncio.timeout(TIMEOUT_S):
                async for event in self._events(request):
                    _absorb(outcome, event)
        except (OSError, EOFError, ValueError) as error:  # TimeoutError is an OSError
            outcome.error = f"{type(error).__name__}: {error}"
        outcome.end_s = time.monotonic()
        if not outcome.error and outcome.num_output_tokens != request.output_tokens:
            outcome.error = f"{outcome.num_output_tokens} tokens instead of {request.output_tokens}"
        return outcome

    async def get(self, path: str) -> bytes:
        """Return the body of a plain GET. Raises ValueError for any status but 200, OSError."""
        reader, writer = await asyncio.open_connection(self._host, self._port)
        try:
            writer.write(f"GET {path} HTTP/1.1\r\n{self._head}\r\n".encode())
            return b"".join([part async for part in _body(reader)])
        finally:
            writer.close()

    async def _events(self, request: Request) -> AsyncIterator[bytes]:
        """Yield the payload of each server-sent event but the last, [DONE]."""
        reader, writer = await asyncio.open_connection(self._host, self._port, limit=LINE_BYTES_MAX)
        try:
            writer.write(self._post(request))
            rest = b""
            async for part in _body(reader):
                *lines, rest = (rest + part).split(b"\n")
                for line in lines:
                    if line.startswith(EVENT_PREFIX) and not line.endswith(b"[DONE]"):
                        yield line[len(EVENT_PREFIX) :]
        finally:
            writer.close()

    def _post(self, request: Request) -> bytes:
        body = orjson.dumps(
            {
                "model": self._model,
                "prompt": request.prompt,
                "max_tokens": request.output_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
                "return_token_ids": True,
            }
        )
        head = f"POST /v1/completions HTTP/1.1\r\n{self._head}Content-Type: application/json\r\n"
        return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


async def _body(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """Yield the parts of a response's body as they arrive. Raises ValueError: the status is not 200; EOFError."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    status = int(head.split(" ", 2)[1])
    fields = dict(line.lower().split(": ", 1) for line in head.split("\r\n")[1:] if ": " in line)
    if fields.get("transfer-encoding") != "chunked":
        body = await reader.readexactly(int(fields.get("content-length", "0")))
        _require_ok(status, body)
        yield body
        return
    while length := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
        part = (await reader.readexactly(length + 2))[:-2]
        _require_ok(status, part)
        yield part


def _require_ok(status: int, body: bytes) -> None:
    if status != 200:
        raise ValueError(f"HTTP {status}: {body[:500].decode(errors='replace')}")


def _absorb(outcome: Outcome, event: bytes) -> None:
    now_s = time.monotonic()
    chunk: dict[str, Any] = orjson.loads(event)
    if "error" in chunk:
        outcome.error = json.dumps(chunk["error"])
        return
    count = sum(len(choice.get("token_ids") or ()) for choice in chunk.get("choices", ()))
    if count:
        outcome.chunks_s.append(now_s)
        outcome.chunk_tokens.append(count)
    if usage := chunk.get("usage"):
        outcome.num_prompt_tokens = usage["prompt_tokens"]
        outcome.num_cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
