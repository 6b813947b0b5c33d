"""Calls that the client demands (`tool_choice`): the output is held to a grammar, so it is plain JSON.

A named function: the text is its arguments. "required": the text is a list of `{"name": ..., "parameters": ...}`.
"""

from __future__ import annotations

from collections.abc import Mapping

from gateway.parsers.hermes import HermesParser
from gateway.parsers.parts import Part, ToolArguments, ToolStart

Schema = Mapping[str, object]


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
    """Return the JSON schema of a list of calls."""
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": name}, "parameters": parameters or {"type": "object"}},
            "required": ["name", "parameters"],
            "additionalProperties": False,
        }
        for name, parameters in tools.items()
    ]
    schema: dict[str, object] = {"type": "array", "minItems": 1, "items": {"anyOf": calls}}
    return schema if parallel else {**schema, "maxItems": 1}
