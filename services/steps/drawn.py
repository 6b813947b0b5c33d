"""Plans made before the tokens that they go on with were drawn (`DRAWN_BEFORE`)."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from bus.control.messages import DRAWN_BEFORE, PlannedSequence, SampledToken, StepPlan


class NothingDrawn(Exception):
    """The plan follows a step of which this worker has no result; the text names it."""


def with_drawn(plan: StepPlan, drawn: Mapping[str, int] | None) -> tuple[StepPlan, tuple[SampledToken, ...]]:
    """Put the tokens that the step before drew into a plan that waits for them.

    Args:
        drawn: request id -> token id of the step before; None = it has no result here.

    Returns:
        The plan of the sequences that can be computed, and answers for those that cannot: the step before drew
        nothing for them, so their requests are over and nobody reads the answers.

    Raises:
        NothingDrawn: the plan needs the step before, and there is no result.
    """
    if not any(_waits(sequence) for sequence in plan.sequences):
        return plan, ()
    if drawn is None:
        raise NothingDrawn(
            f"step {plan.step_id} goes on with step {plan.step_id - 1}, which has no result here"
        )
    sequences = []
    abandoned = []
    for sequence in plan.sequences:
        if not _waits(sequence):
            sequences.append(sequence)
        elif sequence.request_id in drawn:
            sequences.append(_filled(sequence, drawn[sequence.request_id]))
        else:
            error = f"step {plan.step_id - 1} drew no token"
            abandoned.append(SampledToken(request_id=sequence.request_id, token_id=-1, error=error))
    return msgspec.structs.replace(plan, sequences=tuple(sequences)), tuple(abandoned)


def _waits(sequence: PlannedSequence) -> bool:
    return bool(sequence.token_ids) and sequence.token_ids[-1] == DRAWN_BEFORE


def _filled(sequence: PlannedSequence, token_id: int) -> PlannedSequence:
    output = sequence.output_token_ids
    return msgspec.structs.replace(
        sequence,
        token_ids=(*sequence.token_ids[:-1], token_id),
        output_token_ids=(*output[:-1], token_id) if output else output,
    )
