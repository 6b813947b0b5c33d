"""How long the newest decode steps took: what jitter is judged by."""

from __future__ import annotations

import numpy as np

PERCENTILES = {"decode_step_p50_us": 50.0, "decode_step_p99_us": 99.0, "decode_step_p999_us": 99.9}


class StepTimes:
    """The durations of the newest `room` decode steps. One thread notes, another may read."""

    def __init__(self, room: int = 2048) -> None:
        self._us = np.zeros(room, np.int64)
        self._num_noted = 0
        self._found: tuple[int, dict[str, int]] = (0, {})

    def note(self, duration_us: int) -> None:
        """A decode step took so long."""
        self._us[self._num_noted % self._us.size] = duration_us
        self._num_noted += 1

    def percentiles(self) -> dict[str, int]:
        """Return name -> us; empty before the first step."""
        num_noted, found = self._found
        if num_noted != self._num_noted:
            num_noted = self._num_noted
            values = np.percentile(self._us[:num_noted], list(PERCENTILES.values()), method="higher")
            found = dict(zip(PERCENTILES, map(int, values), strict=True))
            self._found = num_noted, found
        return found
