from __future__ import annotations

import math

import pytest

from bus.control import codec, messages
from bus.errors import ProtocolError

GOODBYE = messages.Goodbye(service="expert", index=3, incarnation=7)
REQUEST = messages.AddRequest(
    request_id="r",
    attempt=2,
    prompt_token_ids=(1, 2, 3),
    sampling=messages.SamplingParams(max_tokens=4, temperature=0.5, seed=2**63 - 1),
)
EXPECTED = messages.Goodbye | messages.AddRequest


@pytest.mark.parametrize("message", [GOODBYE, REQUEST])
def test_a_message_comes_back_equal(message: messages.Message) -> None:
    frames = codec.to_frames(message)
    assert frames[:2] == [b"XDS1", b"M"]
    assert codec.from_frames(frames, EXPECTED) == message
    assert codec.decode(codec.encode(message), type(message)) == message


def test_a_long_prompt_fits() -> None:
    long = messages.AddRequest(
        request_id="r", attempt=0, prompt_token_ids=tuple(range(100_000)), sampling=REQUEST.sampling
    )
    assert codec.decode(codec.encode(long), EXPECTED) == long


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b"", "refused"),
        (b"{", "refused"),
        (b"[]", "Expected `object`"),
        (b"\xff", "refused"),
        (b"{}", "missing required field `type`"),
        (b'{"type":"Heartbeat","service":"expert"}', "Invalid value 'Heartbeat'"),
        (b'{"type":"Goodbye","service":"expert","index":3}', "missing required field `incarnation`"),
        (b'{"type":"Goodbye","service":"expert","index":"3","incarnation":7}', "Expected `int`"),
        (b'{"type":"Goodbye","service":"expert","index":true,"incarnation":7}', "Expected `int`"),
        (b'{"type":"Goodbye","service":"baker","index":3,"incarnation":7}', "Invalid enum value 'baker'"),
        (b'{"type":"Goodbye","service":"expert","index":3,"incarnation":7,"x":1}', "unknown field `x`"),
        (b"[" * 5000, "refused"),
    ],
)
def test_anything_else_is_refused(body: bytes, text: str) -> None:
    with pytest.raises(ProtocolError, match=text):
        codec.decode(body, EXPECTED)


@pytest.mark.parametrize(
    "frames",
    [
        [],
        [b"XDS1", b"M"],
        [b"XDS2", b"M", codec.encode(GOODBYE)],
        [b"XDS1", b"A", codec.encode(GOODBYE)],
        [b"XDS1", b"M", codec.encode(GOODBYE), b""],
    ],
)
def test_foreign_frames_are_refused(frames: list[bytes]) -> None:
    with pytest.raises(ProtocolError):
        codec.from_frames(frames, EXPECTED)


def test_an_oversized_body_is_refused_at_both_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    body = codec.encode(REQUEST)
    monkeypatch.setattr(codec, "BODY_BYTES_MAX", len(body) - 1)
    with pytest.raises(ProtocolError, match="AddRequest: body of"):
        codec.encode(REQUEST)
    with pytest.raises(ProtocolError, match="body of"):
        codec.decode(body, EXPECTED)


def test_a_number_that_json_lacks_is_refused() -> None:
    wrong = messages.TokensGenerated(
        request_id="r",
        attempt=0,
        first_index=0,
        token_ids=(1,),
        logprobs=(messages.TokenLogprob(token_id=1, logprob=-math.inf),),
    )
    with pytest.raises(ProtocolError):
        codec.decode(codec.encode(wrong), messages.TokensGenerated)
