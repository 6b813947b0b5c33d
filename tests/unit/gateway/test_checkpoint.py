"""What the gateway reads of a checkpoint folder, and what it says when it cannot."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import msgspec
import pytest

from bus.config import GatewayConfig, KvConfig, PodConfig, SchedulerConfig
from bus.errors import ConfigError
from gateway import checkpoint
from gateway.chat_template import ChatTemplate
from gateway.errors import ApiError
from tests.harness.gateway_world import END, TOKENIZER

MODEL = {"vocab_size": 300, "max_position_embeddings": 128, "eos_token_id": 7}


def folder(tmp_path: Path, **files: object) -> Path:
    """A checkpoint without weights."""
    path = tmp_path / "tiny-model"
    path.mkdir()
    contents = {"config": MODEL, "tokenizer": json.loads(TOKENIZER._tokenizer.to_str()), **files}
    for name, content in contents.items():
        if isinstance(content, str):
            (path / f"{name}.jinja").write_text(content)
        elif content is not None:
            (path / f"{name}.json").write_text(json.dumps(content))
    return path


def config(path: Path, **sections: object) -> PodConfig:
    return PodConfig(model=str(path), **sections)  # type: ignore[arg-type]


def test_a_folder_is_read(tmp_path: Path) -> None:
    path = folder(
        tmp_path,
        tokenizer_config={"eos_token": {"content": "<|end|>"}, "chat_template": "{{ eos_token }}"},
        generation_config={"eos_token_id": [5, 9]},
    )
    found = checkpoint.load(config(path))
    assert (found.name, found.window_tokens, found.vocab_size) == ("tiny-model", 128, 300)
    assert found.eos_token_ids == (5, 9, END)
    assert found.chat_template is not None and found.chat_template.render([]) == "<|end|>"
    named = msgspec.structs.replace(config(path), gateway=GatewayConfig(served_model_name="other"))
    assert checkpoint.load(named).name == "other"


def test_the_model_says_which_token_ends_when_nobody_else_does(tmp_path: Path) -> None:
    found = checkpoint.load(config(folder(tmp_path)))
    assert found.eos_token_ids == (7,) and found.chat_template is None


def test_parsers_follow_the_family_and_its_template(tmp_path: Path) -> None:
    model = {**MODEL, "model_type": "qwen3_moe"}
    path = folder(tmp_path, config=model, chat_template="<tool_call> <think> </think>")
    found = checkpoint.load(config(path))
    assert (found.tool_parser, found.has_reasoning) == ("hermes", True)
    off = GatewayConfig(tool_parser="none", reasoning_parser="none")
    found = checkpoint.load(config(path, gateway=off))
    assert (found.tool_parser, found.has_reasoning) == ("", False)
    with pytest.raises(ConfigError, match="tool_parser"):
        checkpoint.load(config(path, gateway=GatewayConfig(tool_parser="nonsense")))


def test_a_tiktoken_checkpoint(tmp_path: Path) -> None:
    settings = {
        "tokenizer_class": "TikTokenTokenizer",
        "eos_token": "[EOS]",
        "added_tokens_decoder": {"257": {"content": "[EOS]", "special": True}},
    }
    path = folder(tmp_path, tokenizer=None, tokenizer_config=settings)
    lines = [base64.b64encode(bytes([byte])) + b" %d" % byte for byte in range(256)]
    (path / "tiktoken.model").write_bytes(b"\n".join(lines))
    found = checkpoint.load(config(path))
    assert found.tokenizer.encode("hi[EOS]", add_special_tokens=True) == [104, 105, 257]
    assert found.eos_token_ids == (7, 257)


def test_a_template_of_its_own_file_wins(tmp_path: Path) -> None:
    path = folder(tmp_path, chat_template="from file", tokenizer_config={"chat_template": "from config"})
    template = checkpoint.load(config(path)).chat_template
    assert template is not None and template.render([]) == "from file"


def test_a_named_template(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    template = checkpoint.load(
        config(folder(tmp_path, tokenizer_config={"chat_template": named}))
    ).chat_template
    assert template is not None and template.render([]) == "yes"


@pytest.mark.parametrize(
    ("sections", "window"),
    [
        ({"scheduler": SchedulerConfig(max_model_len=64)}, 64),
        ({"kv": KvConfig(cache_tokens=32)}, 32),
        ({}, 128),
    ],
)
def test_the_window(tmp_path: Path, sections: dict[str, object], window: int) -> None:
    assert checkpoint.load(config(folder(tmp_path), **sections)).window_tokens == window


def test_a_window_beyond_the_models(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"scheduler\.max_model_len = 129.*128"):
        checkpoint.load(config(folder(tmp_path), scheduler=SchedulerConfig(max_model_len=129)))


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"config": None}, "has no config.json"),
        ({"tokenizer": None}, "has no tokenizer.json"),
        ({"tokenizer": {}}, "not a tokenizer"),
        ({"config": []}, "config.json"),
        ({"config": {**MODEL, "vocab_size": "many"}}, "vocab_size = 'many'"),
        ({"config": {"vocab_size": 3}}, "max_position_embeddings = None"),
        ({"chat_template": "{% for %}"}, "does not parse"),
    ],
)
def test_bad_folders(tmp_path: Path, files: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as error:
        checkpoint.load(config(folder(tmp_path, **files)))
    assert "\n" not in str(error.value)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a folder"):
        checkpoint.load(config(tmp_path / "nowhere"))


# --------------------------------------------------------------------------- templates


def render(source: str, **extra: object) -> str:
    template = ChatTemplate(source, {"bos_token": "<s>"}, rendered_chars_max=1000, render_ms_max=200)
    return template.render([{"role": "user", "content": "hi <b>"}], extra=extra)


def test_what_templates_of_checkpoints_use() -> None:
    assert render("{{ bos_token }}{{ messages[0]['content'] }}") == "<s>hi <b>"
    assert render("{{ messages | tojson }}") == '[{"role": "user", "content": "hi <b>"}]'
    assert render("{% generation %}x{% endgeneration %}") == "x"
    assert render("{% for n in [1, 2] %}{% break %}{% endfor %}{{ mood }}", mood="!") == "!"
    assert len(render("{{ strftime_now('%Y') }}")) == 4
    assert render("{% if tools %}no{% endif %}{% if add_generation_prompt %}yes{% endif %}") == "yes"


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('no') }}",
        "{{ messages[0].missing.deeper }}",
        "{{ 1 / 0 }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{% for n in range(100000000) %}x{% endfor %}",
        "{% for n in range(1001) %}x{% endfor %}",
        "{{ messages + 1 }}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
        "{{ 'a' * 10000000000 }}",
        "{{ [1] * 10000000000 | length }}",
        "{{ 10 ** 10 ** 10 }}",
        "{{ none * 3 }}",
    ],
)
def test_what_goes_wrong_in_a_template_is_the_clients_error(source: str) -> None:
    with pytest.raises(ApiError) as error:
        render(source)
    assert error.value.status == 400 and error.value.code == "chat_template_error"


def test_a_template_may_use_all_kinds_of_blocks() -> None:
    source = (
        "{% macro twice(x) %}{{ x * 2 }}{% endmacro %}"
        "{% macro box() %}[{{ caller() }}]{% endmacro %}{% set y %}{% if true %}b{% endif %}{% endset %}"
        "{% for n in [1, 2] recursive %}{{ twice('a') }}{% else %}{% endfor %}{{ y }}{{ 3 * 4 }}{{ 2 ** 3 }}"
        "{% filter upper %}c{% endfilter %}{% call box() %}d{% endcall %}{{ '-' * 3 }}"
    )
    assert render(source) == "aaaab128C[d]---"


def test_the_client_cannot_set_what_the_server_sets() -> None:
    for name in ("messages", "raise_exception", "bos_token"):
        with pytest.raises(ApiError, match="set by the server"):
            render("x", **{name: 1})
