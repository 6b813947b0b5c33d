"""Requests that are wrong in every way: the right status, OpenAI's error shape, and a pod that is none the worse."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.conftest import GOLDENS
from tests.harness.client import stream_completion
from tests.harness.oracle import expected_tokens
from tests.harness.pod import Pod, running_pod
from tests.harness.poll import eventually

QWEN = GOLDENS / "qwen3_moe"
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
WINDOW = 2048
VOCABULARY = 512


@pytest.fixture(scope="module")
def pod(deepseek_pod: Pod) -> Pod:
    """The shared pod. Nothing that is asked of it here may cost it a process."""
    return deepseek_pod


@pytest.fixture(scope="module")
def pids_before(pod: Pod) -> list[int]:
    return [member["pid"] for member in pod.status()["members"]]


def refused(
    response: httpx.Response, status: int, code: str | None = None, param: str | None = None
) -> dict[str, Any]:
    """Assert status and OpenAI's error shape; return the error."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"].startswith("application/json")
    assert response.headers["x-request-id"]
    body = response.json()
    assert body.keys() == {"error"} and body["error"].keys() == {"message", "type", "param", "code"}
    error: dict[str, Any] = body["error"]
    assert error["message"] and "\n" not in error["message"] and error["type"]
    assert code is None or error["code"] == code, error
    assert param is None or error["param"] == param, error
    return error


@pytest.fixture(scope="module")
def http(pod: Pod, pids_before: list[int]) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=pod.url, timeout=60) as client:
        yield client


def test_endless_headers_end_the_connection_and_nothing_else(pod: Pod, http: httpx.Client) -> None:
    with socket.create_connection(("127.0.0.1", pod.port), timeout=20) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\nx-long: ")
        try:
            for _ in range(64):
                connection.sendall(b"a" * 65536)
            answer = connection.recv(65536)
        except ConnectionError:
            answer = b""  # the server closed before it had read everything
    assert answer == b"" or b" 400 " in answer.split(b"\r\n")[0]
    assert http.get("/health").status_code == 200


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b'{"prompt": "x"} tail',
        b'{"prompt": "\xff\xfe"}',
        b'{"prompt": "x", "temperature": NaN}',
        b'{"prompt": "\\ud800"}',
        b"[" * 100_000,
        b'{"prompt": ' + b"[" * 50_000,
    ],
)
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_a_body_that_is_not_json(http: httpx.Client, path: str, content: bytes) -> None:
    error = refused(http.post(path, content=content), 400)
    assert error["code"] in ("invalid_json", "invalid_type")
    assert len(error["message"]) < 300


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"nonsense": 1}, "nonsense", "invalid_type"),
        ({"stream_options": {"nonsense": 1}, "stream": True}, "stream_options.nonsense", "invalid_type"),
        ({"prompt": None}, "prompt", "invalid_type"),
        ({"prompt": 5}, "prompt", "invalid_type"),
        ({"prompt": {"text": "x"}}, "prompt", "invalid_type"),
        ({"prompt": [[1], ["x"]]}, "prompt", "invalid_type"),
        ({"prompt": [1, "x"]}, "prompt", "invalid_value"),
        ({"prompt": ""}, "prompt", "invalid_value"),
        ({"prompt": []}, "prompt", "invalid_value"),
        ({"prompt": [[]]}, "prompt", "invalid_value"),
        ({"prompt": [VOCABULARY]}, "prompt", "invalid_value"),
        ({"prompt": [-1]}, "prompt", "invalid_value"),
        ({"prompt": [1 << 70]}, "prompt", None),
        ({"prompt": [True]}, "prompt", "invalid_type"),
        ({"prompt": [5] * (WINDOW + 1)}, "prompt", "context_length_exceeded"),
        ({"prompt": [5] * WINDOW}, "prompt", "context_length_exceeded"),
        ({"prompt": [5] * (WINDOW - 10), "max_tokens": 11}, "prompt", "context_length_exceeded"),
        ({"prompt": [[5]] * 300}, "prompt", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_tokens": -1}, "max_tokens", "invalid_value"),
        ({"max_tokens": 1.5}, "max_tokens", "invalid_type"),
        ({"max_tokens": "9"}, "max_tokens", "invalid_type"),
        ({"temperature": -0.1}, "temperature", "invalid_value"),
        ({"temperature": 2.1}, "temperature", "invalid_value"),
        ({"temperature": "hot"}, "temperature", "invalid_type"),
        ({"top_p": 0}, "top_p", "invalid_value"),
        ({"top_p": 1.1}, "top_p", "invalid_value"),
        ({"top_k": -2}, "top_k", "invalid_value"),
        ({"n": 0}, "n", "invalid_value"),
        ({"n": 129}, "n", "invalid_value"),
        ({"best_of": 3}, "best_of", "invalid_value"),
        ({"logprobs": 21}, "logprobs", "invalid_value"),
        ({"logprobs": -1}, "logprobs", "invalid_value"),
        ({"logprobs": True}, "logprobs", "invalid_type"),
        ({"min_tokens": 17}, "min_tokens", "invalid_value"),
        ({"min_tokens": -1}, "min_tokens", "invalid_value"),
        ({"seed": 1 << 70}, "seed", None),
        ({"seed": 1.5}, "seed", "invalid_type"),
        ({"stop": [""]}, "stop", "invalid_value"),
        ({"stop": ["x"] * 17}, "stop", "invalid_value"),
        ({"stop_token_ids": [VOCABULARY]}, "stop_token_ids", "invalid_value"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        ({"request_id": "a b"}, "request_id", "invalid_value"),
        ({"model": "gpt-x"}, "model", "model_not_found"),
        ({"presence_penalty": 2.5}, "presence_penalty", "invalid_value"),
        ({"repetition_penalty": 0}, "repetition_penalty", "invalid_value"),
        ({"logit_bias": {str(VOCABULARY): 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"5": 200}}, "logit_bias", "invalid_value"),
        ({"min_p": -0.1}, "min_p", "invalid_value"),
        ({"suffix": "end"}, "suffix", "unsupported_value"),
        ({"use_beam_search": True}, "use_beam_search", "unsupported_value"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "invalid_type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "invalid_value"),
        ({"guided_regex": "(a"}, "guided_regex", "invalid_grammar"),
        ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice", "contradictory_fields"),
        (
            {
                "guided_json": {
                    "allOf": [
                        {
                            "anyOf": [
                                {"type": "object", "properties": {f"k{i}{j}": {"const": i}}}
                                for i in range(12)
                            ]
                        }
                        for j in range(8)
                    ]
                }
            },
            "guided_json",
            "invalid_grammar",
        ),
        ({"guided_json": {"enum": ["x" * 70_000]}}, "guided_json", "invalid_value"),
    ],
    ids=lambda value: str(value)[:40],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_wrong_completion(
    http: httpx.Client, fields: dict[str, object], param: str, code: str | None, stream: bool
) -> None:
    if stream and fields.keys() & {"stream_options"} and "stream" not in fields:
        stream = False  # wrong only because nothing streams
    body = {"prompt": [5, 6], "stream": stream, **fields}
    error = refused(http.post(COMPLETIONS, json=body), 404 if code == "model_not_found" else 400, code, param)
    assert len(error["message"]) < 300


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": "hello"}, "messages", "invalid_type"),
        ({"messages": None}, "messages", "invalid_type"),
        ({"messages": [{"content": "x"}]}, "messages.role", "invalid_type"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "invalid_value"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages", "invalid_type"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content",
            "invalid_value",
        ),
        ({"messages": [{"role": "user", "content": "x " * 3000}]}, "messages", "context_length_exceeded"),
        ({"max_completion_tokens": 0}, "max_completion_tokens", "invalid_value"),
        ({"max_completion_tokens": WINDOW}, "messages", "context_length_exceeded"),
        ({"top_logprobs": 3}, "top_logprobs", "invalid_value"),
        ({"logprobs": 3}, "logprobs", "invalid_type"),
        ({"prompt": "x"}, "prompt", "invalid_type"),
        ({"model": "gpt-x"}, "model", "model_not_found"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "unsupported_value"),
        ({"tool_choice": "required"}, "tool_choice", "contradictory_fields"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "contradictory_fields"),
        ({"modalities": ["audio"]}, "modalities", "unsupported_value"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_wrong_chat(http: httpx.Client, fields: dict[str, object], param: str, code: str) -> None:
    body = {"messages": [{"role": "user", "content": "hello"}], **fields}
    refused(http.post(CHAT, json=body), 404 if code == "model_not_found" else 400, code, param)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": []}, "prompt"),
        ("/tokenize", {"prompt": ["x"]}, "prompt"),
        ("/tokenize", {"prompt": "x", "model": "gpt-x"}, "model"),
        ("/detokenize", {"tokens": [VOCABULARY]}, "tokens"),
        ("/detokenize", {"tokens": "5"}, "tokens"),
        ("/detokenize", {}, "tokens"),
    ],
)
def test_a_wrong_tokenize(http: httpx.Client, path: str, body: dict[str, object], param: str) -> None:
    refused(http.post(path, json=body), 404 if param == "model" else 400, param=param)


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/nothing", 404, "not_found"),
        ("POST", "/v1/completions/", 404, "not_found"),
        ("GET", "/v1/models/gpt-x", 404, "model_not_found"),
        ("GET", COMPLETIONS, 405, "method_not_allowed"),
        ("PUT", CHAT, 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("POST", "/health", 405, "method_not_allowed"),
    ],
)
def test_a_wrong_path_or_method(http: httpx.Client, method: str, path: str, status: int, code: str) -> None:
    response = http.request(method, path)
    refused(response, status, code)
    assert status != 405 or response.headers["allow"]


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/tokenize", "/detokenize"])
@pytest.mark.parametrize("announced", [True, False], ids=["content-length", "chunked"])
def test_an_oversized_body(http: httpx.Client, path: str, announced: bool) -> None:
    body = b" " * (4 * 1024**2 + 1)
    refused(http.post(path, content=body if announced else iter([body])), 413, "body_too_large")


@pytest.mark.parametrize(
    "sent",
    [
        b"nonsense\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: many\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
    ids=["no-http", "no-length", "half-a-body", "no-chunk"],
)
def test_bytes_that_are_no_request(http: httpx.Client, pod: Pod, sent: bytes) -> None:
    """Whatever the answer: the connection ends, and the next one is served."""
    with socket.create_connection(("127.0.0.1", pod.port), timeout=30) as connection:
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        try:
            while part := connection.recv(65536):
                answer += part
        except ConnectionResetError:
            pass
    assert answer == b"" or answer.startswith(b"HTTP/1.1 4")
    assert http.get("/health").status_code == 200


async def test_after_all_of_it_the_pod_is_as_before(pod: Pod, pids_before: list[int]) -> None:
    """Same processes, no request left over, and the oracle's tokens."""
    prompt = [5, 9, 17, 33]
    async with httpx.AsyncClient(base_url=pod.url, timeout=60) as client:
        stream = await stream_completion(client, prompt, max_tokens=12, ignore_eos=True)
    assert stream.error is None and stream.token_ids == expected_tokens(GOLDENS / "deepseek_v3", prompt, 12)

    def idle() -> bool:
        found = [m["counters"] for m in pod.status()["members"] if m["service"] == "scheduler"]
        return all(c["num_running"] == c["num_waiting"] == 0 for c in found)

    eventually(idle, timeout_s=10, what="no request left over", interval_s=0.3)
    status = pod.status()
    assert status["healthy"] and [member["pid"] for member in status["members"]] == pids_before


# --------------------------------------------------------------------------- API keys


@pytest.fixture(scope="module")
def guarded_pod() -> Iterator[Pod]:
    """The smallest pod, with two keys."""
    flags = ("--set", "gateway.api_keys=first-key,second-key", "--set", "gateway.body_bytes_max=2048")
    with running_pod(QWEN, *flags, dp_groups=1, expert_workers=1) as one:
        yield one


@pytest.mark.parametrize(
    "authorization",
    [None, "", "Bearer", "Bearer wrong", "Basic first-key", "first-key", "Bearer first-key,second-key",
     "Bearer FIRST-KEY", "Bearer f\u00fcr"],
)  # fmt: skip
def test_a_wrong_key(guarded_pod: Pod, authorization: str | None) -> None:
    headers = {} if authorization is None else {"authorization": authorization.encode("latin-1")}
    with httpx.Client(base_url=guarded_pod.url, headers=headers, timeout=60) as client:
        for method, path in (
            ("POST", COMPLETIONS),
            ("POST", CHAT),
            ("GET", "/v1/models"),
            ("POST", "/tokenize"),
        ):
            error = refused(client.request(method, path, content=b"{"), 401, "invalid_api_key")
            assert error["type"] == "authentication_error" and "key" in error["message"]
        assert client.get("/health").status_code == 200


def test_a_right_key(guarded_pod: Pod) -> None:
    for key in ("first-key", "second-key"):
        headers = {"authorization": f"Bearer {key}"}
        with httpx.Client(base_url=guarded_pod.url, headers=headers, timeout=60) as client:
            body = {
                "prompt": [5, 9],
                "max_tokens": 4,
                "temperature": 0,
                "return_token_ids": True,
                "ignore_eos": True,
            }
            answer = client.post(COMPLETIONS, json=body)
            assert answer.status_code == 200
            assert answer.json()["choices"][0]["token_ids"] == expected_tokens(QWEN, [5, 9], 4)
            refused(client.post(COMPLETIONS, content=b" " * 2049), 413, "body_too_large")


def test_keys_are_never_shown(guarded_pod: Pod) -> None:
    """Not in the log of any process, and not in `xds config`."""
    assert "first-key" not in guarded_pod.log.read_text()
    assert "first-key" not in guarded_pod.xds("config", "--set", "gateway.api_keys=first-key").stdout
