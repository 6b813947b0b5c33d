"""GLM-4.5: `<tool_call>NAME`, then `<arg_key>K</arg_key><arg_value>V</arg_value>` pairs, then `</tool_call>`."""

from __future__ import annotations

from gateway.parsers.tagged import TaggedParser


class Glm4Parser(TaggedParser):
    """See the module's docstring."""

    call = "<tool_call>"
    header_end = "<"
    key_begin = "<arg_key>"
    key_end = "</arg_key>"
    value_end = "</arg_value>"
    call_end = "</tool_call>"

    @classmethod
    def markers(cls) -> tuple[str, ...]:
        """Return texts of which a tokenizer may make special tokens."""
        return (*super().markers(), "<arg_value>")

    def _read_header(self, header: str) -> tuple[str, str] | None:
        return header.strip(), ""

    def _behind_key(self) -> bool:
        return self._expect({"<arg_value>": self._read_value}, otherwise=self._malformed)
