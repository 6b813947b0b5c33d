"""What a run measures."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from bus.config import XcclConfig
from bus.errors import ConfigError

SECTIONS = ("p2p", "crowd", "all-to-all", "moe", "trampoline", "thresholds")
PEERS = ("pipe", "pyzmq", "openmpi", "mpich", "iceoryx2", "gloo")
KINDS = ("float32", "int8")
SIZE_MAX = 64 << 20
RANKS_MAX = 64
ROWS_MAX = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything that a run depends on.

    sizes: bytes of a message, in plain all-to-all per pair of ranks. batch: tokens per rank. kinds: float32 or int8
    rows on the wire. rounds: how often the ways take turns. budget_s: time of one way's turn.
    """

    sections: tuple[str, ...] = SECTIONS
    peers: tuple[str, ...] = PEERS
    sizes: tuple[int, ...] = (64, 4096, 65536, 1 << 20, 8 << 20)
    ranks: tuple[int, ...] = (4, 8, 16)
    batch: tuple[int, ...] = (1, 8, 32, 96)
    hidden: tuple[int, ...] = (256, 2048)
    top_k: tuple[int, ...] = (4, 8)
    kinds: tuple[str, ...] = KINDS
    num_experts: int = 64
    rounds: int = 3
    budget_s: float = 0.06
    busy_processes: int = 6
    all_trampolines: bool = True  # every load of bus/bench/trampoline.py, or the first only
    xccl: XcclConfig = field(default_factory=XcclConfig)

    def check(self) -> None:
        """Raise ConfigError, naming flag, value and rule."""
        _choices("--only", self.sections, SECTIONS)
        _choices("--peers", self.peers, PEERS)
        _choices("--kinds", self.kinds, KINDS)
        _range("--sizes", self.sizes, 1, SIZE_MAX)
        _range("--ranks", self.ranks, 2, RANKS_MAX)
        _range("--batch", self.batch, 1, ROWS_MAX)
        _range("--hidden", self.hidden, 4, 1 << 16)
        _range("--experts", (self.num_experts,), 1, 4096)
        _range("--top-k", self.top_k, 1, min(64, self.num_experts))
        _range("--rounds", (self.rounds,), 1, 1000)
        for ranks in self.ranks:
            if self.num_experts % ranks:
                raise ConfigError(f"--ranks {ranks}: must divide the {self.num_experts} experts (--experts)")
            if ranks % 2:
                raise ConfigError(f"--ranks {ranks}: must be even, half of them hold the experts in A2E")
        for hidden in self.hidden:
            if hidden % 4:
                raise ConfigError(f"--hidden {hidden}: must be a multiple of 4")

    def quick(self) -> Plan:
        """Return what a minute is enough for; what the caller named stays."""
        short: dict[str, object] = {
            "sizes": (64, 65536),
            "ranks": (4,),
            "batch": (1, 32),
            "hidden": (256,),
            "top_k": (4,),
            "rounds": 2,
            "budget_s": 0.02,
            "all_trampolines": False,
        }
        standard = Plan()
        unnamed = {
            name: value for name, value in short.items() if getattr(self, name) == getattr(standard, name)
        }
        return replace(self, **unnamed)  # type: ignore[arg-type]


def _choices(flag: str, given: tuple[str, ...], known: tuple[str, ...]) -> None:
    for name in given:
        if name not in known:
            raise ConfigError(f"{flag} {name}: must be one of {', '.join(known)}")


def _range(flag: str, given: tuple[int, ...], low: int, high: int) -> None:
    if not given:
        raise ConfigError(f"{flag}: needs at least one value")
    for value in given:
        if not low <= value <= high:
            raise ConfigError(f"{flag} {value}: must be in {low}..{high}")
