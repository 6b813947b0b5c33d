"""Event ids: one u64 that names (step, layer, microbatch, attempt), so that a late answer is recognised and dropped.

    63            32 31        20 19      16 15             0
    +---------------+------------+----------+----------------+
    |     step      |   layer    | microb.  |    attempt     |
    +---------------+------------+----------+----------------+

`step` is the sender's own count of forward passes, not the scheduler's, so it never repeats within an incarnation.
`attempt` starts at 1, hence no event id is 0: a metadata cell that reads 0 is empty or being written.
"""

from __future__ import annotations

from typing import NamedTuple, NoReturn

_STEP_BITS, _LAYER_BITS, _MICROBATCH_BITS, _ATTEMPT_BITS = 32, 12, 4, 16
_MICROBATCH_SHIFT = _ATTEMPT_BITS
_LAYER_SHIFT = _MICROBATCH_SHIFT + _MICROBATCH_BITS
_STEP_SHIFT = _LAYER_SHIFT + _LAYER_BITS
_STEP_MASK = (1 << _STEP_BITS) - 1
STEP = 1 << _STEP_SHIFT  # what a step adds to an id, for loops that count in ids


class Event(NamedTuple):
    """What one exchange is about."""

    step: int
    layer: int
    microbatch: int = 0
    attempt: int = 1

    def pack(self) -> int:
        """Return the u64 id. Raises ValueError naming the field that does not fit its bits."""
        step, layer, microbatch, attempt = self
        if not (
            0 <= layer < 1 << _LAYER_BITS
            and 0 <= microbatch < 1 << _MICROBATCH_BITS
            and 0 < attempt < 1 << _ATTEMPT_BITS
        ):
            self._refuse()
        return (
            (step & _STEP_MASK) << _STEP_SHIFT
            | layer << _LAYER_SHIFT
            | microbatch << _MICROBATCH_SHIFT
            | attempt
        )

    def _refuse(self) -> NoReturn:
        """Name the field that does not fit."""
        for name, value, bits in (
            ("layer", self.layer, _LAYER_BITS),
            ("microbatch", self.microbatch, _MICROBATCH_BITS),
            ("attempt", self.attempt, _ATTEMPT_BITS),
        ):
            if not 0 <= value < 1 << bits:
                raise ValueError(f"{name}={value} must be in 0..{(1 << bits) - 1}")
        raise ValueError("attempt=0 must be at least 1")

    @classmethod
    def unpack(cls, event_id: int) -> Event:
        """Return the event of a u64 id."""
        return cls(
            step=event_id >> _STEP_SHIFT,
            layer=event_id >> _LAYER_SHIFT & ((1 << _LAYER_BITS) - 1),
            microbatch=event_id >> _MICROBATCH_SHIFT & ((1 << _MICROBATCH_BITS) - 1),
            attempt=event_id & ((1 << _ATTEMPT_BITS) - 1),
        )
