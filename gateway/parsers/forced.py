"""Calls that the client demands (`tool_choice`): the output is held to a grammar, so it is plain JSON.

A named function: the text is its arguments. "required": the text is a list of `{"name": ..., "parameters": ...}`.
"""

from __future__ import annotations

from collections.abc import Mapping

from gateway.parsers.hermes import HermesParser
from gateway.parsers.parts import Part, ToolArguments, ToolStart

Schema = Mapping[str, object]
_DEFINITIONS = ("$defs", "definitions")


class NamedParser:
    """All text is the arguments of one call."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._has_started = False

    def push(self, text: str) -> list[Part]:
        """Take the next piece; return what has become certain."""
        start: list[Part] = [] if self._has_started or not text else [ToolStart(0, self._name)]
        self._has_started = self._has_started or bool(text)
        return [*start, ToolArguments(0, text)] if text else []

    def finish(self) -> list[Part]:
        """Nothing is held back."""
        return []


class RequiredParser(HermesParser):
    """A JSON list of calls."""

    section = "["
    section_end = "]"
    call = ""
    call_ends = (",", "]")

    def _in_section(self) -> bool:
        self._state = self._header
        return True

    def _behind_body(self) -> bool:
        return self._expect({",": self._header, "]": self._behind_calls}, otherwise=self._behind_calls)


def required_schema(tools: Mapping[str, Schema], *, parallel: bool) -> dict[str, object]:
    """Return the JSON schema of a list of calls. Definitions move to its top, where references find them."""
    definitions: dict[str, object] = {}
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": name},
                "parameters": _moved(name, parameters or {"type": "object"}, definitions),
            },
            "required": ["name", "parameters"],
            "additionalProperties": False,
        }
        for name, parameters in tools.items()
    ]
    schema: dict[str, object] = {"type": "array", "minItems": 1, "items": {"anyOf": calls}}
    if not parallel:
        schema["maxItems"] = 1
    return {**schema, "$defs": definitions} if definitions else schema


def _moved(tool: str, schema: Schema, definitions: dict[str, object]) -> object:
    """Return a tool's schema without its definitions, which go to `definitions` under the tool's name."""
    for keyword in _DEFINITIONS:
        own = schema.get(keyword)
        for name, definition in own.items() if isinstance(own, dict) else ():
            definitions[f"{tool}.{name}"] = _renamed(tool, definition)
    return _renamed(tool, {key: value for key, value in schema.items() if key not in _DEFINITIONS})


def _renamed(tool: str, value: object) -> object:
    if isinstance(value, list):
        return [_renamed(tool, one) for one in value]
    if not isinstance(value, dict):
        return value
    renamed = {key: _renamed(tool, one) for key, one in value.items()}
    reference = str(value.get("$ref", ""))
    for keyword in _DEFINITIONS:
        if reference.startswith(f"#/{keyword}/"):
            renamed["$ref"] = f"#/$defs/{tool}.{reference.removeprefix(f'#/{keyword}/')}"
    return renamed
