"""The attention worker's decisions: rows of a step, and which expert incarnation to talk to."""

from __future__ import annotations

import numpy as np
import pytest

from bus.control.messages import Member, PlannedSequence, PodMap, SamplingParams, StepPlan
from services.attention.core import ExpertDirectory
from services.steps.rows import check_plan, lay_out


def sequence(request_id: str = "a", tokens: tuple[int, ...] = (1, 2, 3), **fields: object) -> PlannedSequence:
    given = {
        "start": 0,
        "block_table": (0,),
        "sample": True,
        "sampling": SamplingParams(max_tokens=4),
        **fields,
    }
    return PlannedSequence(request_id=request_id, token_ids=tokens, **given)  # type: ignore[arg-type]


def plan(*sequences: PlannedSequence) -> StepPlan:
    return StepPlan(step_id=7, scheduler_incarnation=1, sequences=sequences)


def check(given: StepPlan) -> None:
    check_plan(given, rows_max=8, num_blocks=4, block_tokens=4, vocab_size=10)


def test_rows_stand_sequence_by_sequence() -> None:
    rows = lay_out(plan(sequence("a", (1, 2, 3)), sequence("b", (9,), start=5, block_table=(3, 1))))
    assert rows.token_ids.tolist() == [1, 2, 3, 9]
    assert rows.positions.tolist() == [0, 1, 2, 5]
    assert rows.seq_of_row.tolist() == [0, 0, 0, 1]
    assert rows.block_tables.tolist() == [[0, -1], [3, 1]]
    assert rows.logit_rows.tolist() == [2, 3]


def test_only_rows_that_sample_or_score_the_prompt_need_logits() -> None:
    rows = lay_out(
        plan(
            sequence("chunk", (1, 2), sample=False),
            sequence("scored", (1, 2, 3), next_prompt_token_ids=(2, 3)),
            sequence("scored-only", (4, 5), sample=False, next_prompt_token_ids=(5, 6)),
        )
    )
    assert rows.logit_rows.tolist() == [2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        (sequence(tokens=()), "token_ids must not be empty"),
        (sequence(tokens=(10,)), "0..9"),
        (sequence(tokens=(-1,)), "0..9"),
        (sequence(start=2), "blocks do not hold"),
        (sequence(start=-1), "blocks do not hold"),
        (sequence(block_table=(4,)), "0..3"),
        (sequence(block_table=(-1,)), "0..3"),
        (sequence(next_prompt_token_ids=(1, 2, 3, 4)), "next_prompt_token_ids"),
        (sequence(sampling=None), "sampling parameters"),
        (sequence(tokens=(1,) * 9, block_table=(0, 1, 2)), "9 rows must be in 1..8"),
    ],
)
def test_a_plan_out_of_bounds_is_refused_by_name(bad: PlannedSequence, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        check(plan(bad))


def test_a_good_plan_passes() -> None:
    check(plan(sequence(), sequence("b", (3,), start=4, block_table=(1, 2))))


def expert(index: int, incarnation: int, state: str = "ready") -> Member:
    return Member(
        service="expert",
        index=index,
        incarnation=incarnation,
        pid=1,
        state=state,  # type: ignore[arg-type]
        segment=f"/xds-p-expert-{index}-{incarnation}",
    )


def pod_map(*members: Member) -> PodMap:
    return PodMap(pod="p", epoch=1, members=members)


def test_the_directory_connects_ready_experts_once() -> None:
    directory = ExpertDirectory(2)
    assert directory.missing() == [0, 1]
    found = directory.to_connect(pod_map(expert(0, 1), expert(1, 1, "starting"), expert(5, 1)))
    assert [(m.index, m.incarnation) for m in found] == [(0, 1)]
    directory.connected(0, 1)
    assert directory.to_connect(pod_map(expert(0, 1))) == []
    assert directory.missing() == [1]
    directory.check_invariants()


def test_a_lost_expert_is_awaited_at_a_higher_incarnation_only() -> None:
    directory = ExpertDirectory(1)
    directory.connected(0, 1)
    directory.lost(0, 1)
    assert directory.missing() == [0]
    assert directory.to_connect(pod_map(expert(0, 1))) == [], "an old map must not bring the dead back"
    assert [m.incarnation for m in directory.to_connect(pod_map(expert(0, 2)))] == [2]
    directory.connected(0, 2)
    assert directory.missing() == []
    directory.lost(0, 1)
    assert directory.missing() == [], "late news of an older death changes nothing"


def test_block_table_padding_is_never_a_block() -> None:
    rows = lay_out(plan(sequence(), sequence("b", (1,), start=7, block_table=(2, 3))))
    assert np.count_nonzero(rows.block_tables == -1) == 1
