"""/v1/chat/completions over fake schedulers: messages, deltas, and the fields that both calls take."""

from __future__ import annotations

from tests.harness.gateway_world import CHAT, END, WINDOW_TOKENS, GatewayWorld


async def test_chat() -> None:
    world = GatewayWorld().serve(1)
    body = (await world.post("/v1/chat/completions", CHAT)).json()
    assert body["object"] == "chat.completion"
    message = body["choices"][0]["message"]
    assert (message["role"], message["content"]) == ("assistant", "hello world")
    add = world.schedulers[0].adds()[0]
    assert bytes(add.prompt_token_ids) == b"<user>hi\n<assistant>"
    assert add.sampling.max_tokens == WINDOW_TOKENS - len(add.prompt_token_ids)


async def test_chat_stream() -> None:
    world = GatewayWorld().serve(1)
    events = await world.events("/v1/chat/completions", {**CHAT, "return_token_ids": True, "n": 2})
    assert [event["choices"][0]["delta"] for event in events[:2]] == [
        {"role": "assistant", "content": ""}
    ] * 2
    assert bytes(events[0]["prompt_token_ids"]) == b"<user>hi\n<assistant>"
    for index in range(2):
        mine = [c for event in events for c in event["choices"] if c["index"] == index]
        assert "".join(choice["delta"].get("content", "") for choice in mine) == "hello world"
        assert [t for choice in mine for t in choice["token_ids"]] == [*b"hello world", END]
        assert mine[-1]["finish_reason"] == "stop"


async def test_chat_logprobs() -> None:
    world = GatewayWorld().serve(1, output="é".encode())
    body = (await world.post("/v1/chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 2})).json()
    content = body["choices"][0]["logprobs"]["content"]
    assert content[0]["bytes"] == [0xC3] and content[0]["token"] == "\ufffd"
    assert content[2]["token"] == "<|end|>"
    assert [top["logprob"] for top in content[0]["top_logprobs"]] == [-0.5, -2.0]


async def test_chat_content_parts_and_kwargs() -> None:
    world = GatewayWorld(template="{{ messages[0].content }}{{ mood }}").serve(1)
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    await world.post(
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": parts}], "chat_template_kwargs": {"mood": "!"}},
    )
    assert bytes(world.schedulers[0].adds()[0].prompt_token_ids) == b"a\nb!"


async def test_max_completion_tokens() -> None:
    world = GatewayWorld().serve(1)
    body = (await world.post("/v1/chat/completions", {**CHAT, "max_completion_tokens": 5})).json()
    assert body["choices"][0]["message"]["content"] == "hello"


async def test_neutral_values_are_taken() -> None:
    world = GatewayWorld().serve(1)
    neutral = {
        "presence_penalty": 0, "frequency_penalty": 0.0, "repetition_penalty": 1.0, "logit_bias": {}, "min_p": 0,
        "user": "me", "priority": 0, "skip_special_tokens": True, "add_generation_prompt": True,
        "chat_template_kwargs": {}, "tools": [], "tool_choice": "none", "response_format": {"type": "text"},
        "cache_salt": None, "kv_transfer_params": None, "n": 1, "stop": [], "metadata": {"a": "b"}, "store": False,
        "request_id": "abc", "parallel_tool_calls": True, "stream_options": None,
    }  # fmt: skip
    response = await world.post("/v1/chat/completions", {**CHAT, **neutral})
    assert response.status_code == 200, response.text
    assert response.json()["id"] == "chatcmpl-abc"
    again = await world.post("/v1/chat/completions", {**CHAT, "request_id": "abc"})
    assert again.json()["id"] == "chatcmpl-abc"
    ids = {add.request_id for add in world.schedulers[0].adds()}
    assert len(ids) == 2


async def test_sampling_fields_reach_the_scheduler() -> None:
    world = GatewayWorld().serve(1)
    fields = {
        "min_p": 0.1, "presence_penalty": -0.5, "frequency_penalty": 1.5, "repetition_penalty": 1.2,
        "logit_bias": {"7": -100, "3": 2.5}, "prompt_logprobs": 2,
    }  # fmt: skip
    assert (await world.post("/v1/chat/completions", {**CHAT, **fields})).status_code == 200
    sampling = world.schedulers[0].adds()[0].sampling
    assert (sampling.min_p, sampling.presence_penalty, sampling.frequency_penalty) == (0.1, -0.5, 1.5)
    assert sampling.repetition_penalty == 1.2 and sampling.logit_bias == ((3, 2.5), (7, -100.0))
    assert sampling.prompt_logprobs == 2 and sampling.logprobs == -1
