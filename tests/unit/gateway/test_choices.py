"""Tokens to text, however they arrive in groups."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from bus.control.messages import SamplingParams
from gateway.choices import Choice, ChoicePlan, Update
from gateway.parameters import TextOptions
from tests.harness.gateway_world import END, TOKENIZER


def choice(*stops: str, **sampling: object) -> Choice:
    params = SamplingParams(max_tokens=100, eos_token_ids=(END,), **sampling)  # type: ignore[arg-type]
    return Choice(ChoicePlan(0, 0, "r", (1,), params, TextOptions(stops, params.min_tokens)), TOKENIZER)


def whole(state: Choice, groups: list[list[int]]) -> Update:
    update = Update(0)
    last = END
    for group in groups:
        last = group[-1]
        update = update.followed_by(state.push(group))
        if state.is_finished:
            return update
    return update.followed_by(state.finish("stop" if last == END else "length", last if last == END else -1))


@given(
    ids=st.lists(st.sampled_from([*b"abc", 0xC3, 0xA9]), min_size=1, max_size=30),
    lengths=st.lists(st.integers(1, 7), max_size=30),
    stops=st.lists(st.text("abcé", min_size=1, max_size=4), max_size=3),
    min_tokens=st.integers(0, 10),
)
def test_grouping_changes_nothing(
    ids: list[int], lengths: list[int], stops: list[str], min_tokens: int
) -> None:
    groups, start = [], 0
    for length in [*lengths, *[1] * len(ids)]:
        if start < len(ids):
            groups.append(ids[start : start + length])
            start += length
    one_by_one = whole(choice(*stops, min_tokens=min_tokens), [[token_id] for token_id in ids])
    assert whole(choice(*stops, min_tokens=min_tokens), groups) == one_by_one


def test_the_end_token_is_counted_but_is_no_text() -> None:
    state = choice()
    update = whole(state, [[*b"hi", END]])
    assert (update.text, update.token_ids, update.finish_reason) == ("hi", (*b"hi", END), "stop")
    assert update.stop_reason is None and state.num_output_tokens == 3


def test_a_stop_token_is_named() -> None:
    state = choice(stop_token_ids=(ord("i"),))
    update = state.push(b"hi").followed_by(state.finish("stop", ord("i")))
    assert (update.text, update.stop_reason) == ("h", ord("i"))


def test_a_stop_token_within_min_tokens_or_ignored_is_text() -> None:
    state = choice(stop_token_ids=(ord("h"),), min_tokens=1)
    assert state.push(b"h").text == "h"
    state = choice(ignore_eos=True)
    assert state.push([END, ord("x")]).text == "x"


def test_stop_strings_are_not_looked_for_in_min_tokens() -> None:
    state = choice("ab", min_tokens=2)
    update = state.push(b"abxab")
    assert (update.text, update.stop_reason, state.num_output_tokens) == ("abx", "ab", 5)


def test_what_was_held_back_comes_at_the_end() -> None:
    state = choice("abc")
    assert state.push(b"xab").text == "x"
    assert state.finish("length", -1).text == "ab"


def test_a_cut_character_shows_at_the_end() -> None:
    state = choice()
    assert state.push([0xC3]).text == ""
    assert state.finish("length", -1).text == "\ufffd"
