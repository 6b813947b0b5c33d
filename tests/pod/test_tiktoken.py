"""A Kimi checkpoint as it is published: `tiktoken.model`, no `tokenizer.json`, calls of its own, over a whole pod."""

from __future__ import annotations

import base64
import json
import re
import shutil
from collections.abc import Iterator

import openai
import pytest

from tests.conftest import GOLDENS
from tests.harness.pod import running_pod

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}"
    "{# <|tool_call_begin|> is what calls begin with; thoughts stand in <think> and </think> #}"
)
CALL = '<|tool_calls_section_begin|><|tool_call_begin|>functions.go:0<|tool_call_argument_begin|>{"to": "'
END_OF_CALL = '"}<|tool_call_end|><|tool_calls_section_end|>'
TOOL = {"type": "function", "function": {"name": "go", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    folder = tmp_path_factory.mktemp("checkpoint") / "kimi"
    shutil.copytree(
        GOLDENS / "kimi_k2", folder, ignore=shutil.ignore_patterns("tokenizer*", "chat_template*")
    )
    lines = [base64.b64encode(bytes([byte])) + b" %d" % byte for byte in range(256)]
    (folder / "tiktoken.model").write_bytes(b"\n".join(lines))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    settings = {
        "tokenizer_class": "TikTokenTokenizer",
        "eos_token": "[EOS]",
        "added_tokens_decoder": {"257": {"content": "[EOS]", "special": True}},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with (
        running_pod(folder, dp_groups=1, expert_workers=1) as pod,
        openai.OpenAI(base_url=f"{pod.url}/v1", api_key="none", max_retries=0, timeout=60) as client,
    ):
        yield client


def test_text_goes_there_and_back(client: openai.OpenAI) -> None:
    body = client.completions.create(
        model="kimi", prompt="héllo 世界", max_tokens=4, echo=True, temperature=0
    )
    assert body.choices[0].text.startswith("héllo 世界")
    assert body.usage is not None and body.usage.prompt_tokens == len("héllo 世界".encode())


@pytest.mark.parametrize("seed", [1, 2])
def test_a_call_of_the_models_own_kind(client: openai.OpenAI, seed: int) -> None:
    """The random model is held to the text of a call; what matters is how it is read."""
    before, behind = (re.escape(text).replace("\\ ", " ") for text in (CALL, END_OF_CALL))
    pattern = f"<think>hm</think>{before}(Rome|Paris){behind}"
    fields = {
        "model": "kimi", "messages": [{"role": "user", "content": "go"}], "tools": [TOOL], "seed": seed,
        "extra_body": {"guided_regex": pattern},
    }  # fmt: skip
    choice = client.chat.completions.create(**fields).choices[0]  # type: ignore[call-overload]
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    assert choice.message.model_extra["reasoning_content"] == "hm"
    (call,) = choice.message.tool_calls
    assert (call.id, call.function.name) == ("functions.go:0", "go")
    assert json.loads(call.function.arguments)["to"] in ("Rome", "Paris")
    chunks = list(client.chat.completions.create(**fields, stream=True))  # type: ignore[call-overload]
    pieces = [entry for chunk in chunks for entry in chunk.choices[0].delta.tool_calls or []]
    assert pieces[0].id == "functions.go:0" and len(pieces) > 5  # arguments come as they are written
    assert "".join(piece.function.arguments for piece in pieces) == call.function.arguments
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_a_schema_over_tiktokens_tokens(client: openai.OpenAI) -> None:
    form = {
        "type": "json_schema",
        "json_schema": {"name": "x", "schema": {"enum": [{"ok": True}, {"ok": False}]}},
    }
    body = client.chat.completions.create(
        model="kimi", messages=[{"role": "user", "content": "go"}], max_tokens=200,
        response_format=form, extra_body={"chat_template_kwargs": {"mood": "calm"}},
    )  # type: ignore[call-overload]  # fmt: skip
    assert json.loads(body.choices[0].message.content)["ok"] in (True, False)
