"""Reasoning and tool calls: what each family writes, what is malformed, and that cutting changes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bus.errors import ConfigError
from gateway.parsers import families
from gateway.parsers.forced import NamedParser, RequiredParser
from gateway.parsers.json_text import JsonText
from gateway.parsers.parts import Content, Parser, Part, Reasoning, ToolArguments, ToolStart, parse_whole
from gateway.parsers.reasoning import ReasoningParser

TOOLS: dict[str, dict[str, object]] = {
    "weather": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
}


def calls(
    *wanted: tuple[str, str], before: str = "", behind: str = "", ids: tuple[str, ...] = ()
) -> list[Part]:
    """The parts of whole calls (name, arguments), with content before and behind."""
    parts: list[Part] = [Content(before)] if before else []
    for index, (name, arguments) in enumerate(wanted):
        parts += [ToolStart(index, name, ids[index] if ids else ""), ToolArguments(index, arguments)]
    return [*parts, Content(behind)] if behind else parts


V3 = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>{}\n```json\n{}\n```<｜tool▁call▁end｜>"
V31 = "<｜tool▁call▁begin｜>{}<｜tool▁sep｜>{}<｜tool▁call▁end｜>"
KIMI = "<|tool_call_begin|>functions.{}:{}<|tool_call_argument_begin|>{}<|tool_call_end|>"
INVOKE = '<invoke name="{}">\n<parameter name="city">{}</parameter>\n<parameter name="days">{}</parameter>\n</invoke>'
NESTED = '{"a": [1, 2.5e-3, true, null, "x\\"}y\\u00e9"], "b": {}}'

WELL_FORMED: list[tuple[str, str, list[Part]]] = [
    ("hermes", f'<tool_call>\n{{"name": "f", "arguments": {NESTED}}}\n</tool_call>', calls(("f", NESTED))),
    ("hermes", 'Sure.\n\n<tool_call>{"name":"f","arguments":{}}</tool_call>\n<tool_call>\n'
               '{"name":"g","arguments":{"x":1}}</tool_call>\n', calls(("f", "{}"), ("g", '{"x":1}'), before="Sure.")),
    ("hermes", '<tool_call>{"arguments": {"q": 1}, "name": "late"}</tool_call> tail',
     calls(("late", '{"q": 1}'), behind=" tail")),
    ("hermes", '<tool_call>{"id": "7", "name": "none"}</tool_call>', calls(("none", "{}"))),
    ("hermes", '<tool_call>{"name": "p", "parameters": {"q": 1}}</tool_call>', calls(("p", '{"q": 1}'))),
    ("deepseek_v3", "Hi<｜tool▁calls▁begin｜>" + V3.replace("{}", "f", 1).replace("{}", NESTED, 1) + "\n"
     + V3.replace("{}", "g", 1) + "<｜tool▁calls▁end｜>", calls(("f", NESTED), ("g", "{}"), before="Hi")),
    ("deepseek_v3", "<｜tool▁calls▁begin｜>" + V31.format("f", '{"c": 1}') + V31.format("g", "{}")
     + "<｜tool▁calls▁end｜>", calls(("f", '{"c": 1}'), ("g", "{}"))),
    ("kimi_k2", "x <|tool_calls_section_begin|>" + KIMI.format("get_w", 0, '{"a": 1}') + KIMI.format("b", 1, "{}")
     + "<|tool_calls_section_end|>",
     calls(("get_w", '{"a": 1}'), ("b", "{}"), before="x", ids=("functions.get_w:0", "functions.b:1"))),
    ("glm45", "ok\n<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>12</arg_value>\n<arg_key>days</arg_key>\n"
     "<arg_value>3</arg_value>\n</tool_call>\n<tool_call>g</tool_call>",
     calls(("weather", '{"city": "12", "days": 3}'), ("g", "{}"), before="ok")),
    ("glm45", "<tool_call>other\n<arg_key>a</arg_key><arg_value>[1, {\"b\": \"<é\"}]</arg_value>"
     "<arg_key>b</arg_key><arg_value>not json</arg_value><arg_key>c</arg_key><arg_value>NaN</arg_value></tool_call>",
     calls(("other", '{"a": [1, {"b": "<é"}], "b": "not json", "c": "NaN"}'))),
    ("minimax_m2", "go\n<minimax:tool_call>\n" + INVOKE.format("weather", "12", "3") + "\n"
     + INVOKE.format("o", "1", "x") + "\n</minimax:tool_call>\ndone",
     calls(("weather", '{"city": "12", "days": 3}'), ("o", '{"city": 1, "days": "x"}'), before="go", behind="\ndone")),
    ("minimax_m2", '<minimax:tool_call><invoke name="n"></invoke></minimax:tool_call>', calls(("n", "{}"))),
]  # fmt: skip

MALFORMED: list[tuple[str, str, list[Part]]] = [
    *((name, text, [Content(text)]) for name, text in [
        ("hermes", "<tool_call>no json</tool_call> and more"),
        ("hermes", "a <tool_call>[1]</tool_call>"),
        ("hermes", 'a\n <tool_call>{"name": 5, "arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "f", "arguments": "{}"}</tool_call>'),
        ("hermes", '<tool_call>{"name": "two words", "arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>{"arguments": {"a": 1}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "f", '),
        ("hermes", "text <tool_ca"),
        ("hermes", "<tool_call>" + " " * 600 + "{}"),
        ("deepseek_v3", "<｜tool▁calls▁begin｜>nothing<｜tool▁calls▁end｜>"),
        ("deepseek_v3", "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f {}<｜tool▁call▁end｜>"),
        ("kimi_k2", "<|tool_calls_section_begin|><|tool_call_begin|>noindex<|tool_call_argument_begin|>{}"),
        ("glm45", "<tool_call>two words\n<arg_key>a</arg_key>"),
        ("glm45", "<tool_call>f<arg_key>a</arg_key>\nvalue</tool_call>"),
        ("glm45", "<tool_call>f<arg_key>" + "k" * 400 + "</arg_key>"),
        ("minimax_m2", "<minimax:tool_call>\n<call>"),
        ("minimax_m2", '<minimax:tool_call><invoke name="f>'),
    ]),
    # Behind its beginning a call stays, unfinished, and the rest is content.
    ("hermes", 'a<tool_call>{"name": "f", "arguments": {"a": 1]}</tool_call>',
     calls(("f", '{"a": 1'), before="a", behind="]}</tool_call>")),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "cut of', calls(("f", '{"a": "cut of'))),
    ("glm45", "<tool_call>f<arg_key>a</arg_key><arg_value>1</arg_value>oops</tool_call>",
     calls(("f", '{"a": 1'), behind="oops</tool_call>")),
    ("glm45", "<tool_call>f<arg_key>a</arg_key><arg_value>1</arg_value><arg_key>b</arg_key><arg_value>2",
     calls(("f", '{"a": 1'), behind="<arg_key>b</arg_key><arg_value>2")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "wanted"), [*WELL_FORMED, *MALFORMED])
def test_calls(name: str, text: str, wanted: list[Part]) -> None:
    assert parse_whole(families.create_tool_parser(name, TOOLS), [text]) == wanted
    assert parse_whole(families.create_tool_parser(name, TOOLS), list(text)) == wanted


@pytest.mark.parametrize(("name", "text", "wanted"), WELL_FORMED)
def test_arguments_of_whole_calls_are_json(name: str, text: str, wanted: list[Part]) -> None:
    for part in wanted:
        if isinstance(part, ToolArguments):
            assert isinstance(json.loads(part.text), dict)


@pytest.mark.parametrize("name", ["hermes", "deepseek_v3", "kimi_k2"])
def test_json_arguments_come_in_pieces_as_they_are_written(name: str) -> None:
    text = {
        "hermes": '<tool_call>{"name": "f", "arguments": {"a": "long',
        "deepseek_v3": '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{"a": "long',
        "kimi_k2": '<|tool_calls_section_begin|><|tool_call_begin|>f:0<|tool_call_argument_begin|>{"a": "long',
    }[name]
    parser = families.create_tool_parser(name, {})
    first = parser.push(text)
    assert isinstance(first[0], ToolStart) and first[1] == ToolArguments(0, '{"a": "long')
    assert parser.push(' value"') == [ToolArguments(0, ' value"')]


TEXTS = [(name, text) for name, text, _ in [*WELL_FORMED, *MALFORMED]]


def pieces_of(text: str, cuts: list[int]) -> list[str]:
    places = sorted({min(cut, len(text)) for cut in cuts})
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


@given(st.sampled_from(TEXTS), st.lists(st.integers(0, 300), max_size=40), st.text("<>{}|\n a", max_size=20))
def test_any_cutting_gives_the_same(case: tuple[str, str], cuts: list[int], tail: str) -> None:
    name, text = case
    whole = parse_whole(families.create_tool_parser(name, TOOLS), [text + tail])
    assert parse_whole(families.create_tool_parser(name, TOOLS), pieces_of(text + tail, cuts)) == whole


MARKERS = sorted({marker for kind in families.TOOL_PARSERS.values() for marker in kind.markers()})
SOUP = st.lists(
    st.sampled_from([*MARKERS, "<think>", "</think>", '{"name": "f", "arguments": {"a": 1}}', "f", " ", "\n", '"',
                     "{", "}", "<", "functions.f:0", "function<｜tool▁sep｜>f\n```json\n", "```"]),
    max_size=25,
).map("".join)  # fmt: skip
NAMES = sorted(families.TOOL_PARSERS)


@given(st.sampled_from([*NAMES, ""]), SOUP, st.lists(st.integers(0, 300), max_size=40), st.booleans())
def test_any_cutting_of_anything_gives_the_same(name: str, text: str, cuts: list[int], thinks: bool) -> None:
    def fresh() -> Parser:
        reasoning = ReasoningParser("<think>\n" if len(text) % 2 else "") if thinks else None
        return families.OutputParser(reasoning, families.create_tool_parser(name, TOOLS) if name else None)

    assert parse_whole(fresh(), pieces_of(text, cuts)) == parse_whole(fresh(), [text])


@given(st.sampled_from(NAMES), st.text("ab <\n", max_size=60), st.lists(st.integers(0, 60), max_size=20))
def test_text_without_calls_is_content_as_it_is(name: str, text: str, cuts: list[int]) -> None:
    parts = parse_whole(families.create_tool_parser(name, TOOLS), pieces_of(text, cuts))
    assert parts == ([Content(text)] if text else [])


# --------------------------------------------------------------------------- reasoning


@pytest.mark.parametrize(
    ("prompt", "text", "reasoning", "content"),
    [
        ("", "<think>\nhm\n\nso\n</think>\n\nyes\n", "hm\n\nso", "yes\n"),
        ("", "\n<think>hm</think>yes", "hm", "yes"),
        ("", "just text, <think> later", "", "just text, <think> later"),
        ("", " <thin air", "", " <thin air"),
        ("...<think>\n", "hm\n</think>\nyes", "hm", "yes"),
        ("...<think>", "cut of", "cut of", ""),
        ("...<think>", "</think>yes", "", "yes"),
        ("...<think>\n\n</think>\n\n", "yes <think>", "", "yes <think>"),
        ("<think> in the user's words", "yes", "", "yes"),
    ],
)
def test_reasoning(prompt: str, text: str, reasoning: str, content: str) -> None:
    wanted = ([Reasoning(reasoning)] if reasoning else []) + ([Content(content)] if content else [])
    assert parse_whole(ReasoningParser(prompt), [text]) == wanted
    assert parse_whole(ReasoningParser(prompt), list(text)) == wanted


def test_calls_behind_thoughts() -> None:
    text = '<think>maybe <tool_call>\n</think>\n\n<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    parser = families.OutputParser(ReasoningParser(), families.create_tool_parser("hermes", {}))
    assert parse_whole(parser, list(text)) == [Reasoning("maybe <tool_call>"), *calls(("f", "{}"))]


# --------------------------------------------------------------------------- demanded calls


@pytest.mark.parametrize(
    ("create", "text", "wanted"),
    [
        (lambda: NamedParser("f"), '{"a": 1}', calls(("f", '{"a": 1}'))),
        (RequiredParser, '[{"name": "f", "parameters": {"a": [1]}}, {"name":"g","parameters":{}}]\n',
         calls(("f", '{"a": [1]}'), ("g", "{}"))),
        (RequiredParser, '[{"name": "f", "parameters": {"a"', calls(("f", '{"a"'))),
    ],
)  # fmt: skip
def test_demanded_calls(create: Callable[[], Parser], text: str, wanted: list[Part]) -> None:
    assert parse_whole(create(), [text]) == wanted == parse_whole(create(), list(text))


# --------------------------------------------------------------------------- JSON

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


@given(
    st.dictionaries(st.text(), JSON, max_size=4) | st.lists(JSON, max_size=4),
    st.booleans(),
    st.integers(0, 3),
)
def test_every_json_value_is_complete_with_its_last_character(
    value: object, ascii_only: bool, indent: int
) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent or None)
    checker = JsonText()
    for place, char in enumerate(text):
        assert not checker.is_complete and checker.take(char), (text, place)
    assert checker.is_complete


@given(st.text('{}[]",:\\0123456789.eE+-truefalsn \n\x01u', min_size=1, max_size=14))
def test_what_is_taken_whole_is_json_and_what_is_refused_is_not(inside: str) -> None:
    for whole in ("{" + inside, "[" + inside, '{"a":' + inside + "}", "[" + inside + "]", '["' + inside):
        text = whole.rstrip()  # nothing is taken behind the last character, not even blank space
        checker = JsonText()
        is_taken = all(checker.take(char) for char in text)
        try:
            json.loads(text, parse_constant=lambda word: word / 0)  # type: ignore[operator]
            is_json = True
        except (ValueError, TypeError):
            is_json = False
        assert (is_taken and checker.is_complete) == is_json, text


# --------------------------------------------------------------------------- choosing


@pytest.mark.parametrize(
    ("setting", "model_type", "template", "name"),
    [
        ("auto", "qwen3_moe", "... <tool_call> ...", "hermes"),
        ("auto", "qwen3_moe", "no calls", ""),
        ("auto", "deepseek_v3", "<｜tool▁call▁begin｜>", "deepseek_v3"),
        ("auto", "kimi_k2", "<|tool_call_begin|>", "kimi_k2"),
        ("auto", "glm4_moe", "<tool_call>", "glm45"),
        ("auto", "minimax_m2", '<invoke name="', "minimax_m2"),
        ("auto", "unheard_of", "<tool_call>", ""),
        ("none", "qwen3_moe", "<tool_call>", ""),
        ("hermes", "unheard_of", "", "hermes"),
    ],
)
def test_choosing_a_tool_parser(setting: str, model_type: str, template: str, name: str) -> None:
    assert families.tool_parser_name(setting, model_type, template) == name


def test_choosing_a_reasoning_parser() -> None:
    assert families.has_reasoning("auto", "{{ '<think>' }}") and not families.has_reasoning("auto", "plain")
    assert families.has_reasoning("qwen3", "") and not families.has_reasoning("none", "<think>")
    with pytest.raises(ConfigError, match="reasoning_parser"):
        families.has_reasoning("qwen9", "")
    with pytest.raises(ConfigError, match="tool_parser"):
        families.tool_parser_name("qwen9", "", "")
