"""The official `openai` client against a running pod."""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import math
from collections.abc import AsyncIterator, Iterator

import httpx
import openai
import pytest

PROMPT_IDS = [5, 9, 17, 33, 65]


@pytest.fixture(scope="module")
def client(pod_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{pod_url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture
async def async_client(pod_url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    base_url = f"{pod_url}/v1"
    async with openai.AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def model(client: openai.OpenAI) -> str:
    (card,) = client.models.list().data
    assert client.models.retrieve(card.id).id == card.id
    return card.id


GREEDY = {"temperature": 0, "extra_body": {"ignore_eos": True, "return_token_ids": True}}
CHAT = [{"role": "user", "content": "def fibonacci("}]


def complete(client: openai.OpenAI, model: str, **fields: object) -> openai.types.Completion:
    values: dict[str, object] = {"model": model, "prompt": PROMPT_IDS, "max_tokens": 12, **GREEDY, **fields}
    return client.completions.create(**values)  # type: ignore[call-overload,no-any-return]


def token_ids(choice: object) -> list[int]:
    ids: list[int] = choice.model_extra["token_ids"]  # type: ignore[attr-defined]
    return ids


# --------------------------------------------------------------------------- completions


def test_completion(client: openai.OpenAI, model: str) -> None:
    body = complete(client, model)
    assert body.choices[0].finish_reason == "length" and len(token_ids(body.choices[0])) == 12
    assert body.usage is not None
    assert (body.usage.prompt_tokens, body.usage.completion_tokens) == (5, 12)
    assert body.choices[0].model_extra["prompt_token_ids"] == PROMPT_IDS  # type: ignore[index]


def test_streamed_completion_equals_the_whole_one(client: openai.OpenAI, model: str) -> None:
    whole = complete(client, model)
    chunks = list(
        client.completions.create(
            model=model, prompt=PROMPT_IDS, max_tokens=12, stream=True,
            stream_options={"include_usage": True}, **GREEDY,  # type: ignore[call-overload]
        )
    )  # fmt: skip
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    assert [t for c in chunks if c.choices for t in token_ids(c.choices[0])] == token_ids(whole.choices[0])
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert len(chunks) > 3


def test_text_and_its_token_ids_are_the_same_prompt(client: openai.OpenAI, model: str, pod_url: str) -> None:
    ids = httpx.post(f"{pod_url}/tokenize", json={"prompt": "import os"}).json()["tokens"]
    assert complete(client, model, prompt="import os").choices[0].text == (
        complete(client, model, prompt=ids).choices[0].text
    )
    text = httpx.post(f"{pod_url}/detokenize", json={"tokens": ids}).json()["prompt"]
    assert text.endswith("import os")


def test_several_prompts_and_choices(client: openai.OpenAI, model: str) -> None:
    alone = [complete(client, model, prompt=p).choices[0].text for p in ([5, 6], [7, 8, 9])]
    body = complete(client, model, prompt=[[5, 6], [7, 8, 9]], n=2)
    assert [c.index for c in body.choices] == [0, 1, 2, 3]
    assert [c.text for c in body.choices] == [alone[0], alone[0], alone[1], alone[1]]  # greedy
    assert body.usage is not None and body.usage.prompt_tokens == 5


def test_sampling_follows_the_seed(client: openai.OpenAI, model: str) -> None:
    def sample(seed: int, n: int = 1) -> list[list[int]]:
        body = complete(client, model, temperature=1.0, seed=seed, n=n, max_tokens=16)
        return [token_ids(choice) for choice in body.choices]

    three = sample(11, n=3)
    assert three == sample(11, n=3) and three[0] == sample(11)[0]
    assert three[0] != three[1] and sample(12)[0] != three[0]


def test_sampling_parameters_change_what_is_drawn(client: openai.OpenAI, model: str) -> None:
    plain = token_ids(complete(client, model).choices[0])
    never = {str(token): -100 for token in plain}
    other = token_ids(complete(client, model, logit_bias=never).choices[0])
    assert not set(other) & set(plain)
    often = complete(client, model, logit_bias={"40": 100}, max_tokens=6)
    assert token_ids(often.choices[0]) == [40] * 6
    rare = complete(
        client, model, logit_bias={"40": 30}, frequency_penalty=2, presence_penalty=2, max_tokens=40
    )
    assert 0 < token_ids(rare.choices[0]).count(40) < 40
    extra = {**GREEDY["extra_body"], "repetition_penalty": 1.3, "min_p": 0.05}  # type: ignore[dict-item]
    sampled = [complete(client, model, temperature=1, seed=3, extra_body=extra) for _ in range(2)]
    assert token_ids(sampled[0].choices[0]) == token_ids(sampled[1].choices[0])


def test_choices_with_every_parameter_and_their_usage(client: openai.OpenAI, model: str) -> None:
    fields = {"temperature": 1.0, "seed": 5, "presence_penalty": 0.5, "logit_bias": {"40": 2}}
    body = complete(client, model, n=4, **fields)
    assert len({tuple(token_ids(choice)) for choice in body.choices}) == 4
    assert body.usage is not None and body.usage.completion_tokens == 48 and body.usage.prompt_tokens == 5
    assert token_ids(body.choices[0]) == token_ids(complete(client, model, **fields).choices[0])


SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["cat", "dog"]}, "legs": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["kind", "legs"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("seed", range(4))
def test_output_that_follows_a_schema(client: openai.OpenAI, model: str, seed: int) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "animal", "schema": SCHEMA, "strict": True}}
    fields = {"temperature": 1.0, "seed": seed, "max_tokens": 400, "messages": CHAT, "model": model}
    whole = client.chat.completions.create(**fields, response_format=form)  # type: ignore[call-overload]
    answer = json.loads(whole.choices[0].message.content)
    assert answer["kind"] in ("cat", "dog") and 0 <= answer["legs"] <= 9
    assert whole.choices[0].finish_reason == "stop"
    chunks = client.chat.completions.create(**fields, response_format=form, stream=True)  # type: ignore[call-overload]
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content


@pytest.mark.parametrize(
    "extra",
    [
        {"guided_choice": ["red", "green"]},
        {"structured_outputs": {"choice": ["red", "green"]}},
        {"guided_regex": "red|green"},
        {"guided_grammar": 'root ::= "red" | "green"'},
    ],
)
def test_output_that_follows_a_grammar(client: openai.OpenAI, model: str, extra: dict[str, object]) -> None:
    body = complete(client, model, temperature=1.0, max_tokens=20, extra_body=extra)
    assert body.choices[0].text in ("red", "green") and body.choices[0].finish_reason == "stop"


TOOL = {"type": "function", "function": {"name": "describe", "parameters": SCHEMA}}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "describe"}}])
def test_demanded_tool_calls(client: openai.OpenAI, model: str, choice: object) -> None:
    fields = {
        "model": model,
        "messages": CHAT,
        "tools": [TOOL],
        "tool_choice": choice,
        "max_tokens": 400,
        "seed": 2,
    }
    body = client.chat.completions.create(**fields, parallel_tool_calls=False)  # type: ignore[call-overload]
    (call,) = body.choices[0].message.tool_calls
    assert call.function.name == "describe" and json.loads(call.function.arguments).keys() == {"kind", "legs"}
    assert body.choices[0].finish_reason == "tool_calls" and body.choices[0].message.content is None
    chunks = client.chat.completions.create(**fields, parallel_tool_calls=False, stream=True)  # type: ignore[call-overload]
    pieces = [entry for c in chunks for entry in c.choices[0].delta.tool_calls or []]
    assert pieces[0].function.name == "describe"
    assert "".join(piece.function.arguments for piece in pieces) == call.function.arguments


def test_prompt_logprobs(client: openai.OpenAI, model: str) -> None:
    made = complete(client, model, logprobs=0).choices[0]
    extra = {"prompt_logprobs": 1}
    scored = complete(client, model, prompt=PROMPT_IDS + token_ids(made), max_tokens=1, extra_body=extra)
    entries = scored.choices[0].model_extra["prompt_logprobs"]  # type: ignore[index]
    values = [entry[str(t)]["logprob"] for entry, t in zip(entries[5:], token_ids(made), strict=True)]
    assert entries[0] is None and made.logprobs is not None and values == made.logprobs.token_logprobs


def test_stop_strings_cut_the_text_the_same_way_streamed_and_not(client: openai.OpenAI, model: str) -> None:
    text = complete(client, model, max_tokens=40).choices[0].text
    stop = text[len(text) // 2 : len(text) // 2 + 2]
    body = complete(client, model, max_tokens=40, stop=[stop, "never there"])
    expected = text[: text.find(stop)]
    assert (body.choices[0].text, body.choices[0].finish_reason) == (expected, "stop")
    chunks = list(complete(client, model, max_tokens=40, stop=stop, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected  # type: ignore[attr-defined]
    assert chunks[-1].choices[0].finish_reason == "stop"  # type: ignore[attr-defined]


def test_stop_token_ids_and_min_tokens(client: openai.OpenAI, model: str) -> None:
    ids = token_ids(complete(client, model).choices[0])
    stop = ids[6]
    extra = {"ignore_eos": True, "return_token_ids": True, "stop_token_ids": [stop]}
    choice = complete(client, model, extra_body=extra).choices[0]
    assert token_ids(choice) == ids[: ids.index(stop) + 1] and choice.finish_reason == "stop"
    body = complete(client, model, extra_body={**extra, "min_tokens": 12})
    assert body.usage is not None and body.usage.completion_tokens == 12


def test_logprobs(client: openai.OpenAI, model: str) -> None:
    logprobs = complete(client, model, logprobs=3).choices[0].logprobs
    assert logprobs is not None and logprobs.tokens is not None
    assert logprobs.token_logprobs is not None and logprobs.top_logprobs is not None
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == 12
    for value, top in zip(logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert value == max(top.values()) <= 0  # greedy takes the likeliest
        assert sum(math.exp(one) for one in top.values()) <= 1.0001


def test_scoring_by_echo_equals_scoring_by_generation(client: openai.OpenAI, model: str) -> None:
    """The log-probabilities of a prompt are those that its tokens had when they were generated."""
    made = complete(client, model, logprobs=0).choices[0]
    scored = complete(
        client,
        model,
        prompt=PROMPT_IDS + token_ids(made),
        max_tokens=0,
        logprobs=1,
        extra_body={"echo": True},
    )
    assert made.logprobs is not None and scored.choices[0].logprobs is not None
    values = scored.choices[0].logprobs.token_logprobs
    assert values is not None and values[0] is None and len(values) == 17
    assert values[5:] == made.logprobs.token_logprobs
    assert scored.usage is not None and scored.usage.completion_tokens == 0


def test_echo(client: openai.OpenAI, model: str, pod_url: str) -> None:
    plain = complete(client, model, prompt="import os").choices[0].text
    echoed = complete(client, model, prompt="import os", echo=True).choices[0].text
    assert echoed == "import os" + plain


# --------------------------------------------------------------------------- chat


def test_chat_stream_equals_the_whole_chat(client: openai.OpenAI, model: str) -> None:
    fields = {"model": model, "messages": CHAT, "max_completion_tokens": 24, **GREEDY}
    whole = client.chat.completions.create(**fields)  # type: ignore[call-overload]
    assert whole.choices[0].message.role == "assistant"
    chunks = list(client.chat.completions.create(**fields, stream=True))  # type: ignore[call-overload]
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason == "length"
    assert chunks[0].model_extra["prompt_token_ids"] == whole.model_extra["prompt_token_ids"]


def test_chat_prompt_is_the_template(client: openai.OpenAI, model: str, pod_url: str) -> None:
    ids = httpx.post(f"{pod_url}/tokenize", json={"messages": CHAT}).json()["tokens"]
    body = client.chat.completions.create(model=model, messages=CHAT, max_tokens=8, **GREEDY)  # type: ignore[call-overload]
    assert body.model_extra["prompt_token_ids"] == ids
    assert token_ids(body.choices[0]) == token_ids(
        complete(client, model, prompt=ids, max_tokens=8).choices[0]
    )


def test_chat_choices_and_logprobs(client: openai.OpenAI, model: str) -> None:
    body = client.chat.completions.create(
        model=model, messages=CHAT, max_tokens=5, n=2, logprobs=True, top_logprobs=2, seed=3,
        extra_body={"ignore_eos": True},
    )  # type: ignore[call-overload]  # fmt: skip
    assert len(body.choices) == 2
    for choice in body.choices:
        assert len(choice.logprobs.content) == 5
        for entry in choice.logprobs.content:
            assert len(entry.top_logprobs) == 2 and entry.logprob <= entry.top_logprobs[0].logprob
            assert bytes(entry.bytes).decode("utf-8", "replace") == entry.token


async def test_a_client_that_leaves_ends_its_request(async_client: openai.AsyncOpenAI, pod_url: str) -> None:
    model = (await async_client.models.list()).data[0].id
    stream = await async_client.chat.completions.create(
        model=model, messages=CHAT, stream=True, extra_body={"ignore_eos": True}
    )  # type: ignore[call-overload]
    async for _ in stream:
        break
    await stream.close()
    async with httpx.AsyncClient(base_url=pod_url) as http:
        for _ in range(100):
            lines = (await http.get("/metrics")).text.splitlines()
            values = [line.rsplit(" ", 1)[1] for line in lines if line.startswith("vllm:num_requests_")]
            if values and set(values) == {"0.0"}:
                return
            await asyncio.sleep(0.02)
    raise AssertionError(f"still running: {values}")


def test_many_at_once_are_what_each_is_alone(client: openai.OpenAI, model: str) -> None:
    prompts = [[3 + n, 7, 11 + n] for n in range(12)]
    alone = [token_ids(complete(client, model, prompt=prompt).choices[0]) for prompt in prompts]
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        together = list(pool.map(lambda p: token_ids(complete(client, model, prompt=p).choices[0]), prompts))
    assert together == alone


# --------------------------------------------------------------------------- errors


def test_errors_have_openais_shape(client: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        complete(client, "no-such-model")
    assert missing.value.code == "model_not_found" and missing.value.param == "model"
    with pytest.raises(openai.BadRequestError) as bad:
        complete(client, model, temperature=9)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as unknown:
        complete(client, model, extra_body={"nonsense": 1})
    assert unknown.value.param == "nonsense"
    with pytest.raises(openai.BadRequestError) as long:
        complete(client, model, max_tokens=10_000_000)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as tools:
        client.chat.completions.create(
            model=model, messages=CHAT, tools=[{"type": "function", "function": {"name": "f"}}]
        )  # type: ignore[call-overload]
    assert tools.value.param == "tools"
    with pytest.raises(openai.BadRequestError) as schema:
        complete(client, model, extra_body={"guided_json": {"type": "thing"}})
    assert (schema.value.param, schema.value.code) == ("guided_json", "invalid_grammar")
    with pytest.raises(openai.BadRequestError) as bias:
        complete(client, model, logit_bias={"512": 1})
    assert bias.value.param == "logit_bias"


def test_errors_come_before_a_stream_starts(client: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.BadRequestError):
        complete(client, model, stream=True, max_tokens=10_000_000)


def test_plain_http_errors(pod_url: str) -> None:
    assert httpx.get(f"{pod_url}/v1/nothing").json()["error"]["code"] == "not_found"
    assert httpx.get(f"{pod_url}/v1/completions").status_code == 405
    assert httpx.post(f"{pod_url}/v1/completions", content=b"{").json()["error"]["code"] == "invalid_json"
    assert httpx.post(f"{pod_url}/v1/completions", content=b"x" * (5 << 20)).status_code == 413


def test_health_and_metrics(client: openai.OpenAI, model: str, pod_url: str) -> None:
    complete(client, model)
    assert httpx.get(f"{pod_url}/health").json()["status"] == "ok"
    text = httpx.get(f"{pod_url}/metrics").text
    assert "vllm:time_to_first_token_seconds_bucket" in text
    rows = [line for line in text.splitlines() if line.startswith("xds:expert_rows{")]
    assert len(rows) == 4 and any(float(row.rsplit(" ", 1)[1]) > 0 for row in rows)
