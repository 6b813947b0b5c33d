from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from bus import config as settings
from bus.clock import NS_PER_MS, NS_PER_S
from bus.config import LauncherConfig
from services.manager import child as child_module
from services.manager.child import Backoff, Child, command_of, environ_of
from tests.harness.poll import eventually

CONFIG = LauncherConfig(restart_backoff_ms=100, restart_backoff_ms_max=500)


def test_only_repeated_early_deaths_wait() -> None:
    backoff = Backoff(CONFIG)
    assert [backoff.next_ms(early=True) for _ in range(6)] == [0, 100, 200, 400, 500, 500]
    assert backoff.next_ms(early=False) == 0
    assert [backoff.next_ms(early=True) for _ in range(2)] == [0, 100]
    assert [backoff.next_ms(early=True) for _ in range(100)][-1] == 500


def test_the_environment_of_a_child() -> None:
    config = settings.load({"pod": "p"}, None, {})
    environ = environ_of(config, {"HOME": "/h", "PYTHONPATH": "/a", "OPENBLAS_NUM_THREADS": "3"})
    assert settings.from_resolved(environ) == config
    assert (environ["HOME"], environ["OPENBLAS_NUM_THREADS"], environ["OMP_NUM_THREADS"]) == ("/h", "3", "1")
    assert environ["PYTHONPATH"].endswith(":/a")


@pytest.fixture
def child(tmp_path: Path) -> Iterator[Child]:
    (tmp_path / "role_under_test.py").write_text(
        "import sys, signal\nprint('index', sys.argv[2], flush=True)\nprint('last words  ', flush=True)\n"
        "if sys.argv[2] != '0': sys.exit(int(sys.argv[2]))\nsignal.pause()\n"
    )
    made = Child(
        ("expert", 0), "role_under_test", {"PYTHONPATH": str(tmp_path)}, tmp_path / "expert-0.log", CONFIG
    )
    yield made
    made.send_signal(signal.SIGKILL)
    eventually(lambda: made.reap() is not None or not made.running, timeout_s=5)


def test_a_child_lives_and_dies(child: Child) -> None:
    assert (child.running, child.pid, child.reap()) == (False, 0, None)
    child.start(5)
    assert child.running and child.pid > 0 and child.reap() is None
    eventually(lambda: child.last_line() == "last words", timeout_s=10)
    child.terminate()
    codes: list[int | None] = []
    eventually(lambda: codes.append(child.reap()) or codes[-1] is not None, timeout_s=10)
    assert codes[-1] == -signal.SIGTERM
    assert not child.running
    child.terminate()  # nobody there: no error


def test_a_stopped_child_is_woken_to_stop(child: Child) -> None:
    child.start(0)
    child.send_signal(signal.SIGSTOP)
    child.terminate()
    codes: list[int | None] = []
    eventually(lambda: codes.append(child.reap()) or codes[-1] is not None, timeout_s=10)
    assert codes[-1] == -signal.SIGTERM


def test_when_it_is_started_again(child: Child) -> None:
    now_ns = 100 * NS_PER_S
    child.start(now_ns)
    assert child.plan_restart(now_ns + NS_PER_S) == 0
    assert child.plan_restart(now_ns + NS_PER_S) == 100
    assert child.restart_at_ns == now_ns + NS_PER_S + 100 * NS_PER_MS
    child.was_ready = True
    assert child.plan_restart(now_ns + NS_PER_S) == 0
    child.was_ready = False
    assert child.plan_restart(now_ns + 11 * NS_PER_S) == 0


def test_a_log_is_bounded(child: Child, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "expert-0.log"
    monkeypatch.setattr(child_module, "LOG_BYTES_MAX", 10)
    log.write_text("0123456789")
    child.bound_log()
    assert log.stat().st_size == 10
    log.write_text("0123456789\n")
    child.bound_log()
    assert (log.stat().st_size, (tmp_path / "expert-0.log.1").read_text()) == (0, "0123456789\n")
    assert child.last_line() == ""


def test_a_command_ignores_the_working_directory() -> None:
    assert command_of("services.expert.process", 3)[1:] == [
        "-P",
        "-m",
        "services.expert.process",
        "--index",
        "3",
    ]
