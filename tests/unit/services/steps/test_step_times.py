"""Percentiles of the newest decode steps."""

from __future__ import annotations

from services.steps.step_times import StepTimes


def test_there_is_nothing_before_the_first_step() -> None:
    assert StepTimes().percentiles() == {}


def test_percentiles_are_durations_that_occurred() -> None:
    times = StepTimes()
    for duration_us in range(1, 1001):
        times.note(duration_us)
    assert times.percentiles() == {
        "decode_step_p50_us": 501,
        "decode_step_p99_us": 991,
        "decode_step_p999_us": 1000,
    }


def test_only_the_newest_count() -> None:
    times = StepTimes(room=8)
    for duration_us in [9000] * 20 + [5] * 8:
        times.note(duration_us)
    assert set(times.percentiles().values()) == {5}
    assert times.percentiles() is times.percentiles()
    times.note(7)
    assert times.percentiles()["decode_step_p999_us"] == 7
