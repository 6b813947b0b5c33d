"""Streams whose scheduler dies, whose client leaves, or whose client does not read."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from bus.config import GatewayConfig
from bus.control.messages import RequestFailed
from tests.harness.gateway_world import END, GatewayWorld, sse_events
from tests.harness.poll import async_eventually

BODY = {"prompt": "ab", "max_tokens": 50, "stream": True}


class Connection:
    """One raw ASGI exchange: the test decides when the client reads and when it leaves."""

    def __init__(self, world: GatewayWorld, body: dict[str, Any], path: str = "/v1/completions") -> None:
        self.sent: list[dict[str, Any]] = []
        self.left = asyncio.Event()
        self.may_read = asyncio.Event()
        self.may_read.set()
        self._body: bytes | None = json.dumps(body).encode()
        scope = {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1",
            "method": "POST", "path": path, "raw_path": path.encode(), "root_path": "", "scheme": "http",
            "query_string": b"", "headers": [(b"host", b"test")], "client": ("test", 1), "server": ("test", 80),
        }  # fmt: skip
        self.task = asyncio.ensure_future(world.app(scope, self._receive, self._send))  # type: ignore[arg-type]

    @property
    def text(self) -> str:
        return b"".join(message.get("body", b"") for message in self.sent).decode()

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"]) if self.sent else 0

    async def _receive(self) -> dict[str, Any]:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        await self.may_read.wait()
        self.sent.append(message)


async def until(predicate: Any) -> None:
    await async_eventually(predicate, timeout_s=5, interval_s=0.001)


def text_of(connection: Connection) -> str:
    return "".join(event["choices"][0]["text"] for event in sse_events(connection.text))


async def test_the_scheduler_dies_in_mid_stream_and_the_text_goes_on() -> None:
    world = GatewayWorld().serve(1, 1, hold=True)
    connection = Connection(world, BODY)
    first, second = world.schedulers[0], world.schedulers[1]
    await until(lambda: first.adds())
    add = first.adds()[0]
    first.say(first.answers(add)[0])
    await until(lambda: "hel" in connection.text)
    second.hold = False
    world.serve(-1, 1)
    await connection.task
    assert text_of(connection) == "hello world"
    again = second.adds()[0]
    assert (again.attempt, bytes(again.output_token_ids)) == (1, b"hel")
    assert again.sampling == add.sampling
    assert first.closed


async def test_a_manager_that_restarts_and_knows_nobody_yet_changes_nothing() -> None:
    world = GatewayWorld().serve(1, hold=True)
    connection = Connection(world, BODY)
    scheduler = world.schedulers[0]
    await until(lambda: scheduler.adds())
    world.serve()  # a map without members
    assert not scheduler.closed
    for message in scheduler.answers(scheduler.adds()[0]):
        scheduler.say(message)
    await connection.task
    assert text_of(connection) == "hello world"


async def test_a_new_incarnation_gets_a_new_link_and_the_old_ones_words_are_not_heard() -> None:
    world = GatewayWorld().serve(1, hold=True)
    connection = Connection(world, BODY)
    old = world.schedulers[0]
    await until(lambda: old.adds())
    world.serve(2, hold=True)
    new = world.schedulers[0]
    assert new is not old and old.closed
    old.listen(old.answers(old.adds()[0])[0])  # still in the pipe of the old link
    assert world.core.counters.stale_messages == 0 and "hel" not in connection.text
    for message in new.answers(new.adds()[0]):
        new.say(message)
    await connection.task
    assert text_of(connection) == "hello world"


async def test_a_client_that_leaves_a_stream_frees_its_request_at_once() -> None:
    world = GatewayWorld().serve(1, hold=True)
    connection = Connection(world, {**BODY, "n": 2})
    scheduler = world.schedulers[0]
    await until(lambda: connection.status == 200)
    connection.left.set()
    await connection.task
    assert len(scheduler.aborts()) == 2 and world.core.num_jobs() == 0


async def test_a_client_that_leaves_a_waiting_request_frees_it_at_once() -> None:
    world = GatewayWorld().serve(1, hold=True)
    connection = Connection(world, {**BODY, "stream": False})
    scheduler = world.schedulers[0]
    await until(lambda: scheduler.adds())
    connection.left.set()
    await connection.task
    assert len(scheduler.aborts()) == 1 and world.core.num_jobs() == 0


async def test_a_client_that_leaves_before_anybody_serves() -> None:
    world = GatewayWorld()
    connection = Connection(world, BODY)
    await until(lambda: world.core.num_jobs() == 1)
    connection.left.set()
    await connection.task
    assert world.core.num_jobs() == 0 and connection.status == 499


async def test_a_slow_client_holds_up_nobody_and_is_ended() -> None:
    world = GatewayWorld(GatewayConfig(backlog_tokens_max=10)).serve(1, hold=True)
    slow = Connection(world, BODY)
    scheduler = world.schedulers[0]
    await until(lambda: slow.status == 200)
    slow.may_read.clear()
    for message in scheduler.answers(scheduler.adds()[0])[:1]:
        scheduler.say(message)
    await asyncio.sleep(0)
    scheduler.output = b"x" * 40
    for message in scheduler.answers(scheduler.adds()[0])[1:]:
        scheduler.say(message)
    assert len(scheduler.aborts()) >= 1 and world.core.num_jobs() == 0
    scheduler.hold, scheduler.output = False, b"hello"
    other = Connection(world, BODY)
    await other.task
    assert text_of(other) == "hello"
    slow.may_read.set()
    await slow.task
    events = sse_events(slow.text)
    assert events[-1]["error"]["code"] == "client_too_slow"


async def test_an_error_in_mid_stream_is_an_event_and_ends_the_stream() -> None:
    world = GatewayWorld(GatewayConfig(retry_window_ms=30)).serve(1, hold=True)
    connection = Connection(world, BODY)
    scheduler = world.schedulers[0]
    await until(lambda: scheduler.adds())
    scheduler.say(scheduler.answers(scheduler.adds()[0])[0])
    world.serve(-1)
    await connection.task
    events = sse_events(connection.text)
    assert events[0]["choices"][0]["text"] == "hel"
    assert events[-1]["error"]["code"] == "no_serving_group"


async def test_one_choice_that_fails_ends_the_others() -> None:
    world = GatewayWorld().serve(1, hold=True)
    connection = Connection(world, {**BODY, "n": 2})
    scheduler = world.schedulers[0]
    await until(lambda: connection.status == 200)
    first = scheduler.adds()[0]
    scheduler.say(RequestFailed(request_id=first.request_id, attempt=0, code="broken", message="it broke"))
    await connection.task
    assert sse_events(connection.text)[-1]["error"]["code"] == "broken"
    assert len(scheduler.aborts()) == 1 and world.core.num_jobs() == 0


async def test_stopping_ends_streams_with_an_error_event() -> None:
    world = GatewayWorld().serve(1, hold=True)
    connection = Connection(world, BODY)
    await until(lambda: connection.status == 200)
    world.dispatcher.end_all(503, "stopping", "the gateway is stopping")
    await connection.task
    await world.dispatcher.wait_idle()
    assert sse_events(connection.text)[-1]["error"]["code"] == "stopping"


async def test_every_chunk_leaves_alone_and_at_once() -> None:
    world = GatewayWorld().serve(1, hold=True)
    connection = Connection(world, BODY)
    scheduler = world.schedulers[0]
    await until(lambda: connection.status == 200)
    for n, message in enumerate(scheduler.answers(scheduler.adds()[0])):
        scheduler.say(message)
        await until(lambda n=n: len(connection.sent) > n + 1)
    await connection.task
    assert all(message["body"].count(b"data: ") <= 1 for message in connection.sent[1:])


async def test_tokens_behind_a_stop_string_do_not_exist() -> None:
    world = GatewayWorld().serve(1, tokens_per_message=100)
    connection = Connection(world, {**BODY, "stop": "lo", "return_token_ids": True})
    await connection.task
    token_ids = [t for event in sse_events(connection.text) for t in event["choices"][0]["token_ids"]]
    assert bytes(token_ids) == b"hello" and END not in token_ids
