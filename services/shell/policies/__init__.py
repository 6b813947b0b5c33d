"""Which prefill worker computes the next prompt. One policy per file; a new one is a file and a line below.

A policy is a pure function: (prompt, workers that may take it) -> index of the one that shall. It is asked only
while prompts wait, and is given only workers that have room; there is always at least one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from services.shell.policies import cost, round_robin
from services.shell.policies.views import PromptView, WorkerView

Policy = Callable[[PromptView, Sequence[WorkerView]], int]

POLICIES: dict[str, Policy] = {
    "cost": cost.choose,
    "round_robin": round_robin.choose,
}
