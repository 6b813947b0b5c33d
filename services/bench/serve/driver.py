"""Plays a workload to a gateway."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

from services.bench.serve.client import Client, Outcome
from services.bench.serve.workload import Request, Workload


async def play(client: Client, workload: Workload) -> list[Outcome]:
    """Return an outcome for each request, in order of arrival."""
    start_s = time.monotonic()
    if not workload.clients:
        return await asyncio.gather(*(_at(client, request, start_s) for request in workload.requests))
    outcomes: dict[int, Outcome] = {}
    numbered = iter(enumerate(workload.requests))
    await asyncio.gather(*(_one_client(client, numbered, outcomes) for _ in range(workload.clients)))
    return [outcomes[number] for number in range(len(workload.requests))]


async def play_until(
    client: Client, requests: Iterator[Request], clients: int, stop: asyncio.Event
) -> list[Outcome]:
    """Have `clients` clients ask one request after another; none starts once `stop` is set."""
    outcomes: list[Outcome] = []

    async def one() -> None:
        while not stop.is_set():
            outcomes.append(await client.stream(next(requests), time.monotonic()))

    await asyncio.gather(*(one() for _ in range(clients)))
    return outcomes


async def _at(client: Client, request: Request, start_s: float) -> Outcome:
    due_s = start_s + request.at_s
    await asyncio.sleep(max(0.0, due_s - time.monotonic()))
    return await client.stream(request, due_s)


async def _one_client(
    client: Client, numbered: Iterator[tuple[int, Request]], outcomes: dict[int, Outcome]
) -> None:
    for number, request in numbered:
        outcomes[number] = await client.stream(request, time.monotonic())
