"""Request bodies as clients send them: shapes and types only. What the values mean is `gateway.parameters`.

Unknown fields and wrong types are refused with the field's name. Fields of OpenAI's and vLLM's APIs that
this gateway does not act upon are declared too, because clients send them at their neutral value; any
other value of one is refused by `gateway.parameters`, never ignored. Fields that change nothing (`user`,
`metadata`, ...) are taken.
"""

from __future__ import annotations

import re
from typing import Literal, TypeVar

import msgspec

from gateway.errors import ApiError

_UNKNOWN_FIELD = re.compile(r"unknown field `(?P<field>[^`]*)`")
_PATH = re.compile(r"`\$\.?(?P<path>[^`]*)`$")

JsonObject = dict[str, object]
Body = TypeVar("Body", bound=msgspec.Struct)


class StreamOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Of `stream: true`."""

    include_usage: bool = False
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class JsonSchemaFormat(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Of `response_format`. `name`, `description` and `strict` change nothing: the schema always holds."""

    schema: JsonObject | bool
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """OpenAI's `response_format`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """vLLM's `structured_outputs`. `grammar` is Lark or GBNF."""

    json: JsonObject | str | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool | None = None
    whitespace_pattern: str | None = None


class SamplingBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Fields that both completion bodies have."""

    model: str | None = None  # None = the one that is served
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None  # 0 or -1 = all
    n: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    max_tokens: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    skip_special_tokens: bool | None = None
    request_id: str | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None  # token id -> -100..100
    include_stop_str_in_output: bool | None = None
    prompt_logprobs: int | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: JsonObject | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None

    # only at their neutral value
    priority: int | None = None
    cache_salt: str | None = None
    kv_transfer_params: JsonObject | None = None
    spaces_between_special_tokens: bool | None = None
    use_beam_search: bool | None = None
    length_penalty: float | None = None

    # change nothing
    user: str | None = None
    metadata: JsonObject | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    store: bool | None = None


class CompletionBody(SamplingBody, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/completions`."""

    prompt: str | list[str | int | list[int]]
    echo: bool | None = None
    logprobs: int | None = None
    best_of: int | None = None
    suffix: str | None = None
    add_special_tokens: bool | None = None


class FunctionSpec(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A function that the model may call; `parameters` is a JSON schema."""

    name: str
    description: str | None = None
    parameters: JsonObject | None = None
    strict: bool | None = None


class ToolSpec(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """One of `tools`; chat templates see the fields in this order."""

    type: Literal["function"] = "function"
    function: FunctionSpec


class NamedFunction(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Of `tool_choice`."""

    name: str


class NamedTool(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`tool_choice` that names a function."""

    function: NamedFunction
    type: Literal["function"] = "function"


class CalledFunction(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What was called; `arguments` is JSON text."""

    name: str
    arguments: str


class ToolCall(msgspec.Struct, kw_only=True):
    """A call in an earlier turn of the assistant."""

    function: CalledFunction
    id: str | None = None
    type: Literal["function"] = "function"


class ChatMessage(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """One turn. Only text parts of `content` are understood."""

    role: str
    content: str | list[JsonObject] | None = None
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: list[ToolCall] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None  # another name for it
    refusal: str | None = None
    audio: JsonObject | None = None
    annotations: list[JsonObject] | None = None
    function_call: JsonObject | None = None


class ChatBody(SamplingBody, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/chat/completions`."""

    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: JsonObject | None = None
    tools: list[ToolSpec] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    include_reasoning: bool | None = None

    # only at their neutral value
    functions: list[JsonObject] | None = None
    function_call: str | JsonObject | None = None
    echo: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    documents: list[JsonObject] | None = None
    add_special_tokens: bool | None = None
    modalities: list[str] | None = None
    audio: JsonObject | None = None
    prediction: JsonObject | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    web_search_options: JsonObject | None = None


class TokenizeBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`POST /tokenize`: a `prompt`, or `messages` through the chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: JsonObject | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`POST /detokenize`."""

    tokens: list[int]
    model: str | None = None


def decode(body: bytes, kind: type[Body]) -> Body:
    """Return the body as `kind`.

    Raises:
        ApiError: 400; not JSON, an unknown field, a missing one, or a wrong type.
    """
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise ApiError(400, "invalid_type", str(error), param=_param(str(error))) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(400, "invalid_json", f"the body is not valid JSON: {error}") from None


def _param(text: str) -> str | None:
    """Return the name of the field that msgspec complains about, e.g. `stream_options.foo`."""
    path = _PATH.search(text)
    parts = [path["path"].split("[")[0]] if path else []
    field = _UNKNOWN_FIELD.search(text) or re.search(r"required field `(?P<field>[^`]*)`", text)
    if field:
        parts.append(field["field"])
    return ".".join(part for part in parts if part) or None
