"""The monolithic oracle: what any pod must answer, computed in the test's own process."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

from bus.control.messages import SamplingParams
from services.model.reference import ReferenceModel


@cache
def oracle(folder: Path) -> ReferenceModel:
    """Return the loaded oracle of a checkpoint folder."""
    return ReferenceModel.load(folder)


@cache
def _generate(folder: Path, prompt: tuple[int, ...], sampling: SamplingParams) -> tuple[int, ...]:
    return tuple(oracle(folder).generate(prompt, sampling))


def expected_tokens(folder: Path, prompt: Sequence[int], max_tokens: int, **sampling: object) -> list[int]:
    """Return the oracle's tokens; greedy and ignoring eos unless `sampling` says otherwise."""
    fields = {"temperature": 0.0, "ignore_eos": True, **sampling}
    params = SamplingParams(max_tokens=max_tokens, **fields)  # type: ignore[arg-type]
    return list(_generate(folder, tuple(prompt), params))
