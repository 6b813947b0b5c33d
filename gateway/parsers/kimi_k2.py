"""Kimi K2: `<|tool_call_begin|>functions.NAME:0<|tool_call_argument_begin|>{...}<|tool_call_end|>` in a section.

The model gives each call its id, which its template wants back with the tool's answer.
"""

from __future__ import annotations

import re

from gateway.parsers.tools import ToolParser

_ARGUMENTS = "<|tool_call_argument_begin|>"
_HEADER = re.compile(rf"\s*((?:functions\.)?([\w.\-]+):\d+)\s*{re.escape(_ARGUMENTS)}\s*")


class KimiK2Parser(ToolParser):
    """See the module's docstring."""

    section = "<|tool_calls_section_begin|>"
    section_end = "<|tool_calls_section_end|>"
    call = "<|tool_call_begin|>"
    call_ends = ("<|tool_call_end|>",)
    header_end = "{"

    @classmethod
    def markers(cls) -> tuple[str, ...]:
        """Return texts of which a tokenizer may make special tokens."""
        return (*super().markers(), _ARGUMENTS)

    def _read_header(self, header: str) -> tuple[str, str] | None:
        match = _HEADER.fullmatch(header)
        return (match[2], match[1]) if match else None

    def _body(self) -> bool:
        return self._json_body()
