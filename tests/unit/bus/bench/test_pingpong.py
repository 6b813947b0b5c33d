"""The ping-pong without a transport: what is called, in which order, for each kind of way."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from bus.bench.pingpong import MARK_MAX, REWRITTEN_BYTES_MIN, Ends, marks, play


@dataclass
class Recorded:
    """A link that notes what is asked of it."""

    has_rewrite: bool = True
    calls: list[str] = field(default_factory=list)

    def ends(self, num_bytes: int) -> Ends:
        def note(name: str) -> None:
            self.calls.append(f"{name} {num_bytes}")

        rewrite = (lambda: note("rewrite")) if self.has_rewrite else None
        return Ends(note, ("send",), note, ("recv",), rewrite)


@pytest.mark.parametrize("side", [0, 1])
def test_a_small_array_is_not_rewritten(side: int) -> None:
    link = Recorded()
    assert len(play(link, side, 64, 3)) == 3
    assert link.calls == (["send 64", "recv 64"] if side == 0 else ["recv 64", "send 64"]) * 3


@pytest.mark.parametrize("side", [0, 1])
def test_a_large_array_is_rewritten_and_the_sides_meet_before_each_message(side: int) -> None:
    link, size = Recorded(), REWRITTEN_BYTES_MIN
    assert len(play(link, side, size, 2)) == 2
    first, second = ("send", "recv") if side == 0 else ("recv", "send")
    assert (
        link.calls
        == [f"rewrite {size}", f"{first} 1", f"{second} 1", f"{first} {size}", f"{second} {size}"] * 2
    )


def test_an_array_that_is_handed_over_is_never_rewritten() -> None:
    link = Recorded(has_rewrite=False)
    play(link, 0, 8 << 20, 2)
    assert link.calls == [f"send {8 << 20}", f"recv {8 << 20}"] * 2


def test_marks_fit_a_byte_and_differ_from_one_message_to_the_next() -> None:
    counted = marks()
    found = [next(counted) for _ in range(2 * MARK_MAX)]
    assert found == [*range(1, MARK_MAX + 1)] * 2 and MARK_MAX < 256
