"""Plans that go on with what the step before drew."""

from __future__ import annotations

import pytest

from bus.control.messages import DRAWN_BEFORE, PlannedSequence, StepPlan
from services.steps.drawn import NothingDrawn, with_drawn


def plan(*sequences: PlannedSequence) -> StepPlan:
    return StepPlan(step_id=8, scheduler_incarnation=1, sequences=sequences)


def sequence(request_id: str, *token_ids: int, output: tuple[int, ...] = ()) -> PlannedSequence:
    return PlannedSequence(
        request_id=request_id,
        token_ids=token_ids,
        start=3,
        block_table=(0,),
        sample=True,
        output_token_ids=output,
    )


def test_a_plan_that_waits_for_nothing_is_taken_as_it_is() -> None:
    known = plan(sequence("a", 5))
    assert with_drawn(known, None) == (known, ())


def test_drawn_tokens_take_their_places() -> None:
    waiting = plan(
        sequence("a", DRAWN_BEFORE, output=(4, DRAWN_BEFORE)), sequence("b", 6), sequence("c", DRAWN_BEFORE)
    )
    filled, abandoned = with_drawn(waiting, {"a": 50, "c": 60})
    assert filled == plan(sequence("a", 50, output=(4, 50)), sequence("b", 6), sequence("c", 60))
    assert abandoned == ()


def test_who_drew_nothing_is_left_out_with_an_answer() -> None:
    filled, (abandoned,) = with_drawn(
        plan(sequence("a", DRAWN_BEFORE), sequence("b", DRAWN_BEFORE)), {"b": 60}
    )
    assert filled == plan(sequence("b", 60))
    assert (abandoned.request_id, abandoned.token_id) == ("a", -1)
    assert abandoned.error == "step 7 drew no token"


def test_a_plan_whose_step_before_is_missing_is_refused() -> None:
    with pytest.raises(NothingDrawn, match="step 8 goes on with step 7, which has no result here"):
        with_drawn(plan(sequence("a", DRAWN_BEFORE)), None)
