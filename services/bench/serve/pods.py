"""Pods to measure: `xds up` in a process of its own, or a gateway that runs already."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import orjson
from prometheus_client.parser import text_string_to_metric_families

from bus import config as settings
from bus.config import PodConfig
from bus.errors import ResourceError
from services.bench.serve.client import Client

URL_LINE = "  URL    "
STEP_GAUGES = ("xds:decode_step_p50_us", "xds:decode_step_p99_us", "xds:decode_step_p999_us")


@dataclass(slots=True)
class Target:
    """A gateway under load. `launcher` is None for one that somebody else started."""

    label: str
    url: str
    launcher: subprocess.Popen[str] | None = None
    client: Client = field(init=False)
    window: int = 0

    def connect(self, api_key: str) -> None:
        """Ask the gateway for its model. Raises ResourceError: it does not answer."""
        try:
            listed = asyncio.run(Client(self.url, model="", api_key=api_key).get("/v1/models"))
        except (OSError, EOFError, ValueError) as error:
            raise ResourceError(f"{self.url}/v1/models: {error}") from None
        [model] = orjson.loads(listed)["data"]
        self.window = int(model["max_model_len"])
        self.client = Client(self.url, model=str(model["id"]), api_key=api_key)

    def metrics(self) -> dict[str, float]:
        """Return /metrics, summed over labels; the worst of the gauges of step times."""
        text = asyncio.run(self.client.get("/metrics")).decode()
        sums: dict[str, float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                join = max if family.name in STEP_GAUGES else float.__add__
                sums[sample.name] = join(sums.get(sample.name, 0.0), float(sample.value))
        return sums

    def cpu_s(self) -> float:
        """Return the CPU time of the pod's living processes; 0 for a pod that somebody else started."""
        return sum(map(_cpu_s, _descendants(self.launcher.pid))) if self.launcher else 0.0


@contextlib.contextmanager
def started(label: str, config: PodConfig, overrides: Mapping[str, str]) -> Iterator[Target]:
    """Start a pod with `config` and `overrides`, on a free port and under a name of its own; end it afterwards.

    Raises:
        ConfigError: a setting. ResourceError: the pod does not come up.
    """
    with tempfile.TemporaryDirectory(prefix="xds-bench-") as folder:
        own = {"pod": f"bench-{uuid.uuid4().hex[:8]}", "gateway.port": "0", "runtime_dir": f"{folder}/run"}
        texts = _texts(config) | dict(overrides) | own
        settings.load(texts, None, {})
        log = Path(folder) / "log"
        with log.open("w") as errors:
            launcher = subprocess.Popen(
                [sys.executable, "-m", "services.cli", "up"],
                env=_environment(texts),
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,  # Ctrl-C is for this process, which ends the pod itself
            )
        try:
            target = Target(label, _url(launcher, log), launcher)
            target.connect(config.gateway.api_keys[0] if config.gateway.api_keys else "")
            yield target
        finally:
            _end(launcher, config.launcher.stop_timeout_ms / 1000 * 8)


def _texts(config: PodConfig) -> dict[str, str]:
    found = {}
    for name in settings.settings():
        value: object = config
        for part in name.split("."):
            value = getattr(value, part)
        found[name] = (
            ",".join(value)
            if isinstance(value, tuple)
            else str(value).lower()
            if isinstance(value, bool)
            else str(value)
        )
    return found


def _environment(texts: Mapping[str, str]) -> dict[str, str]:
    plain = {name: value for name, value in os.environ.items() if not name.startswith("XDS_")}
    root = str(Path(__file__).resolve().parents[3])
    given = {f"XDS_{name.upper().replace('.', '__')}": text for name, text in texts.items()}
    return {**plain, **given, "PYTHONPATH": root}


def _url(launcher: subprocess.Popen[str], log: Path) -> str:
    """Return where the gateway listens once the pod is ready. `xds up` itself gives a start up that takes too long."""
    assert launcher.stdout is not None
    for line in launcher.stdout:
        if line.startswith(URL_LINE):
            return line.removeprefix(URL_LINE).strip()
    code = launcher.wait()
    raise ResourceError(f"xds up ended with exit code {code}: {' '.join(log.read_text()[-600:].split())}")


def _end(launcher: subprocess.Popen[str], timeout_s: float) -> None:
    if launcher.poll() is None:
        launcher.send_signal(signal.SIGTERM)
    try:
        launcher.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        launcher.kill()
        launcher.communicate()


def _descendants(pid: int) -> list[int]:
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parents[int(entry.name)] = int(_stat(int(entry.name))[1])
    found = [pid]
    for one in found:  # grows while it is read
        found += [child for child, parent in parents.items() if parent == one]
    return found


def _cpu_s(pid: int) -> float:
    try:
        fields = _stat(pid)
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _stat(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat from the state on."""
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
