"""The load generator against a small HTTP server of this test: streams, refusals, breaks, both loops."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from services.bench.serve.client import Client
from services.bench.serve.driver import play, play_until
from services.bench.serve.workload import Request, Workload

Answer = Callable[[dict[str, object], asyncio.StreamWriter], Awaitable[None]]
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def event(payload: object) -> bytes:
    return f"data: {payload if isinstance(payload, str) else json.dumps(payload)}\n\n".encode()


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def tokens(*ids: int) -> bytes:
    return event({"choices": [{"token_ids": list(ids)}]})


USAGE = event({"choices": [], "usage": {"prompt_tokens": 5, "prompt_tokens_details": {"cached_tokens": 4}}})


@contextlib.asynccontextmanager
async def serving(answer: Answer) -> AsyncIterator[Client]:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(
            int(line.split(b": ")[1]) for line in head.split(b"\r\n") if line.startswith(b"Content-Length")
        )
        await answer(json.loads(await reader.readexactly(length)), writer)
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server:
        yield Client(f"http://127.0.0.1:{port}", model="m")


async def test_chunks_are_counted_and_timed_wherever_the_stream_is_cut() -> None:
    whole = (
        tokens(1) + tokens(2, 3) + event({"choices": [{"finish_reason": "length"}]}) + USAGE + event("[DONE]")
    )
    seen: list[dict[str, object]] = []

    async def answer(body: dict[str, object], writer: asyncio.StreamWriter) -> None:
        seen.append(body)
        writer.write(HEAD + b"".join(chunk(whole[i : i + 7]) for i in range(0, len(whole), 7)) + chunk(b""))

    async with serving(answer) as client:
        outcome = await client.stream(Request(0.0, [9, 8, 7, 6, 5], 3), 100.0)
    assert outcome.error == ""
    assert outcome.chunk_tokens == [1, 2]
    assert outcome.chunks_s == sorted(outcome.chunks_s)
    assert outcome.sent_s <= outcome.chunks_s[0] <= outcome.end_s
    assert (outcome.num_prompt_tokens, outcome.num_cached_tokens) == (5, 4)
    assert outcome.ttft_s == outcome.chunks_s[0] - 100.0
    assert outcome.tpot_s == (outcome.chunks_s[1] - outcome.chunks_s[0]) / 2
    assert (seen[0]["prompt"], seen[0]["max_tokens"], seen[0]["ignore_eos"]) == ([9, 8, 7, 6, 5], 3, True)


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (HEAD + chunk(tokens(1)) + chunk(b""), "1 tokens instead of 3"),
        (HEAD + chunk(tokens(1)), "IncompleteReadError"),
        (HEAD + chunk(event({"error": {"message": "gone"}})) + chunk(b""), "gone"),
        (b"HTTP/1.1 429 Too Many\r\nContent-Length: 4\r\n\r\nfull", "HTTP 429: full"),
        (b"", "IncompleteReadError"),
    ],
)
async def test_what_goes_wrong_is_in_the_outcome(reply: bytes, error: str) -> None:
    async def answer(_: dict[str, object], writer: asyncio.StreamWriter) -> None:
        writer.write(reply)

    async with serving(answer) as client:
        outcome = await client.stream(Request(0.0, [9], 3), 0.0)
    assert error in outcome.error


async def test_a_closed_loop_never_has_more_requests_under_way_than_clients() -> None:
    under_way, most = 0, 0

    async def answer(_: dict[str, object], writer: asyncio.StreamWriter) -> None:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0)  # others may come meanwhile
        under_way -= 1
        writer.write(HEAD + chunk(tokens(1)) + chunk(b""))

    async with serving(answer) as client:
        outcomes = await play(client, Workload(tuple(Request(0.0, [9], 1) for _ in range(12)), clients=3))
    assert len(outcomes) == 12
    assert not any(outcome.error for outcome in outcomes)
    assert 1 <= most <= 3


async def test_an_open_loop_starts_requests_when_they_are_due_even_if_none_has_ended() -> None:
    arrived: list[object] = []
    all_there = asyncio.Event()

    async def answer(body: dict[str, object], writer: asyncio.StreamWriter) -> None:
        arrived.append(body["prompt"])
        if len(arrived) == 3:
            all_there.set()
        await all_there.wait()
        writer.write(HEAD + chunk(tokens(1)) + chunk(b""))

    requests = tuple(Request(at_s, [number], 1) for number, at_s in enumerate((0.0, 0.02, 0.04)))
    async with serving(answer) as client, asyncio.timeout(10):
        outcomes = await play(client, Workload(requests))
    assert arrived == [[0], [1], [2]]
    assert [round(outcome.due_s - outcomes[0].due_s, 6) for outcome in outcomes] == [0.0, 0.02, 0.04]
    assert all(outcome.sent_s >= outcome.due_s for outcome in outcomes)


async def test_clients_stop_between_requests() -> None:
    stop = asyncio.Event()
    count = 0

    async def answer(_: dict[str, object], writer: asyncio.StreamWriter) -> None:
        nonlocal count
        count += 1
        if count == 5:
            stop.set()
        writer.write(HEAD + chunk(tokens(1)) + chunk(b""))

    endless = iter(lambda: Request(0.0, [9], 1), None)
    async with serving(answer) as client, asyncio.timeout(10):
        outcomes = await play_until(client, endless, 2, stop)
    assert len(outcomes) == count in (5, 6)
    assert not any(outcome.error for outcome in outcomes)
