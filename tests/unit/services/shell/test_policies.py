"""Which prefill worker computes a prompt."""

from __future__ import annotations

import pytest

from services.shell.policies import POLICIES
from services.shell.policies.cost import prefill_cost
from services.shell.policies.views import PromptView, WorkerView


def worker(index: int, *, load: float = 0, cached: int = 0) -> WorkerView:
    return WorkerView(index=index, num_cached_tokens=cached, load=load, num_free_blocks=100)


PROMPT = PromptView(number=7, num_tokens=100)


@pytest.mark.parametrize(
    ("workers", "chosen"),
    [
        ([worker(0), worker(1)], 0),
        ([worker(0, load=50), worker(1)], 1),
        ([worker(0, load=50, cached=96), worker(1)], 0),  # little is left to do there
        ([worker(0, load=500, cached=96), worker(1)], 1),  # but not for any price
        ([worker(2, cached=32), worker(5, cached=64)], 5),
    ],
)
def test_cost_weighs_load_against_what_is_cached(workers: list[WorkerView], chosen: int) -> None:
    assert POLICIES["cost"](PROMPT, workers) == chosen


def test_context_costs() -> None:
    assert prefill_cost(64, 0) < prefill_cost(4096 + 64, 4096) / 1.9
    assert prefill_cost(1000, 400) + prefill_cost(400, 0) == pytest.approx(prefill_cost(1000, 0))
    assert prefill_cost(10, 10) == 0


def test_round_robin_takes_turns_whatever_is_cached() -> None:
    workers = [worker(0, load=9), worker(2, cached=96), worker(3)]
    prompts = [PromptView(number, 100) for number in range(6)]
    assert [POLICIES["round_robin"](prompt, workers) for prompt in prompts] == [0, 2, 3, 0, 2, 3]
