"""What calibration rows say of one projection's input: energy per pair of channels, largest value per channel."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from services.quantize.smooth import channel_maxima

Float = npt.NDArray[np.float32]
ROWS_AT_ONCE = 4096


@dataclass(slots=True)
class InputStatistics:
    """hessian: [K, K] float64, sum of x x'. maxima: [K]. num_rows: how many rows were seen."""

    hessian: npt.NDArray[np.float64]
    maxima: Float
    num_rows: int = 0

    @classmethod
    def empty(cls, num_channels: int) -> InputStatistics:
        """Return the statistics of no row."""
        return cls(np.zeros((num_channels, num_channels)), np.zeros(num_channels, np.float32))

    @classmethod
    def of(cls, rows: Float) -> InputStatistics:
        """Return the statistics of rows [n, K]."""
        found = cls.empty(rows.shape[1])
        found.add(rows)
        return found

    def add(self, rows: Float) -> None:
        """Take rows [n, K] in."""
        for start in range(0, len(rows), ROWS_AT_ONCE):
            wide = rows[start : start + ROWS_AT_ONCE].astype(np.float64)
            self.hessian += wide.T @ wide
        self.maxima = np.maximum(self.maxima, channel_maxima(rows))
        self.num_rows += len(rows)

    def divided(self, scales: Float) -> npt.NDArray[np.float64]:
        """Return the hessian of the rows with each channel divided by `scales` [K]."""
        return np.asarray(self.hessian / np.outer(scales, scales).astype(np.float64))
