"""Structured output: spellings, contradictions, and what cannot be compiled, in bounded time."""

from __future__ import annotations

import json
from typing import Any

import llguidance
import pytest

from gateway.errors import ApiError
from gateway.parsers.forced import required_schema
from gateway.schemas import CompletionBody, decode
from gateway.structured import GRAMMAR_BYTES_MAX, Request, _byte_vocabulary, compiled, grammar_of

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


def body(**fields: Any) -> CompletionBody:
    return decode(json.dumps({"prompt": "x", **fields}).encode(), CompletionBody)


async def accepts(grammar: str, text: str) -> bool:
    matcher = llguidance.LLMatcher(_byte_vocabulary(), grammar, log_level=0)
    data = list(text.encode())
    return matcher.try_consume_tokens(data) == len(data) and matcher.is_accepting()


@pytest.mark.parametrize(
    "fields",
    [
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": SCHEMA, "strict": True},
            }
        },
        {"structured_outputs": {"json": SCHEMA}},
        {"structured_outputs": {"json": json.dumps(SCHEMA)}},
        {"guided_json": SCHEMA},
        {"guided_json": json.dumps(SCHEMA)},
    ],
)
async def test_schema_spellings(fields: dict[str, Any]) -> None:
    grammar = await grammar_of(body(**fields))
    assert await accepts(grammar, '{"a": 1}') and await accepts(grammar, '{\n  "a":-20}')
    assert not await accepts(grammar, '{"a": "1"}') and not await accepts(grammar, "{}")


@pytest.mark.parametrize(
    "fields", [{"response_format": {"type": "json_object"}}, {"structured_outputs": {"json_object": True}}]
)
async def test_any_object(fields: dict[str, Any]) -> None:
    grammar = await grammar_of(body(**fields))
    assert await accepts(grammar, '{"x": [1, null, {"y": "z"}]}') and not await accepts(grammar, "[1]")


async def test_white_space_is_bounded_and_can_be_ruled_out() -> None:
    grammar = await grammar_of(body(guided_json=SCHEMA))
    assert await accepts(grammar, "{" + " " * 40 + '"a":1}')
    assert not await accepts(grammar, "{" + " " * 41 + '"a":1}')
    strict = await grammar_of(body(structured_outputs={"json": SCHEMA, "disable_any_whitespace": True}))
    assert await accepts(strict, '{"a":1}') and not await accepts(strict, '{ "a":1}')


TEXTS = ['say "hi"\\n', "é\n", "x|y/z*", "\u2028 🙂", "end"]


@pytest.mark.parametrize("spelling", ["guided_choice", "structured_outputs"])
async def test_choice(spelling: str) -> None:
    value: Any = TEXTS if spelling == "guided_choice" else {"choice": TEXTS}
    grammar = await grammar_of(body(**{spelling: value}))
    for text in TEXTS:
        assert await accepts(grammar, text)
    assert not await accepts(grammar, "en") and not await accepts(grammar, "endx")


async def test_regex_and_grammar() -> None:
    assert await accepts(await grammar_of(body(guided_regex=r'[a-c]{2}/"\d+')), 'ab/"12')
    for text in ('root ::= "a" | "b" root', 'start: "a" | "b" start'):
        assert await accepts(await grammar_of(body(guided_grammar=text)), "bba")
        assert await accepts(await grammar_of(body(structured_outputs={"grammar": text})), "a")


@pytest.mark.parametrize("fields", [{}, {"response_format": {"type": "text"}}, {"structured_outputs": {}}])
async def test_nothing_asked(fields: dict[str, Any]) -> None:
    assert await grammar_of(body(**fields)) == ""


def nested(depth: int) -> str:
    return '{"type":"array","items":' * depth + '{"type":"string"}' + "}" * depth


async def test_demanded_calls_keep_the_definitions_of_their_tools() -> None:
    tool = {"type": "object", "properties": {"to": {"$ref": "#/$defs/Place"}}, "required": ["to"],
            "$defs": {"Place": {"enum": ["here", "there"]}}}  # fmt: skip
    other = {"type": "object", "properties": {"to": {"$ref": "#/definitions/Place"}}, "required": ["to"],
             "definitions": {"Place": {"type": "integer"}}}  # fmt: skip
    schema = required_schema({"go": tool, "move": other}, parallel=False)
    grammar = await compiled(Request("tool_choice", "json", schema))
    assert await accepts(grammar, '[{"name": "go", "parameters": {"to": "here"}}]')
    assert await accepts(grammar, '[{"name": "move", "parameters": {"to": 5}}]')
    assert not await accepts(grammar, '[{"name": "move", "parameters": {"to": "here"}}]')
    assert not await accepts(grammar, "[]")


HOSTILE: list[tuple[str, dict[str, Any]]] = [
    ("guided_regex", {"guided_regex": "(a"}),
    ("guided_regex", {"guided_regex": "(" * 5000 + ")" * 5000}),
    ("guided_regex", {"guided_regex": "a" * (GRAMMAR_BYTES_MAX + 1)}),
    ("guided_json", {"guided_json": {"type": "thing"}}),
    ("guided_json", {"guided_json": "[1]"}),
    ("guided_json", {"guided_json": nested(2000)}),
    ("guided_json", {"guided_json": {"enum": []}}),
    ("guided_json", {"guided_json": {"$ref": "http://127.0.0.1:9/x"}}),
    ("guided_json", {"guided_json": {"$ref": "#/$defs/absent"}}),
    ("guided_grammar", {"guided_grammar": "start: x"}),
    ("guided_grammar", {"guided_grammar": "start: " + "(" * 3000 + '"a"' + ")" * 3000}),
    ("guided_grammar", {"guided_grammar": "root ::= " + "(" * 3000 + '"a"' + ")" * 3000}),
    ("guided_grammar", {"guided_grammar": "?!"}),
    ("guided_grammar", {"guided_grammar": 'start: <unknown> "a"'}),
    ("response_format.json_schema", {"response_format": {"type": "json_schema"}}),
    ("structured_outputs.regex", {"structured_outputs": {"regex": "["}}),
    ("structured_outputs.json", {"structured_outputs": {"json": {}, "whitespace_pattern": "["}}),
    ("guided_regex", {"guided_regex": "a", "response_format": {"type": "json_object"}}),
]


@pytest.mark.parametrize(("param", "fields"), HOSTILE, ids=lambda value: str(value)[:50])
async def test_what_cannot_be_used_is_the_clients_error(param: str, fields: dict[str, Any]) -> None:
    with pytest.raises(ApiError) as refused:
        await grammar_of(body(**fields))
    assert (refused.value.status, refused.value.param) == (400, param)
    assert "\n" not in refused.value.message and len(refused.value.message) < 400


@pytest.mark.parametrize(
    "fields",
    [
        {"guided_regex": "((a|b){1,1000}){1,1000}"},
        {"guided_regex": "(.*a.{200}b){50}"},
        {"guided_json": {"type": "string", "minLength": 100_000, "maxLength": 1_000_000}},
        {"guided_json": {"type": "array", "minItems": 10**6, "items": {"type": "array", "minItems": 10**6}}},
        {"guided_grammar": 'start: start start | "a" | '},
    ],
    ids=lambda value: str(value)[:50],
)
async def test_what_looks_explosive_is_bounded(fields: dict[str, Any]) -> None:
    """It either compiles within the library's bounds of work or is refused; both are answers."""
    try:
        assert await grammar_of(body(**fields))
    except ApiError as error:
        assert error.status == 400
