"""Pods shared by the tests of a session; each starts when the first test asks for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.pod import Pod, running_pod

GOLDENS = Path(__file__).parent / "parity" / "goldens"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what takes minutes unless it was asked for with `-m slow`."""
    if "slow" in (config.getoption("-m") or ""):
        return
    kept = [item for item in items if item.get_closest_marker("slow") is None]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


@pytest.fixture(scope="session")
def qwen_pod() -> Iterator[Pod]:
    """The default topology serving the tiny qwen3_moe checkpoint."""
    with running_pod(GOLDENS / "qwen3_moe") as pod:
        yield pod


@pytest.fixture(scope="session")
def deepseek_pod() -> Iterator[Pod]:
    """The default topology serving the tiny deepseek_v3 checkpoint."""
    with running_pod(GOLDENS / "deepseek_v3") as pod:
        yield pod


@pytest.fixture(scope="session")
def pod_url(deepseek_pod: Pod) -> str:
    """Base URL of a running pod."""
    return deepseek_pod.url
