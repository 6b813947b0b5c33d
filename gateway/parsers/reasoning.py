"""`<think>...</think>` before the answer: DeepSeek R1, Qwen3, GLM-4.5, Kimi K2 Thinking, MiniMax M2.

The prompt may have opened the thinking already (its template ends with `<think>`); otherwise the model's text
has to begin with it, or there is none. Line breaks around the thoughts, and before the answer, are left out.
"""

from __future__ import annotations

from collections.abc import Callable

from gateway.parsers.machine import Machine, num_held
from gateway.parsers.parts import Content, Reasoning

OPEN, CLOSE = "<think>", "</think>"


def is_open(prompt: str) -> bool:
    """Tell whether the prompt ends in the middle of thinking."""
    return prompt.rstrip().endswith(OPEN)


def is_closed(prompt: str) -> bool:
    """Tell whether the prompt ends with thinking that is over, as templates write it to suppress it."""
    return prompt.rstrip().endswith(CLOSE)


class ReasoningParser(Machine):
    """`prompt`: the text before the model's own."""

    def __init__(self, prompt: str = "") -> None:
        super().__init__(self._begin)
        if is_open(prompt):
            self._state = self._before_thoughts
        elif is_closed(prompt):
            self._state = self._before_content

    def _begin(self) -> bool:
        text = self._buffer.lstrip()
        if text.startswith(OPEN):
            self._take(len(self._buffer) - len(text) + len(OPEN))
            self._state = self._before_thoughts
            return True
        if OPEN.startswith(text) and not self._is_final:
            return False
        self._state = self._content
        return True

    def _before_thoughts(self) -> bool:
        return self._skip_line_breaks(self._thoughts)

    def _before_content(self) -> bool:
        return self._skip_line_breaks(self._content)

    def _skip_line_breaks(self, then: Callable[[], bool]) -> bool:
        self._take(len(self._buffer) - len(self._buffer.lstrip("\n")))
        if not self._buffer:
            return False
        self._state = then
        return True

    def _thoughts(self) -> bool:
        place = self._buffer.find(CLOSE)
        if place >= 0:
            self._out.append(Reasoning(self._take(place).rstrip("\n")))
            self._take(len(CLOSE))
            self._state = self._before_content
            return True
        ready = self._buffer
        if not self._is_final:
            ready = ready[: len(ready) - num_held(ready, CLOSE)]
        ready = ready.rstrip("\n")
        self._out.append(Reasoning(self._take(len(ready))))
        if self._is_final:
            self._buffer = ""
        return False

    def _content(self) -> bool:
        self._out.append(Content(self._take(len(self._buffer))))
        return False
