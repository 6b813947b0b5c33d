"""Which cores a process may run on (the paper's section 10: a dedicated core per executor)."""

from __future__ import annotations

import os

from bus.config import PodConfig


def cores_of(config: PodConfig, service: str, index: int, cores: list[int]) -> set[int]:
    """Return the cores of `cores` for one process when `runtime.pin_cores` is on.

    Executors (attention, expert and prefill workers) take a core each, in turn when there are fewer cores. All others
    share the cores that are left over, or all of them when none is.
    """
    topology = config.topology
    first = {
        "attention": 0,
        "expert": topology.dp_groups,
        "prefill": topology.dp_groups + topology.expert_workers,
    }
    if service in first:
        return {cores[(first[service] + index) % len(cores)]}
    num_executors = topology.dp_groups + topology.expert_workers + topology.prefill_workers
    return set(cores[num_executors:] or cores)


def pin(config: PodConfig, service: str, index: int) -> None:
    """Keep this thread, and every thread that it will start, on the process's cores, if the settings say so."""
    if config.runtime.pin_cores:
        os.sched_setaffinity(0, cores_of(config, service, index, sorted(os.sched_getaffinity(0))))
