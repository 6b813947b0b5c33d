"""/v1/completions over fake schedulers: texts, prompts, choices, stops, log-probabilities."""

from __future__ import annotations

import pytest

from tests.harness.gateway_world import CHAT, END, TEXT, GatewayWorld


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
