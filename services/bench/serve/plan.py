"""What to measure: the flags of `xds bench serve`, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from bus import config as settings
from bus.errors import ConfigError
from services.bench.serve.figures import Slo
from services.bench.serve.workload import TRACE_KINDS

SHORT_NAMES: Mapping[str, Mapping[str, str]] = {
    "colocated": {"topology.prefill_workers": "0"},
    "disaggregated": {"topology.prefill_workers": "1"},
    "gc-auto": {"runtime.gc": "auto"},
    "gc-managed": {"runtime.gc": "managed"},
    "sync": {"scheduler.async_scheduling": "false"},
    "async": {"scheduler.async_scheduling": "true"},
    "cache-on": {"scheduler.enable_prefix_caching": "true"},
    "cache-off": {"scheduler.enable_prefix_caching": "false"},
}
STANDARD_SLO = Slo(ttft_ms=500.0, tpot_ms=50.0)
SCENARIOS = ("long-prompt", "jitter")


@dataclass(frozen=True, slots=True)
class Variant:
    """One way of a comparison: a pod with `overrides` over the settings that all share."""

    label: str
    overrides: Mapping[str, str] = field(default_factory=dict)

    @staticmethod
    def parse(text: str) -> Variant:
        """Return the variant of names and settings: `disaggregated`, `sync,kv.block_tokens=8`."""
        overrides: dict[str, str] = {}
        for part in text.split(","):
            name, equals, value = part.partition("=")
            if part in SHORT_NAMES:
                overrides |= SHORT_NAMES[part]
            elif equals and name.strip() in settings.settings():
                overrides[name.strip()] = value.strip()
            else:
                names = ", ".join(SHORT_NAMES)
                raise ConfigError(f"--compare {text}: {part!r} must be one of {names}, or SETTING=VALUE")
        return Variant(text, overrides)


@dataclass(frozen=True, slots=True)
class ServePlan:
    """See the flags' help. Times in seconds."""

    scenario: str = ""
    url: str = ""
    variants: tuple[Variant, ...] = (Variant("pod"),)
    trace: tuple[str, Path] | None = None
    trace_requests: int = 100
    scale: float = 0.0  # 0 = 99 % of the trace's requests fit the model's window
    speed: float = 1.0
    rates: tuple[float, ...] = ()
    clients: tuple[int, ...] = ()
    num_requests: int = 64
    prompt_tokens: int = 32
    output_tokens: int = 128
    long_tokens: int = 32_768
    rounds: int = 1
    seed: int = 0
    slo: Slo = STANDARD_SLO

    def check(self) -> None:
        """Raise ConfigError for what cannot be measured."""
        for flag, values, low, high in (
            ("--rate", self.rates, 0.001, 1e5),
            ("--concurrency", self.clients, 1, 4096),
            ("--requests", (self.num_requests,), 1, 1e6),
            ("--prompt", (self.prompt_tokens,), 1, 1e6),
            ("--output-tokens", (self.output_tokens,), 1, 1e6),
            ("--long-prompt-tokens", (self.long_tokens,), 256, 131_072),
            ("--trace-requests", (self.trace_requests,), 1, 1e7),
            ("--scale", (self.scale or 1,), 1e-6, 1e3),
            ("--speed", (self.speed,), 1e-6, 1e6),
            ("--rounds", (self.rounds,), 1, 1000),
            ("--seed", (self.seed,), 0, 1 << 62),
            ("--slo-ttft-ms", (self.slo.ttft_ms,), 0, 1e9),
            ("--slo-tpot-ms", (self.slo.tpot_ms,), 0, 1e9),
        ):
            for value in values:
                if not low <= value <= high:
                    raise ConfigError(f"{flag} {value:g}: must be in {low:g} .. {high:g}")
        if self.scenario not in ("", *SCENARIOS):
            raise ConfigError(f"--scenario {self.scenario}: must be one of {', '.join(SCENARIOS)}")
        if self.trace is not None and self.trace[0] not in TRACE_KINDS:
            raise ConfigError(f"--trace {self.trace[0]}: must be one of {', '.join(TRACE_KINDS)}")
        if self.url and (len(self.variants) > 1 or self.variants[0].overrides):
            raise ConfigError("--url: one running pod cannot be compared with itself; leave --compare out")
        labels = [variant.label for variant in self.variants]
        if len(set(labels)) < len(labels):
            raise ConfigError(f"--compare {' '.join(labels)}: each way once")
