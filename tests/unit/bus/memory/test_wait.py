from __future__ import annotations

import pytest

from bus.clock import NS_PER_MS, NS_PER_S, Deadline
from bus.memory.wait import (
    PROBE_EVERY,
    Adaptive,
    Blocking,
    Doorbell,
    Spin,
    WaitStrategy,
    Yielding,
    wait_until,
)


class FakeBell(Doorbell):
    """Rings (or not) after the strategy has decided how long to spin."""

    def __init__(self, *, rings: bool) -> None:
        super().__init__(bytearray(8), 0)
        object.__setattr__(self, "rings", rings)
        object.__setattr__(self, "spins", [])

    def wait(self, seen: int, spin_ns: int, timeout_ns: int) -> int:
        self.spins.append(spin_ns)  # type: ignore[attr-defined]
        return seen + 1 if self.rings else seen  # type: ignore[attr-defined]


STRATEGIES = [Spin(), Yielding(), Blocking(), Adaptive(20_000)]
NAMES = [type(strategy).__name__ for strategy in STRATEGIES]


@pytest.mark.parametrize("strategy", STRATEGIES, ids=NAMES)
def test_every_strategy_sees_a_ring_and_times_out(strategy: WaitStrategy) -> None:
    bell = Doorbell(bytearray(8), 0)
    assert strategy.wait(bell, 0, NS_PER_MS) == 0
    assert bell.ring() == 1
    assert strategy.wait(bell, 0, 10 * NS_PER_S) == 1


def test_adaptive_stops_spinning_where_it_wins_nothing_and_tries_again_later() -> None:
    strategy, bell = Adaptive(16_000), FakeBell(rings=False)
    for _ in range(2 * PROBE_EVERY):
        strategy.wait(bell, 0, 0)
    spins: list[int] = bell.spins  # type: ignore[attr-defined]
    assert spins[:5] == [16_000, 8_000, 4_000, 2_000, 0]
    assert spins.count(16_000) == 3
    assert spins.count(0) > PROBE_EVERY


def test_adaptive_keeps_a_burst_that_wins() -> None:
    strategy, bell = Adaptive(10**9), FakeBell(rings=True)
    strategy.spin_ns = 10**8
    for _ in range(6):
        strategy.wait(bell, 0, 0)
    assert strategy.spin_ns == 10**9


def test_adaptive_without_a_burst_only_sleeps() -> None:
    strategy, bell = Adaptive(0), FakeBell(rings=True)
    for _ in range(PROBE_EVERY + 1):
        strategy.wait(bell, 0, 0)
    assert set(bell.spins) == {0}  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="spin_ns_max"):
        Adaptive(-1)


def no_check() -> None:
    raise AssertionError("nothing to check yet")


def test_wait_until_returns_what_is_there_even_after_the_deadline() -> None:
    bell = Doorbell(bytearray(8), 0)
    found = wait_until(lambda: "x", bell, Blocking(), Deadline(0), check=no_check, check_interval_ns=NS_PER_S)
    assert found == "x"


def test_wait_until_gives_up_at_the_deadline() -> None:
    bell = Doorbell(bytearray(8), 0)
    found = wait_until(
        lambda: None, bell, Blocking(), Deadline.after_ms(3), check=no_check, check_interval_ns=NS_PER_S
    )
    assert found is None


def test_a_ring_between_probe_and_sleep_is_not_missed() -> None:
    bell = Doorbell(bytearray(8), 0)
    answers = [None, "work"]

    def probe() -> str | None:
        bell.ring()
        return answers.pop(0)

    found = wait_until(
        probe, bell, Blocking(), Deadline.after_ms(10_000), check=no_check, check_interval_ns=20 * NS_PER_S
    )
    assert found == "work"


def test_peers_are_checked_however_often_the_bell_rings() -> None:
    class PeerGoneError(Exception):
        pass

    bell = Doorbell(bytearray(8), 0)

    def check() -> None:
        raise PeerGoneError

    with pytest.raises(PeerGoneError):
        wait_until(
            lambda: bell.ring() and None,
            bell,
            Blocking(),
            Deadline.after_ms(10_000),
            check=check,
            check_interval_ns=2 * NS_PER_MS,
        )
