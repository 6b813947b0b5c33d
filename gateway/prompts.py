"""From a body to prompt token ids: plain prompts, token ids, chat messages."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from gateway.checkpoint import Checkpoint
from gateway.errors import ApiError, invalid
from gateway.parameters import check_token_ids
from gateway.parsers import families
from gateway.schemas import ChatMessage, CompletionBody, JsonObject, ToolCall, ToolSpec

_PROMPTS_MAX = 256
_INLINE_CHARS_MAX = 16_384  # a longer text is tokenised in a thread, so that streams do not stutter


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt: ids, and the text that `echo` repeats."""

    token_ids: tuple[int, ...]
    text: str


async def encode(checkpoint: Checkpoint, text: str, *, add_special_tokens: bool) -> list[int]:
    """Return the token ids of `text`."""
    if len(text) <= _INLINE_CHARS_MAX:
        return checkpoint.tokenizer.encode(text, add_special_tokens=add_special_tokens)
    return await asyncio.to_thread(checkpoint.tokenizer.encode, text, add_special_tokens=add_special_tokens)


async def completion_prompts(body: CompletionBody, checkpoint: Checkpoint) -> list[Prompt]:
    """Return the prompts of a `/v1/completions` body.

    Raises:
        ApiError: 400; no prompt, a mixture of kinds, or an id that the model does not have.
    """
    add_special_tokens = body.add_special_tokens is not False
    prompts: list[Prompt] = []
    for item in _items(body.prompt):
        if isinstance(item, str):
            token_ids = await encode(checkpoint, item, add_special_tokens=add_special_tokens)
            prompts.append(Prompt(tuple(token_ids), item))
        else:
            check_token_ids("prompt", item, checkpoint.vocab_size)
            text = checkpoint.tokenizer.decode(item, skip_special_tokens=False) if body.echo else ""
            prompts.append(Prompt(tuple(item), text))
    return prompts


def _items(prompt: str | Sequence[str | int | list[int]]) -> Sequence[str | list[int]]:
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise invalid("prompt", prompt, "must not be empty")
    numbers = [item for item in prompt if isinstance(item, int)]
    if len(numbers) == len(prompt):
        return [numbers]
    items = [item for item in prompt if not isinstance(item, int)]
    if len({type(item) for item in prompt}) > 1:
        raise invalid("prompt", prompt, "must be text, texts, token ids or lists of token ids, not a mixture")
    if len(items) > _PROMPTS_MAX:
        raise invalid("prompt", f"{len(items)} prompts", f"must be at most {_PROMPTS_MAX}")
    return items


async def chat_prompt(
    messages: Sequence[ChatMessage],
    checkpoint: Checkpoint,
    *,
    add_generation_prompt: bool,
    template_kwargs: Mapping[str, object] | None,
    tools: Sequence[ToolSpec] = (),
) -> Prompt:
    """Return the prompt that the chat template makes of the messages.

    Raises:
        ApiError: 400; no messages, something but text in them, no template, or the template refuses them.
    """
    if checkpoint.chat_template is None:
        text = "the model has no chat template; use /v1/completions"
        raise ApiError(400, "no_chat_template", text, param="messages")
    if not messages:
        raise invalid("messages", [], "must not be empty")
    as_text = families.writes_arguments_as_text(checkpoint.tool_parser)
    turns = [_turn(message, place, arguments_as_text=as_text) for place, message in enumerate(messages)]
    rendered = await asyncio.to_thread(  # streams go on while a template is slow
        checkpoint.chat_template.render,
        turns,
        tools=[msgspec.to_builtins(tool) for tool in tools],
        add_generation_prompt=add_generation_prompt,
        extra=template_kwargs,
    )
    return Prompt(tuple(await encode(checkpoint, rendered, add_special_tokens=False)), rendered)


def _turn(message: ChatMessage, place: int, *, arguments_as_text: bool) -> dict[str, object]:
    """Return what the template sees: only the fields that are set."""
    for name in ("function_call", "audio"):
        if getattr(message, name):
            raise invalid(f"messages[{place}].{name}", getattr(message, name), "is not supported yet")
    turn: dict[str, object] = {"role": message.role, "content": _content(message, place)}
    reasoning = message.reasoning_content if message.reasoning_content is not None else message.reasoning
    for name, value in (
        ("name", message.name),
        ("tool_call_id", message.tool_call_id),
        ("reasoning_content", reasoning),
    ):
        if value is not None:
            turn[name] = value
    if message.tool_calls:
        where = f"messages[{place}].tool_calls"
        calls = [_call(call, where, as_text=arguments_as_text) for call in message.tool_calls]
        turn["tool_calls"] = calls
    return turn


def _call(call: ToolCall, where: str, *, as_text: bool) -> dict[str, object]:
    """Return an earlier call for the template; most templates want its arguments as an object."""
    arguments: object = call.function.arguments
    if not as_text:
        try:
            arguments = msgspec.json.decode(call.function.arguments or "{}", type=dict[str, object])
        except (msgspec.MsgspecError, RecursionError):
            raise invalid(f"{where}.function.arguments", arguments, "must be a JSON object") from None
    function = {"name": call.function.name, "arguments": arguments}
    return {"id": call.id, "type": "function", "function": function}


def _content(message: ChatMessage, place: int) -> str:
    if isinstance(message.content, str):
        return message.content
    if message.content is None:
        if message.role == "assistant":
            return ""
        raise invalid(f"messages[{place}].content", None, "must be text")
    return "\n".join(_text_part(part, place) for part in message.content)


def _text_part(part: JsonObject, place: int) -> str:
    text = part.get("text")
    if part.get("type") != "text" or not isinstance(text, str):
        raise invalid(
            f"messages[{place}].content", part, 'only parts {"type": "text", "text": ...} are supported'
        )
    return text
