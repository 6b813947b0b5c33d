"""Reasoning and tool calls over HTTP, streamed and whole, and how tools reach the template and the scheduler."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.harness.gateway_world import END, GatewayWorld, byte_tokenizer

PATH = "/v1/chat/completions"
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "tools": [TOOL]}
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}[{{ c.function.name }}:{{ c.function.arguments.x }}]{% endfor %}\n{% endfor %}"
    "{% if tools %}{{ tools[0].function.name }}{% endif %}<assistant>"
)
OUTPUT = b'<think>\nhm\n</think>\n\nSure.\n<tool_call>{"name": "f", "arguments": {"x": [1, "\xc3\xa9"]}}</tool_call>'


def world(output: bytes = OUTPUT, tokens_per_message: int = 3, **fields: Any) -> GatewayWorld:
    given = {"template": TEMPLATE, "tool_parser": "hermes", "has_reasoning": True, **fields}
    return GatewayWorld(**given).serve(1, output=output, tokens_per_message=tokens_per_message)


@pytest.mark.parametrize("tokens_per_message", [1, 5, 500])
async def test_streamed_deltas_are_the_whole_message(tokens_per_message: int) -> None:
    gateway = world(tokens_per_message=tokens_per_message)
    body = (await gateway.post(PATH, CHAT)).json()
    message = body["choices"][0]["message"]
    assert (message["content"], message["reasoning_content"], message["reasoning"]) == ("Sure.", "hm", "hm")
    (call,) = message["tool_calls"]
    assert call["type"] == "function" and call["id"].startswith("call_")
    assert call["function"] == {"name": "f", "arguments": '{"x": [1, "é"]}'}
    assert body["choices"][0]["finish_reason"] == "tool_calls"
    choices = [event["choices"][0] for event in await gateway.events(PATH, CHAT)]
    deltas = [choice["delta"] for choice in choices]
    for name in ("content", "reasoning_content"):
        assert "".join(delta.get(name, "") for delta in deltas) == message[name]
    entries = [entry for delta in deltas for entry in delta.get("tool_calls", [])]
    assert entries[0]["function"]["name"] == "f" and entries[0]["id"].startswith("call_")
    assert all(entry["index"] == 0 for entry in entries)
    assert "".join(entry["function"]["arguments"] for entry in entries) == call["function"]["arguments"]
    assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == ["tool_calls"]


async def test_without_tools_calls_are_content() -> None:
    body = (await world().post(PATH, {"messages": CHAT["messages"]})).json()
    assert "<tool_call>" in body["choices"][0]["message"]["content"]
    assert body["choices"][0]["finish_reason"] == "stop"
    none = (await world().post(PATH, {**CHAT, "tool_choice": "none"})).json()
    assert "<tool_call>" in none["choices"][0]["message"]["content"]


async def test_a_call_cut_off_is_unfinished() -> None:
    choice = (await world().post(PATH, {**CHAT, "max_tokens": 70})).json()["choices"][0]
    assert choice["finish_reason"] == "length"
    with pytest.raises(json.JSONDecodeError):
        json.loads(choice["message"]["tool_calls"][0]["function"]["arguments"])


async def test_reasoning_can_be_left_out() -> None:
    message = (await world().post(PATH, {**CHAT, "include_reasoning": False})).json()["choices"][0]["message"]
    assert "reasoning" not in message and "reasoning_content" not in message and message["content"] == "Sure."


async def test_every_choice_has_a_parser_of_its_own() -> None:
    body = (await world(tokens_per_message=1).post(PATH, {**CHAT, "n": 3})).json()
    ids = {choice["message"]["tool_calls"][0]["id"] for choice in body["choices"]}
    assert len(ids) == 3


async def test_special_tokens_that_a_parser_needs_are_text() -> None:
    tokenizer = byte_tokenizer("<tool_call>", "</tool_call>")
    output = bytes([0]) + b'{"name": "f", "arguments": {}}' + bytes([1])  # stand-ins, replaced below
    gateway = world(tokenizer=tokenizer, has_reasoning=False)
    scheduler = gateway.schedulers[0]
    scheduler.output = [END + 1, *output[1:-1], END + 2]  # type: ignore[assignment]
    message = (await gateway.post(PATH, CHAT)).json()["choices"][0]["message"]
    assert message["tool_calls"][0]["function"] == {"name": "f", "arguments": "{}"}
    plain = (await gateway.post(PATH, {"messages": CHAT["messages"]})).json()["choices"][0]["message"]
    assert plain["content"] == '{"name": "f", "arguments": {}}'


async def test_tools_and_earlier_calls_reach_the_template() -> None:
    turns = [
        *CHAT["messages"],
        {
            "role": "assistant",
            "tool_calls": [
                {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"x": 7}'}},
            ],
        },
        {"role": "tool", "tool_call_id": "c", "content": "42"},
    ]
    gateway = world(template=TEMPLATE.replace("tools[0].function.name", "tools[0] | tojson"), output=b"x")
    assert (await gateway.post(PATH, {**CHAT, "messages": turns})).status_code == 200
    prompt = bytes(gateway.schedulers[0].adds()[0].prompt_token_ids).decode()
    assert "<assistant>[f:7]" in prompt and "<tool>42" in prompt
    assert '{"type": "function", "function": {"name": "f", "parameters":' in prompt
    broken = [{**turns[1], "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]
    response = await gateway.post(PATH, {**CHAT, "messages": broken})
    assert response.json()["error"]["param"] == "messages[0].tool_calls.function.arguments"


@pytest.mark.parametrize(
    ("choice", "output", "arguments"),
    [
        ({"type": "function", "function": {"name": "f"}}, b'{"x": 1}', '{"x": 1}'),
        ("required", b'[{"name": "f", "parameters": {"x": 1}}]', '{"x": 1}'),
    ],
)
async def test_demanded_calls_are_held_to_a_grammar(choice: object, output: bytes, arguments: str) -> None:
    gateway = world(b"</think>" + output, template=TEMPLATE + "<think>", tool_parser="")
    body = (await gateway.post(PATH, {**CHAT, "tool_choice": choice})).json()
    message = body["choices"][0]["message"]
    assert message["tool_calls"][0]["function"] == {"name": "f", "arguments": arguments}
    assert message["content"] is None
    assert "json_schema" in gateway.schedulers[0].adds()[0].sampling.grammar


async def test_a_grammar_begins_behind_the_thoughts() -> None:
    tokenizer = byte_tokenizer("</think>")
    fields = {"messages": CHAT["messages"], "guided_regex": "a"}
    for template, after in (
        (TEMPLATE + "<think>", END + 1),
        (TEMPLATE, END + 1),
        (TEMPLATE + "</think>\n", -1),
    ):
        gateway = world(template=template, tokenizer=tokenizer)
        await gateway.post(PATH, fields)
        assert gateway.schedulers[0].adds()[0].sampling.grammar_after_token_id == after
    gateway = world(has_reasoning=False, tokenizer=tokenizer)
    await gateway.post(PATH, fields)
    assert gateway.schedulers[0].adds()[0].sampling.grammar_after_token_id == -1
