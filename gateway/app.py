"""The HTTP application: routes, and the endpoints that need no scheduler."""

from __future__ import annotations

import time
from importlib import metadata

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from gateway import metrics, prompts, schemas
from gateway.completions import Api, create_chat_completion, create_completion
from gateway.errors import ApiError, invalid
from gateway.guard import Guard
from gateway.parameters import check_token_ids
from gateway.schemas import DetokenizeBody, TokenizeBody
from gateway.transport import ClientGone, Json, error_response, read_body

_STARTED_S = int(time.time())


def build(api: Api) -> ASGIApp:
    """Return the ASGI application."""
    routes = [
        Route("/v1/completions", create_completion, methods=["POST"]),
        Route("/v1/chat/completions", create_chat_completion, methods=["POST"]),
        Route("/v1/models", list_models, methods=["GET"]),
        Route("/v1/models/{model:path}", get_model, methods=["GET"]),
        Route("/tokenize", tokenize, methods=["POST"]),
        Route("/detokenize", detokenize, methods=["POST"]),
        Route("/health", health, methods=["GET"]),
        Route("/ping", ping, methods=["GET", "POST"]),
        Route("/version", version, methods=["GET"]),
        Route("/metrics", show_metrics, methods=["GET"]),
        Route("/", root, methods=["GET"]),
    ]
    app = Starlette(
        routes=routes,
        exception_handlers={
            ApiError: _on_api_error,
            ClientGone: _on_client_gone,
            HTTPException: _on_http_error,
        },
    )
    app.router.redirect_slashes = False
    app.state.api = api
    return Guard(app, api.config.api_keys)


async def list_models(request: Request) -> Response:
    """`GET /v1/models`."""
    return Json({"object": "list", "data": [_model_card(request.app.state.api)]})


async def get_model(request: Request) -> Response:
    """`GET /v1/models/{model}`."""
    api: Api = request.app.state.api
    api.check_model(request.path_params["model"])
    return Json(_model_card(api))


def _model_card(api: Api) -> dict[str, object]:
    return {
        "id": api.checkpoint.name,
        "object": "model",
        "created": _STARTED_S,
        "owned_by": "xdeepserve",
        "root": api.checkpoint.name,
        "parent": None,
        "max_model_len": api.checkpoint.window_tokens,
    }


async def tokenize(request: Request) -> Response:
    """`POST /tokenize`."""
    api: Api = request.app.state.api
    body = schemas.decode(await read_body(request, api.config.body_bytes_max), TokenizeBody)
    api.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise invalid("prompt", body.prompt, "send either prompt or messages")
    if body.messages is not None:
        found = await prompts.chat_prompt(
            body.messages,
            api.checkpoint,
            add_generation_prompt=body.add_generation_prompt is not False,
            template_kwargs=body.chat_template_kwargs,
        )
        token_ids = list(found.token_ids)
    else:
        special = body.add_special_tokens is not False
        token_ids = await prompts.encode(api.checkpoint, body.prompt or "", add_special_tokens=special)
    strings = [api.checkpoint.tokenizer.token_text(token_id) for token_id in token_ids]
    return Json(
        {
            "count": len(token_ids),
            "max_model_len": api.checkpoint.window_tokens,
            "tokens": token_ids,
            "token_strs": strings if body.return_token_strs else None,
        }
    )


async def detokenize(request: Request) -> Response:
    """`POST /detokenize`."""
    api: Api = request.app.state.api
    body = schemas.decode(await read_body(request, api.config.body_bytes_max), DetokenizeBody)
    api.check_model(body.model)
    check_token_ids("tokens", body.tokens, api.checkpoint.vocab_size)
    return Json({"prompt": api.checkpoint.tokenizer.decode(body.tokens, skip_special_tokens=False)})


async def health(request: Request) -> Response:
    """`GET /health`: 200 only when a request can be served."""
    api: Api = request.app.state.api
    serving = api.pod_map().serving_dp_groups
    if api.is_stopping():
        return Json({"status": "stopping", "reason": "the gateway is stopping"}, status_code=503)
    if not serving:
        return Json({"status": "unavailable", "reason": _why_not_serving(api)}, status_code=503)
    return Json({"status": "ok", "serving_dp_groups": list(serving)})


def _why_not_serving(api: Api) -> str:
    pod_map = api.pod_map()
    if not pod_map.epoch:
        return "no pod map yet: the manager has not been heard"
    absent = [
        f"{member.service}-{member.index} is {member.state}"
        for member in pod_map.members
        if member.state != "ready"
    ]
    return "no DP group serves: " + (", ".join(absent) or "members are missing")


async def ping(_request: Request) -> Response:
    """`GET /ping`: the gateway's loop turns."""
    return Response(status_code=200)


async def version(_request: Request) -> Response:
    """`GET /version`."""
    return Json({"version": _version()})


async def show_metrics(request: Request) -> Response:
    """`GET /metrics`."""
    api: Api = request.app.state.api
    text = api.metrics.text(api.core, await api.fresh_status())
    return Response(text, headers={"content-type": metrics.CONTENT_TYPE})


async def root(request: Request) -> Response:
    """`GET /`: where things are."""
    api: Api = request.app.state.api
    app: Starlette = request.app
    paths = [route.path for route in app.routes if isinstance(route, Route) and route.path != "/"]
    return Json(
        {"name": "xDeepServe", "version": _version(), "model": api.checkpoint.name, "endpoints": paths}
    )


def _version() -> str:
    try:
        return metadata.version("xdeepserve")
    except metadata.PackageNotFoundError:
        return "unknown"


async def _on_api_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(error)


async def _on_client_gone(_request: Request, _error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    codes = {404: "not_found", 405: "method_not_allowed"}
    text = f"{request.method} {request.url.path}: {error.detail}"
    response = error_response(ApiError(error.status_code, codes.get(error.status_code, "http_error"), text))
    response.headers.update(error.headers or {})
    return response
