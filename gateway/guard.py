"""What every HTTP request passes first: its id, its key, and a net for errors."""

from __future__ import annotations

import hmac
import re
import uuid
from collections.abc import Sequence

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.errors import ApiError
from gateway.transport import ClientGone, error_response

_OPEN_PATHS = frozenset({"/", "/health", "/ping", "/version", "/metrics"})
_GIVEN_ID = re.compile(r"[\x21-\x7e]{1,128}")

log = structlog.get_logger(__name__)


class Guard:
    """ASGI middleware around the whole application."""

    def __init__(self, app: ASGIApp, api_keys: Sequence[str]) -> None:
        self._app = app
        self._api_keys = [key.encode() for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request; answer errors in OpenAI's shape."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _GIVEN_ID.fullmatch(given) else uuid.uuid4().hex
        has_started = False

        async def send_with_id(message: Message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            self._check_key(scope["path"], headers.get("authorization", ""))
            await self._app(scope, receive, send_with_id)
        except ClientGone:
            log.debug("client left", path=scope["path"], x_request_id=request_id)
        except ApiError as error:
            await error_response(error)(scope, receive, send_with_id)
        except Exception:
            log.exception("request failed", path=scope["path"], x_request_id=request_id)
            if has_started:
                raise  # the connection is closed: a broken answer must not look complete
            failure = ApiError(500, "internal_error", f"internal error; x-request-id {request_id}")
            await error_response(failure)(scope, receive, send_with_id)

    def _check_key(self, path: str, authorization: str) -> None:
        if not self._api_keys or path in _OPEN_PATHS:
            return
        scheme, _, key = authorization.partition(" ")
        given = key.strip().encode()
        # All keys are compared, in constant time each, so that timing tells nothing.
        matches = [hmac.compare_digest(given, known) for known in self._api_keys]
        if scheme.lower() != "bearer" or not any(matches):
            raise ApiError(401, "invalid_api_key", "the API key is missing or wrong")
