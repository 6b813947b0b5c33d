"""Event ids round-trip and never are 0."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bus.xccl.event import Event


@given(
    step=st.integers(0, 2**32 - 1),
    layer=st.integers(0, 2**12 - 1),
    microbatch=st.integers(0, 15),
    attempt=st.integers(1, 2**16 - 1),
)
def test_unpack_is_the_inverse_of_pack(step: int, layer: int, microbatch: int, attempt: int) -> None:
    event = Event(step, layer, microbatch, attempt)
    event_id = event.pack()
    assert Event.unpack(event_id) == event
    assert 0 < event_id < 2**64


@pytest.mark.parametrize("field", ["layer", "microbatch", "attempt"])
def test_a_field_that_does_not_fit_is_named(field: str) -> None:
    with pytest.raises(ValueError, match=field):
        Event(step=1, layer=1)._replace(**{field: 1 << 20}).pack()


def test_attempts_start_at_one() -> None:
    with pytest.raises(ValueError, match="attempt=0"):
        Event(step=1, layer=0, attempt=0).pack()
