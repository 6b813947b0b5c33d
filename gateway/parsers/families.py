"""Which parser a model family's text wants. Names are vLLM's."""

from __future__ import annotations

from collections.abc import Mapping

from bus.errors import ConfigError
from gateway.parsers.deepseek_v3 import DeepSeekV3Parser
from gateway.parsers.glm4 import Glm4Parser
from gateway.parsers.hermes import HermesParser
from gateway.parsers.kimi_k2 import KimiK2Parser
from gateway.parsers.minimax_m2 import MiniMaxM2Parser
from gateway.parsers.parts import Content, Parser, Part, joined
from gateway.parsers.reasoning import CLOSE, OPEN, ReasoningParser
from gateway.parsers.tagged import TaggedParser, Tools
from gateway.parsers.tools import ToolParser

TOOL_PARSERS: Mapping[str, type[ToolParser]] = {
    "deepseek_v3": DeepSeekV3Parser,
    "glm45": Glm4Parser,
    "hermes": HermesParser,
    "kimi_k2": KimiK2Parser,
    "minimax_m2": MiniMaxM2Parser,
}
REASONING_PARSERS = frozenset({"deepseek_r1", "glm45", "kimi_k2", "minimax_m2", "qwen3"})  # one and the same
_TOOL_PARSER_OF_FAMILY = {
    "deepseek_v3": "deepseek_v3",
    "kimi_k2": "kimi_k2",
    "glm4_moe": "glm45",
    "glm4": "glm45",
    "minimax_m2": "minimax_m2",
    "qwen2": "hermes",
    "qwen3": "hermes",
    "qwen3_moe": "hermes",
}


def tool_parser_name(setting: str, model_type: str, template: str) -> str:
    """Return the tool parser to use, "" for none. "auto": the family's, if the chat template writes such calls.

    Raises:
        ConfigError: an unknown name.
    """
    if setting == "auto":
        name = _TOOL_PARSER_OF_FAMILY.get(model_type, "")
        return name if name and TOOL_PARSERS[name].call in template else ""
    if setting not in (*TOOL_PARSERS, "none"):
        known = ", ".join(("auto", "none", *sorted(TOOL_PARSERS)))
        raise ConfigError(f"gateway.tool_parser = {setting!r}: must be one of {known}")
    return "" if setting == "none" else setting


def has_reasoning(setting: str, template: str) -> bool:
    """Tell whether reasoning is parsed. "auto": if the chat template knows of thoughts.

    Raises:
        ConfigError: an unknown name.
    """
    if setting == "auto":
        return OPEN in template or CLOSE in template
    if setting not in (*REASONING_PARSERS, "none"):
        known = ", ".join(("auto", "none", *sorted(REASONING_PARSERS)))
        raise ConfigError(f"gateway.reasoning_parser = {setting!r}: must be one of {known}")
    return setting != "none"


def create_tool_parser(name: str, tools: Tools) -> ToolParser:
    """Return a fresh parser of that name."""
    kind = TOOL_PARSERS[name]
    return kind(tools) if issubclass(kind, TaggedParser) else kind()


def writes_arguments_as_text(tool_parser: str) -> bool:
    """Tell whether the family's chat template takes a call's arguments as JSON text, not as an object."""
    return tool_parser == "deepseek_v3"


class OutputParser:
    """Reasoning first, then calls among the content; either may be missing."""

    def __init__(self, reasoning: ReasoningParser | None, tools: Parser | None) -> None:
        self._reasoning = reasoning
        self._tools = tools

    def push(self, text: str) -> list[Part]:
        """Take the next piece; return what has become certain."""
        return self._through_tools(self._reasoning.push(text) if self._reasoning else [Content(text)])

    def finish(self) -> list[Part]:
        """Return the rest, as no more text comes."""
        rest = self._through_tools(self._reasoning.finish() if self._reasoning else [])
        return joined([*rest, *(self._tools.finish() if self._tools else [])])

    def _through_tools(self, parts: list[Part]) -> list[Part]:
        out: list[Part] = []
        for part in parts:
            if isinstance(part, Content) and self._tools is not None:
                out += self._tools.push(part.text)
            else:
                out.append(part)
        return joined(out)
