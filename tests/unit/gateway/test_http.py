"""The HTTP surface, over fake schedulers."""

from __future__ import annotations

import asyncio

import pytest

from bus.config import GatewayConfig
from tests.harness.gateway_world import END, WINDOW_TOKENS, GatewayWorld

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": "tiny", "prompt": "ab", "max_tokens": 50}


# --------------------------------------------------------------------------- completions


async def test_completion() -> None:
    world = GatewayWorld().serve(1)
    response = await world.post("/v1/completions", TEXT)
    body = response.json()
    assert response.status_code == 200 and response.headers["x-request-id"]
    choice = body["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["logprobs"]) == ("hello world", "stop", None)
    assert body["object"] == "text_completion" and body["id"].startswith("cmpl-")
    assert body["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": 12,
        "total_tokens": 14,
        "prompt_tokens_details": {"cached_tokens": 2},
    }
    assert world.core.num_jobs() == 0


async def test_completion_default_max_tokens_is_16() -> None:
    world = GatewayWorld().serve(1, output=b"x" * 100)
    body = (await world.post("/v1/completions", {"prompt": "ab"})).json()
    assert body["choices"][0]["text"] == "x" * 16
    assert body["choices"][0]["finish_reason"] == "length"


async def test_streamed_text_equals_whole_text() -> None:
    world = GatewayWorld().serve(1, output="naïve 🙂 日本".encode(), tokens_per_message=1)
    events = await world.events("/v1/completions", TEXT)
    assert "".join(event["choices"][0]["text"] for event in events) == "naïve 🙂 日本"
    assert [event["choices"][0]["finish_reason"] for event in events].count("stop") == 1
    assert "usage" not in events[0]


async def test_stream_with_usage() -> None:
    world = GatewayWorld().serve(1)
    events = await world.events("/v1/completions", {**TEXT, "stream_options": {"include_usage": True}})
    assert events[-1]["choices"] == [] and events[-1]["usage"]["completion_tokens"] == 12
    assert all(event["usage"] is None for event in events[:-1])


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("ab", [(97, 98)]),
        (["a", "b"], [(97,), (98,)]),
        ([97, 98], [(97, 98)]),
        ([[97], [98, 99]], [(97,), (98, 99)]),
    ],
)
async def test_prompt_forms(prompt: object, expected: list[tuple[int, ...]]) -> None:
    world = GatewayWorld().serve(1)
    body = (await world.post("/v1/completions", {"prompt": prompt, "seed": 5})).json()
    assert [add.prompt_token_ids for add in world.schedulers[0].adds()] == expected
    assert [choice["index"] for choice in body["choices"]] == list(range(len(expected)))
    assert {add.sampling.seed for add in world.schedulers[0].adds()} == {5}


async def test_choices_have_seeds_of_their_own_that_follow_from_the_request() -> None:
    world = GatewayWorld().serve(1)
    for _ in range(2):
        await world.post("/v1/completions", {**TEXT, "n": 3, "seed": 7})
    seeds = [add.sampling.seed for add in world.schedulers[0].adds()]
    assert seeds[:3] == seeds[3:] and seeds[0] == 7 and len(set(seeds)) == 3
    ids = [add.request_id for add in world.schedulers[0].adds()]
    assert [request_id.rsplit("-", 1)[1] for request_id in ids] == ["0", "1", "2"] * 2
    assert len(set(ids)) == 6


async def test_usage_counts_a_prompt_once_for_all_its_choices() -> None:
    world = GatewayWorld().serve(1)
    usage = (await world.post("/v1/completions", {**TEXT, "n": 2})).json()["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (2, 24)


@pytest.mark.parametrize("tokens_per_message", [1, 4, 100])
async def test_stop_strings(tokens_per_message: int) -> None:
    world = GatewayWorld().serve(1, tokens_per_message=tokens_per_message)
    body = (await world.post("/v1/completions", {**TEXT, "stop": ["o w", "zz"]})).json()
    choice = body["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("hell", "stop", "o w")
    assert body["usage"]["completion_tokens"] == 7
    assert world.core.num_jobs() == 0


async def test_a_stop_string_aborts_at_the_scheduler() -> None:
    world = GatewayWorld().serve(1, output=b"hello world", tokens_per_message=6)
    choice = (await world.post("/v1/completions", {**TEXT, "stop": "lo"})).json()["choices"][0]
    assert choice["text"] == "hel"
    assert len(world.schedulers[0].aborts()) == 1


async def test_stop_token_ids() -> None:
    world = GatewayWorld().serve(1)
    await world.post("/v1/completions", {**TEXT, "stop_token_ids": [104, 105]})
    assert world.schedulers[0].adds()[0].sampling.stop_token_ids == (104, 105)


async def test_return_token_ids() -> None:
    world = GatewayWorld().serve(1, output=b"xyz", tokens_per_message=1)
    choice = (await world.post("/v1/completions", {**TEXT, "return_token_ids": True})).json()["choices"][0]
    assert choice["prompt_token_ids"] == [97, 98]
    assert choice["token_ids"] == [*b"xyz", END]
    events = await world.events("/v1/completions", {**TEXT, "return_token_ids": True})
    choices = [event["choices"][0] for event in events]
    assert choices[0]["prompt_token_ids"] == [97, 98]
    assert all(choice["prompt_token_ids"] is None for choice in choices[1:])
    assert [token_id for choice in choices for token_id in choice["token_ids"]] == [*b"xyz", END]


async def test_logprobs() -> None:
    world = GatewayWorld().serve(1, output=b"xy")
    choice = (await world.post("/v1/completions", {**TEXT, "logprobs": 2})).json()["choices"][0]
    assert choice["logprobs"] == {
        "tokens": ["x", "y", "<|end|>"],
        "token_logprobs": [-0.5, -0.5, -0.5],
        "top_logprobs": [{"x": -0.5, "<|end|>": -2.0}, {"y": -0.5, "<|end|>": -2.0}, {"<|end|>": -0.5}],
        "text_offset": [0, 1, 2],
    }
    assert world.schedulers[0].adds()[0].sampling.logprobs == 2


async def test_scoring_a_prompt() -> None:
    """What lm-eval sends: echo, logprobs, no output."""
    world = GatewayWorld().serve(1)
    body = (
        await world.post(
            "/v1/completions", {"prompt": [97, 98, 99], "max_tokens": 0, "echo": True, "logprobs": 1}
        )
    ).json()
    choice = body["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("abc", "length")
    assert choice["logprobs"]["tokens"] == ["a", "b", "c"]
    assert choice["logprobs"]["token_logprobs"] == [None, -0.5, -0.5]
    assert choice["logprobs"]["top_logprobs"][0] is None
    assert choice["logprobs"]["text_offset"] == [0, 1, 2]
    assert body["usage"]["completion_tokens"] == 0


async def test_echo_with_output_streamed_and_not() -> None:
    world = GatewayWorld().serve(1, output=b"xy", tokens_per_message=1)
    body = {**TEXT, "echo": True, "logprobs": 1}
    choice = (await world.post("/v1/completions", body)).json()["choices"][0]
    assert choice["text"] == "abxy"
    assert choice["logprobs"]["tokens"] == ["a", "b", "x", "y", "<|end|>"]
    events = await world.events("/v1/completions", body)
    assert "".join(event["choices"][0]["text"] for event in events) == "abxy"
    tokens = [token for event in events for token in event["choices"][0]["logprobs"]["tokens"]]
    assert tokens == choice["logprobs"]["tokens"]
    offsets = [offset for event in events for offset in event["choices"][0]["logprobs"]["text_offset"]]
    assert offsets == choice["logprobs"]["text_offset"]


async def test_parameters_reach_the_scheduler() -> None:
    world = GatewayWorld().serve(1)
    more = {"temperature": 0, "top_p": 0.5, "top_k": -1, "min_tokens": 3, "ignore_eos": True, "seed": -1}
    await world.post("/v1/completions", {**TEXT, **more})
    sampling = world.schedulers[0].adds()[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.0, 0.5, 0)
    assert (sampling.min_tokens, sampling.ignore_eos, sampling.max_tokens) == (3, True, 50)
    assert sampling.seed == (1 << 63) - 1 and sampling.eos_token_ids == (END,)


# --------------------------------------------------------------------------- chat


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


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_prompt_logprobs(path: str) -> None:
    world = GatewayWorld().serve(1, output=b"xy")
    request = TEXT if path == "/v1/completions" else CHAT
    body = (await world.post(path, {**request, "prompt_logprobs": 1})).json()
    holder = body["choices"][0] if path == "/v1/completions" else body
    first, second, *_ = holder["prompt_logprobs"]
    prompt = world.schedulers[0].adds()[0].prompt_token_ids
    assert first is None and len(holder["prompt_logprobs"]) == len(prompt)
    assert second[str(prompt[1])] == {"logprob": -0.5, "rank": 1, "decoded_token": chr(prompt[1])}
    streamed = await world.post(path, {**request, "prompt_logprobs": 1, "stream": True})
    assert streamed.status_code == 400 and streamed.json()["error"]["param"] == "prompt_logprobs"


@pytest.mark.parametrize("tokens_per_message", [1, 4, 100])
async def test_a_stop_string_can_be_part_of_the_text(tokens_per_message: int) -> None:
    world = GatewayWorld().serve(1, tokens_per_message=tokens_per_message)
    fields = {"stop": ["o w", "zz"], "include_stop_str_in_output": True}
    choice = (await world.post("/v1/completions", {**TEXT, **fields})).json()["choices"][0]
    assert (choice["text"], choice["stop_reason"]) == ("hello w", "o w")


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


# --------------------------------------------------------------------------- bad input


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


async def test_the_given_request_id_comes_back() -> None:
    world = GatewayWorld().serve(1)
    response = await world.client.get("/ping", headers={"x-request-id": "abc-1"})
    assert response.headers["x-request-id"] == "abc-1"
