"""HTTP plumbing: bounded bodies, clients that go away, event streams, JSON."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from typing import TypeVar

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gateway.errors import ApiError

_BODY_TIMEOUT_S = 60

Result = TypeVar("Result")


class ClientGone(Exception):
    """The client closed its connection before the answer was complete."""


class Json(Response):
    """A JSON body by orjson."""

    media_type = "application/json"

    def render(self, content: object) -> bytes:
        """Return the bytes."""
        return orjson.dumps(content)


def error_response(error: ApiError) -> Response:
    """Return the error in OpenAI's shape."""
    return Json(error.body(), status_code=error.status, headers=error.headers)


async def read_body(request: Request, bytes_max: int) -> bytes:
    """Return the whole body.

    Raises:
        ApiError: 413, as soon as the announced or the received length is beyond `bytes_max`; 408, when
        the body
            does not come.
        ClientGone: the client left while sending.
    """
    try:
        async with asyncio.timeout(_BODY_TIMEOUT_S):
            return await _read_body(request, bytes_max)
    except TimeoutError:
        text = f"the body did not arrive within {_BODY_TIMEOUT_S} s"
        raise ApiError(408, "body_timeout", text) from None


async def _read_body(request: Request, bytes_max: int) -> bytes:
    too_large = ApiError(413, "body_too_large", f"the body is larger than {bytes_max} bytes")
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced) > bytes_max:
        raise too_large
    parts: list[bytes] = []
    num_bytes = 0
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        part: bytes = message.get("body", b"")
        num_bytes += len(part)
        if num_bytes > bytes_max:
            raise too_large
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)


async def unless_client_leaves(receive: Receive, work: Coroutine[object, object, Result]) -> Result:
    """Do `work` while watching the connection. The body must have been read.

    Raises:
        ClientGone: the client left first; `work` was cancelled and has ended.
    """
    worker = asyncio.ensure_future(work)
    watcher = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({worker, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if worker.done():
            return worker.result()
        raise ClientGone
    finally:
        worker.cancel()
        watcher.cancel()
        await asyncio.gather(worker, watcher, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events. Every event leaves at once; `on_close` runs whatever happens.

    An `ApiError` of the source becomes an event in OpenAI's shape; `[DONE]` ends the stream either way.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        source: AsyncIterator[Mapping[str, object]],
        on_close: Callable[[], None],
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self._source = source
        self._on_close = on_close
        self.status_code = 200
        self.background = None
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no", **(headers or {})})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream; stop when the client leaves."""
        try:
            await unless_client_leaves(receive, self._run(send))
        except ClientGone:
            pass
        finally:
            self._on_close()

    async def _run(self, send: Send) -> None:
        headers = [(name, value) for name, value in self.raw_headers if name != b"content-length"]
        await send({"type": "http.response.start", "status": self.status_code, "headers": headers})
        try:
            async for event in self._source:
                await _send_event(send, orjson.dumps(event))
        except ApiError as error:
            await _send_event(send, orjson.dumps(error.body()))
        await _send_event(send, b"[DONE]")
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _send_event(send: Send, data: bytes) -> None:
    await send({"type": "http.response.body", "body": b"data: " + data + b"\n\n", "more_body": True})
