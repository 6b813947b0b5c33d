"""What the gateway reads of a checkpoint folder: everything but the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from bus import config as settings
from bus.config import PodConfig
from bus.errors import ConfigError
from gateway.chat_template import ChatTemplate
from gateway.parsers import families
from gateway.text import JsonTokenizer, Tokenizer
from gateway.tiktoken_file import TiktokenTokenizer

_SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The served model as clients see it."""

    name: str
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None  # None: the checkpoint has none
    eos_token_ids: tuple[int, ...]
    window_tokens: int  # prompt and output together
    vocab_size: int  # of the model, which may be larger than the tokenizer's
    tool_parser: str = ""  # a name of `gateway.parsers.families`; "" = the family defines no calls
    has_reasoning: bool = False  # the model may think before it answers


def load(config: PodConfig) -> Checkpoint:
    """Read the folder that `config.model` names.

    Raises:
        ConfigError: not a folder, a file is missing or malformed, or `scheduler.max_model_len` is beyond the
            model's window.
    """
    folder = settings.model_path(config)
    if not folder.is_dir():
        raise ConfigError(f"model = {str(folder)!r}: is not a folder")
    model = _read_json(folder / "config.json")
    if model is None:
        raise ConfigError(f"model = {str(folder)!r}: has no config.json")
    tokenizer_settings = _read_json(folder / "tokenizer_config.json") or {}
    tokenizer = _tokenizer(folder)
    special_tokens = _special_tokens(tokenizer_settings)
    generation = _read_json(folder / "generation_config.json") or {}
    vocab_size = _positive(model, "vocab_size", folder)
    eos_token_ids = _eos_token_ids(generation, model, tokenizer.token_id(special_tokens.get("eos_token", "")))
    source = _template_source(folder, tokenizer_settings)
    chars_max = 4 * config.gateway.body_bytes_max
    model_type = str(model.get("model_type", ""))
    return Checkpoint(
        name=settings.model_name(config),
        tokenizer=tokenizer,
        chat_template=ChatTemplate(source, special_tokens, rendered_chars_max=chars_max) if source else None,
        eos_token_ids=tuple(token_id for token_id in eos_token_ids if token_id < vocab_size),
        window_tokens=_window_tokens(config, _positive(model, "max_position_embeddings", folder)),
        vocab_size=vocab_size,
        tool_parser=families.tool_parser_name(config.gateway.tool_parser, model_type, source or ""),
        has_reasoning=families.has_reasoning(config.gateway.reasoning_parser, source or ""),
    )


def _tokenizer(folder: Path) -> Tokenizer:
    if not (folder / "tokenizer.json").is_file() and (folder / "tiktoken.model").is_file():
        return TiktokenTokenizer.from_folder(folder)
    return JsonTokenizer.from_folder(folder)


def _read_json(path: Path) -> dict[str, object] | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, object])
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError, msgspec.MsgspecError) as error:
        raise ConfigError(f"{path}: {error}") from None


def _positive(model: Mapping[str, object], name: str, folder: Path) -> int:
    value = model.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{folder / 'config.json'}: {name} = {value!r}: must be a positive integer")
    return value


def _window_tokens(config: PodConfig, model_window: int) -> int:
    max_model_len = config.scheduler.max_model_len
    if max_model_len > model_window:
        rule = f"must not be beyond the model's window of {model_window} tokens"
        raise ConfigError(f"scheduler.max_model_len = {max_model_len}: {rule}")
    return min(max_model_len or model_window, config.kv.cache_tokens)


def _eos_token_ids(
    generation: Mapping[str, object], model: Mapping[str, object], tokenizer_eos: int | None
) -> tuple[int, ...]:
    """Every id that ends a text: of the generation settings or else the model's, and the tokenizer's."""
    declared = generation.get("eos_token_id", model.get("eos_token_id"))
    candidates = declared if isinstance(declared, list) else [declared]
    ids = [value for value in [*candidates, tokenizer_eos] if isinstance(value, int) and value >= 0]
    return tuple(dict.fromkeys(ids))


def _special_tokens(tokenizer_settings: Mapping[str, object]) -> dict[str, str]:
    tokens = {}
    for name in _SPECIAL_TOKENS:
        value = tokenizer_settings.get(name)
        content = value.get("content") if isinstance(value, dict) else value
        if isinstance(content, str):
            tokens[name] = content
    return tokens


def _template_source(folder: Path, tokenizer_settings: Mapping[str, object]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: {error}") from None
    value = tokenizer_settings.get("chat_template")
    if isinstance(value, list):  # several named ones
        named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
        value = named.get("default")
    return value if isinstance(value, str) else None
