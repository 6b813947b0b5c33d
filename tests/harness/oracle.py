"""The monolithic oracle: what any pod must answer, computed in the test's own process."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

from bus.control.messages import SamplingParams
from services.model.reference import ReferenceModel


@cache
def oracle(folder: Path, kv_cache_dtype: str = "auto", wire_int8: bool = False) -> ReferenceModel:
    """Return the loaded oracle of a checkpoint folder, in the form in which the pod runs."""
    return ReferenceModel.load(folder, kv_cache_dtype=kv_cache_dtype, wire_int8=wire_int8)


@cache
def _generate(model: ReferenceModel, prompt: tuple[int, ...], sampling: SamplingParams) -> tuple[int, ...]:
    return tuple(model.generate(prompt, sampling))


def expected_tokens(
    model: Path | ReferenceModel, prompt: Sequence[int], max_tokens: int, **sampling: object
) -> list[int]:
    """Return the oracle's tokens; greedy and ignoring eos unless `sampling` says otherwise."""
    fields = {"temperature": 0.0, "ignore_eos": True, **sampling}
    params = SamplingParams(max_tokens=max_tokens, **fields)  # type: ignore[arg-type]
    chosen = oracle(model) if isinstance(model, Path) else model
    return list(_generate(chosen, tuple(prompt), params))
