"""Cores of a pod's processes."""

from __future__ import annotations

import os

from bus import cores
from bus.config import PodConfig, RuntimeConfig, TopologyConfig

TOPOLOGY = TopologyConfig(dp_groups=2, expert_workers=3, prefill_workers=1)
EXECUTORS = [("attention", 0), ("attention", 1), ("expert", 0), ("expert", 1), ("expert", 2), ("prefill", 0)]


def test_each_executor_has_a_core_and_the_others_share_the_rest() -> None:
    config = PodConfig(topology=TOPOLOGY)
    taken = [cores.cores_of(config, *executor, list(range(10, 18))) for executor in EXECUTORS]
    assert taken == [{10}, {11}, {12}, {13}, {14}, {15}]
    for service in ("manager", "gateway", "scheduler", "shell"):
        assert cores.cores_of(config, service, 0, list(range(10, 18))) == {16, 17}


def test_executors_take_turns_when_cores_are_few() -> None:
    config = PodConfig(topology=TOPOLOGY)
    assert [cores.cores_of(config, *executor, [4, 7]) for executor in EXECUTORS] == [{4}, {7}] * 3
    assert cores.cores_of(config, "scheduler", 0, [4, 7]) == {4, 7}


def test_only_the_setting_pins() -> None:
    before = os.sched_getaffinity(0)
    cores.pin(PodConfig(), "attention", 0)
    assert os.sched_getaffinity(0) == before
    try:
        cores.pin(PodConfig(runtime=RuntimeConfig(pin_cores=True)), "attention", 0)
        assert os.sched_getaffinity(0) == {min(before)}
    finally:
        os.sched_setaffinity(0, before)
