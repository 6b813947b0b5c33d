"""Requests that are refused, and what the answer says of them."""

from __future__ import annotations

import pytest

from bus.config import GatewayConfig
from tests.harness.gateway_world import CHAT, TEXT, GatewayWorld


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("temperature", 3, "must be 0..2"),
        ("temperature", "hot", "Expected"),
        ("top_p", 0, "above 0"),
        ("top_k", -2, "must be at least -1"),
        ("n", 0, "must be 1..128"),
        ("max_tokens", 0, "must be at least 1"),
        ("max_tokens", 1.5, "Expected"),
        ("max_tokens", True, "Expected"),
        ("min_tokens", 51, "must be 0..50"),
        ("stop", ["x"] * 17, "at most 16"),
        ("stop", "", "characters"),
        ("stop_token_ids", [260], "0..259"),
        ("logprobs", 21, "must be 0..20"),
        ("best_of", 2, "must equal n"),
        ("suffix", "x", "not supported yet"),
        ("presence_penalty", 2.5, "must be -2..2"),
        ("frequency_penalty", -3, "must be -2..2"),
        ("repetition_penalty", 0, "must be 0.01..100"),
        ("min_p", 1.5, "must be 0..1"),
        ("logit_bias", {"260": 5}, "0..259"),
        ("logit_bias", {"x": 5}, "0..259"),
        ("logit_bias", {"-1": 5}, "0..259"),
        ("logit_bias", {"1": 101}, "must be -100..100"),
        ("logit_bias", {str(i): 1 for i in range(1025)}, "at most 1024"),
        ("prompt_logprobs", 21, "must be 0..20"),
        ("guided_regex", "(a", "cannot be used"),
        ("guided_regex", "", "must not be empty"),
        ("guided_choice", [], "must be 1..1000 texts"),
        ("guided_choice", ["a", ""], "none of them empty"),
        ("guided_grammar", "start: x", "cannot be used"),
        ("guided_json", "{", "cannot be used"),
        ("guided_json", {"type": "thing"}, "cannot be used"),
        ("stream_options", {"include_usage": True}, "needs stream"),
        ("seed", 1 << 64, "64 bits"),
        ("request_id", "a b", "must match"),
        ("prompt", [], "must not be empty"),
        ("prompt", ["a", 1], "mixture"),
        ("prompt", [300], "0..259"),
        ("prompt", "", "at least one"),
        ("prompt", 5, "Expected"),
        ("nonsense", 1, "unknown field"),
    ],
)
async def test_bad_fields(field: str, value: object, says: str) -> None:
    world = GatewayWorld().serve(1)
    response = await world.post("/v1/completions", {**TEXT, field: value})
    error = response.json()["error"]
    assert response.status_code == 400, response.text
    assert error["param"] == field
    assert says in error["message"] and "\n" not in error["message"]
    assert world.schedulers[0].sent == []


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
        ({"tools": [{"type": "function"}]}, "tools.function"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "f g"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}] * 2}, "tools[1].function.name"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "some"}, "tool_choice"),
        (
            {
                "tools": [{"type": "function", "function": {"name": "f"}}],
                "tool_choice": {"type": "function", "function": {"name": "g"}},
            },
            "tool_choice",
        ),
        (
            {
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "x"}}}],
                "tool_choice": "required",
            },
            "tool_choice",
        ),
        (
            {
                "tools": [{"type": "function", "function": {"name": "f"}}],
                "tool_choice": "required",
                "response_format": {"type": "json_object"},
            },
            "tool_choice",
        ),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"stream": True, "stream_options": {"foo": 1}}, "stream_options.foo"),
        ({"messages": [{"role": "user", "content": "x", "foo": 1}]}, "messages.foo"),
    ],
)
async def test_bad_chat_fields(more: dict[str, object], param: str) -> None:
    response = await GatewayWorld().serve(1).post("/v1/chat/completions", {**CHAT, **more})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


async def test_a_missing_field_is_named() -> None:
    response = await GatewayWorld().serve(1).post("/v1/completions", {"model": "tiny"})
    assert response.status_code == 400 and response.json()["error"]["param"] == "prompt"


async def test_beyond_the_window() -> None:
    world = GatewayWorld().serve(1)
    for prompt, max_tokens in (("a" * 200, 16), ("a" * 100, 101), ("a" * 300, None)):
        response = await world.post("/v1/completions", {"prompt": prompt, "max_tokens": max_tokens})
        assert response.status_code == 400
        assert response.json()["error"]["code"] == "context_length_exceeded"
    response = await world.post("/v1/completions", {"prompt": "a" * 190})
    assert response.json()["usage"]["completion_tokens"] <= 10


async def test_a_long_text_is_tokenised_beside_the_loop() -> None:
    response = await GatewayWorld().serve(1).post("/v1/completions", {"prompt": "a" * 20_000})
    assert "20000 in the prompt" in response.json()["error"]["message"]
    assert response.json()["error"]["param"] == "prompt"


async def test_template_errors_are_400() -> None:
    world = GatewayWorld(template="{{ raise_exception('no system please') }}").serve(1)
    response = await world.post("/v1/chat/completions", CHAT)
    assert response.status_code == 400 and "no system please" in response.json()["error"]["message"]


async def test_no_template_is_400() -> None:
    response = await GatewayWorld(template=None).serve(1).post("/v1/chat/completions", CHAT)
    assert response.status_code == 400 and response.json()["error"]["code"] == "no_chat_template"


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b'{"prompt": NaN}', b'"x"'])
async def test_malformed_json_is_400(body: bytes) -> None:
    response = await GatewayWorld().serve(1).client.post("/v1/completions", content=body)
    assert response.status_code == 400 and response.json()["error"]["message"]


async def test_unknown_model_path_and_method() -> None:
    world = GatewayWorld().serve(1)
    assert (await world.post("/v1/completions", {**TEXT, "model": "gpt"})).status_code == 404
    response = await world.client.get("/v1/nothing")
    assert response.status_code == 404 and response.json()["error"]["code"] == "not_found"
    response = await world.client.get("/v1/completions")
    assert response.status_code == 405 and response.headers["allow"] == "POST"
    assert (await world.client.get("/v1/models/gpt")).status_code == 404


async def test_body_limit() -> None:
    world = GatewayWorld(GatewayConfig(body_bytes_max=1024)).serve(1)
    assert (await world.post("/v1/completions", {"prompt": "a" * 2000})).status_code == 413

    async def chunks():  # type: ignore[no-untyped-def]
        for _ in range(20):
            yield b"x" * 100

    assert (await world.client.post("/v1/completions", content=chunks())).status_code == 413


async def test_keys() -> None:
    world = GatewayWorld(GatewayConfig(api_keys=("one", "two"))).serve(1)
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic one"}):
        response = await world.client.get("/v1/models", headers=headers)
        assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_api_key"
    response = await world.client.get("/v1/models", headers={"authorization": "Bearer two"})
    assert response.status_code == 200
    assert (await world.client.get("/health")).status_code == 200
