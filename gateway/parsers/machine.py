"""The base of the incremental parsers: a buffer, a state, and steps that decide only on what cannot change.

A state is a method that looks at the buffer, takes from it, and returns True when it did something. It must
decide the same whether the text behind what it looks at has arrived or not: it waits while a marker may still
be completed. That is what makes results independent of how text was cut.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gateway.parsers.parts import Part, joined


class Machine:
    """Subclasses set `_state` and write states."""

    def __init__(self, state: Callable[[], bool]) -> None:
        self._state = state
        self._buffer = ""
        self._is_final = False
        self._out: list[Part] = []

    def push(self, text: str) -> list[Part]:
        """Take the next piece; return what has become certain."""
        self._buffer += text
        return self._run()

    def finish(self) -> list[Part]:
        """Return the rest, as no more text comes."""
        self._is_final = True
        return self._run()

    def _run(self) -> list[Part]:
        while self._state():
            pass
        out, self._out = self._out, []
        return joined(out)

    def _take(self, length: int) -> str:
        text, self._buffer = self._buffer[:length], self._buffer[length:]
        return text

    def _take_spaces(self) -> str:
        return self._take(len(self._buffer) - len(self._buffer.lstrip()))

    def _starts_with(self, markers: Sequence[str]) -> str | None:
        """Return the marker that the buffer starts with, None when it cannot be told yet, "" for none."""
        for marker in markers:
            if self._buffer.startswith(marker):
                return marker
        could_be = any(marker.startswith(self._buffer) for marker in markers)
        return None if could_be and not self._is_final else ""


def num_held(text: str, marker: str) -> int:
    """Return the length of the longest end of `text` that begins `marker`."""
    for length in range(min(len(marker) - 1, len(text)), 0, -1):
        if text.endswith(marker[:length]):
            return length
    return 0
