"""DeepSeek V3, R1 and V3.1. Calls stand in a section, names before arguments:

V3, R1:  `<｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME`, a line "```json", the arguments, a line "```",
         `<｜tool▁call▁end｜>`
V3.1:    `<｜tool▁call▁begin｜>NAME<｜tool▁sep｜>` arguments `<｜tool▁call▁end｜>`
"""

from __future__ import annotations

import re

from gateway.parsers.tools import ToolParser

_SEPARATOR = "<｜tool▁sep｜>"
_HEADER = re.compile(rf"\s*function{_SEPARATOR}\s*(\S+)\s*```json\s*|\s*(\S+?){_SEPARATOR}\s*")


class DeepSeekV3Parser(ToolParser):
    """See the module's docstring."""

    section = "<｜tool▁calls▁begin｜>"
    section_end = "<｜tool▁calls▁end｜>"
    call = "<｜tool▁call▁begin｜>"
    call_ends = ("```<｜tool▁call▁end｜>", "```\n<｜tool▁call▁end｜>", "<｜tool▁call▁end｜>")
    header_end = "{"

    @classmethod
    def markers(cls) -> tuple[str, ...]:
        """Return texts of which a tokenizer may make special tokens."""
        return (*super().markers(), _SEPARATOR)

    def _read_header(self, header: str) -> tuple[str, str] | None:
        match = _HEADER.fullmatch(header)
        return (match[1] or match[2], "") if match else None

    def _body(self) -> bool:
        return self._json_body()
