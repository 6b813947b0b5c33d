"""MiniMax M2: `<minimax:tool_call>` around `<invoke name="NAME">`, `<parameter name="K">V</parameter>`, `</invoke>`."""

from __future__ import annotations

from gateway.parsers.tagged import TaggedParser


class MiniMaxM2Parser(TaggedParser):
    """See the module's docstring."""

    section = "<minimax:tool_call>"
    section_end = "</minimax:tool_call>"
    call = '<invoke name="'
    header_end = ">"
    key_begin = '<parameter name="'
    key_end = '">'
    value_end = "</parameter>"
    call_end = "</invoke>"

    def _read_header(self, header: str) -> tuple[str, str] | None:
        return (header[:-1], "") if header.endswith('"') else None

    def _body(self) -> bool:
        if not self._buffer:
            return self._malformed() if self._is_final else False
        self._take_raw(1)  # the header's end
        self._num_arguments = 0
        self._state = self._expect_argument
        return True

    def _behind_key(self) -> bool:
        self._state = self._read_value
        return True
