"""The HTTP surface over fake schedulers: what they answer, health, metrics, and the small paths."""

from __future__ import annotations

import asyncio

from bus.config import GatewayConfig
from tests.harness.gateway_world import CHAT, END, TEXT, WINDOW_TOKENS, GatewayWorld

# --------------------------------------------------------------------------- schedulers


async def test_queue_full_is_429_also_for_a_stream() -> None:
    world = GatewayWorld().serve(1, 1, reject="queue_full")
    for stream in (False, True):
        response = await world.post("/v1/completions", {**TEXT, "stream": stream, "n": 2})
        assert response.status_code == 429 and response.headers["retry-after"] == "1"
    assert world.core.num_jobs() == 0


async def test_too_long_is_400() -> None:
    world = GatewayWorld().serve(1, reject="too_long")
    response = await world.post("/v1/completions", TEXT)
    assert response.status_code == 400 and "scheduler says" in response.json()["error"]["message"]


async def test_no_group_in_time_is_503() -> None:
    world = GatewayWorld(GatewayConfig(retry_window_ms=20))
    response = await world.post("/v1/completions", TEXT)
    assert response.status_code == 503 and response.headers["retry-after"] == "1"


async def test_an_unreachable_scheduler_is_tried_again() -> None:
    world = GatewayWorld().serve(1, reachable=False)
    scheduler = world.schedulers[0]
    asyncio.get_running_loop().call_later(0.01, setattr, scheduler, "reachable", True)
    assert (await world.post("/v1/completions", TEXT)).status_code == 200


async def test_stopping_refuses_new_work() -> None:
    world = GatewayWorld().serve(1)
    world.is_stopping = True
    assert (await world.post("/v1/completions", TEXT)).status_code == 503
    assert (await world.client.get("/health")).status_code == 503


# --------------------------------------------------------------------------- the rest


async def test_models_tokenize_detokenize_version_root_ping() -> None:
    world = GatewayWorld().serve(1)
    model = (await world.client.get("/v1/models")).json()["data"][0]
    assert (model["id"], model["max_model_len"]) == ("tiny", WINDOW_TOKENS)
    assert (await world.client.get("/v1/models/tiny")).json()["id"] == "tiny"
    body = (await world.post("/tokenize", {"prompt": "ab", "return_token_strs": True})).json()
    assert (body["tokens"], body["count"], body["token_strs"]) == ([97, 98], 2, ["a", "b"])
    body = (
        await world.post("/tokenize", {"messages": CHAT["messages"], "add_generation_prompt": False})
    ).json()
    assert bytes(body["tokens"]) == b"<user>hi\n"
    assert (await world.post("/detokenize", {"tokens": [97, END]})).json() == {"prompt": "a<|end|>"}
    assert (await world.post("/detokenize", {"tokens": [999]})).status_code == 400
    assert (await world.post("/tokenize", {})).status_code == 400
    assert "version" in (await world.client.get("/version")).json()
    assert "/v1/completions" in (await world.client.get("/")).json()["endpoints"]
    assert (await world.client.get("/ping")).status_code == 200


async def test_health_needs_a_serving_group() -> None:
    world = GatewayWorld()
    response = await world.client.get("/health")
    assert response.status_code == 503 and "manager" in response.json()["reason"]
    world.serve(-1)
    response = await world.client.get("/health")
    assert response.status_code == 503 and "scheduler-0 is dead" in response.json()["reason"]
    world.serve(2)
    assert (await world.client.get("/health")).status_code == 200


async def test_metrics() -> None:
    world = GatewayWorld().serve(1)
    await world.post("/v1/completions", TEXT)
    text = (await world.client.get("/metrics")).text
    for line in (
        'vllm:generation_tokens_total{model_name="tiny"} 12.0',
        'vllm:prompt_tokens_total{model_name="tiny"} 2.0',
        'vllm:request_success_total{finished_reason="stop",model_name="tiny"} 1.0',
        'vllm:num_requests_running{engine="0",model_name="tiny"} 0.0',
        'vllm:time_to_first_token_seconds_count{model_name="tiny"} 1.0',
        'xds:num_steps{index="0",service="scheduler"} 5.0',
        'xds:member_ready{index="0",service="scheduler"} 1.0',
        "xds:redispatches_total 0.0",
    ):
        assert line in text


async def test_metrics_count_every_choice_and_usage_the_prompt_once() -> None:
    world = GatewayWorld().serve(1)
    body = (await world.post("/v1/completions", {**TEXT, "n": 3})).json()
    assert (body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"]) == (2, 36)
    lines = (await world.client.get("/metrics")).text.splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert float(values['vllm:generation_tokens_total{model_name="tiny"}']) == 36
    assert (
        float(values['vllm:prompt_tokens_total{model_name="tiny"}']) == 6
    )  # each choice computes its prompt
    assert float(values['vllm:request_success_total{finished_reason="stop",model_name="tiny"}']) == 3


async def test_the_given_request_id_comes_back() -> None:
    world = GatewayWorld().serve(1)
    response = await world.client.get("/ping", headers={"x-request-id": "abc-1"})
    assert response.headers["x-request-id"] == "abc-1"
