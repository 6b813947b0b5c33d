"""The judge of idle pods (`tests/harness/idling.py`), on the numbers of hosts that wake up fast and slowly."""

from __future__ import annotations

import pytest

from tests.harness.idling import Use, excesses

INTERVAL_S, WAKE_UPS_MAX = 4.0, 100.0
NS_PER_US, NS_PER_S = 1_000, 1_000_000_000
# Wake-ups a second of an idle pod's processes, as measured.
RATES = {"manager-0": 18, "expert-0": 4.2, "attention-0": 6.7, "scheduler-0": 7.5, "gateway-0": 13.7}


def slept(rate: float, wake_up_us: int, extra_share: float = 0.0) -> Use:
    wake_ups = round(rate * INTERVAL_S)
    return Use(wake_ups, wake_ups * wake_up_us * NS_PER_US + round(extra_share * INTERVAL_S * NS_PER_S))


def found(wake_up_us: int, used: dict[str, Use]) -> list[str]:
    return excesses(used, slept(12, wake_up_us), INTERVAL_S, WAKE_UPS_MAX)


@pytest.mark.parametrize("wake_up_us", [50, 150, 300, 450])
def test_a_pod_that_only_wakes_up_is_idle_on_any_host(wake_up_us: int) -> None:
    used = {name: slept(rate, round(1.5 * wake_up_us)) for name, rate in RATES.items()}
    assert found(wake_up_us, used) == []


@pytest.mark.parametrize("wake_up_us", [50, 150, 300])
@pytest.mark.parametrize("spinner", RATES)
def test_three_percent_of_a_core_in_one_process_are_seen(wake_up_us: int, spinner: str) -> None:
    used = {name: slept(rate, wake_up_us) for name, rate in RATES.items()}
    used[spinner] = slept(RATES[spinner], wake_up_us, extra_share=0.03)
    assert [line.split()[0] for line in found(wake_up_us, used)] == [spinner]


def test_a_process_that_wakes_up_too_often_is_seen() -> None:
    used = {name: slept(rate, 50) for name, rate in RATES.items()}
    assert found(50, used) == []
    used["expert-0"] = slept(100, 50)
    assert len(lines := found(50, used)) == 1 and "expert-0 100.0" in lines[0]
