"""The rules that the values of a pod's settings must obey, each checked in one place.

A broken rule is a `ConfigError` of one line: the setting, its value, the rule.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, cast

from bus.errors import ConfigError
from bus.priority import SLICE_US_MAX, SLICE_US_MIN

if TYPE_CHECKING:
    from bus.config import PodConfig

_COUNT = (1, 64)
_MS = (1, 3_600_000)
_RANGES: dict[str, tuple[int, int]] = {
    "topology.dp_groups": _COUNT,
    "topology.expert_workers": _COUNT,
    "topology.long_dp_groups": (0, 63),
    "topology.prefill_workers": (0, 64),
    "scheduler.max_num_seqs": (1, 4096),
    "scheduler.max_num_batched_tokens": (1, 65_536),
    "scheduler.max_waiting_requests": (1, 1_000_000),
    "scheduler.max_model_len": (0, 10_000_000),
    "prefill.max_num_seqs": (1, 4096),
    "prefill.max_num_batched_tokens": (1, 1_048_576),
    "prefill.cache_tokens": (1, 100_000_000),
    "prefill.tokens_min": (1, 10_000_000),
    "prefill.max_waiting_tasks": (1, 1_000_000),
    "prefill.long_workers": (0, 63),
    "prefill.long_tokens": (1, 10_000_000),
    "kv.block_tokens": (1, 1024),
    "kv.cache_tokens": (1, 100_000_000),
    "kv.host_tokens": (0, 1_000_000_000),
    "xccl.spin_us": (0, 10_000),
    "xccl.poll_interval_ms": (1, 1_000),
    "xccl.stall_timeout_ms": _MS,
    "xccl.peer_wait_timeout_ms": _MS,
    "xccl.num_lanes": (1, 64),
    "xccl.nice": (-20, 19),
    "xccl.shared_bytes_max": (1 << 20, 1 << 50),
    "heartbeat.interval_ms": (10, 60_000),
    "heartbeat.hang_timeout_ms": _MS,
    "heartbeat.lock_poll_interval_ms": (10, 60_000),
    "launcher.restart_backoff_ms": _MS,
    "launcher.restart_backoff_ms_max": _MS,
    "launcher.start_timeout_ms": _MS,
    "launcher.stop_timeout_ms": _MS,
    "gateway.port": (0, 65_535),
    "gateway.body_bytes_max": (1024, 1 << 30),
    "gateway.retry_attempts_max": (0, 1_000),
    "gateway.retry_window_ms": _MS,
    "gateway.backlog_tokens_max": (1, 100_000_000),
    "gateway.output_reserve_tokens": (0, 100_000_000),
    "gateway.balance_percent": (0, 10_000),
    "gateway.prefix_percent_min": (0, 100),
    "gateway.long_tokens": (1, 100_000_000),
}
_POD_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,23}")
_ROUTE_COSTS = re.compile(r"(?:\d+(?:\.\d+)?(?:e[+-]?\d{1,2})?(?:,(?!$)|$)){6}|")
PRIORITIES = ("idle", "low", "normal")
KV_CACHE_DTYPES = ("auto", "int8")
_GC_MODES = ("managed", "auto")
_LOG_LEVELS = ("debug", "info", "warning", "error")
_LOG_FORMATS = ("console", "json")
_SOCKET_PATH_BYTES_MAX = 107  # sockaddr_un.sun_path less its terminator
_LONGEST_SOCKET_NAME = "scheduler-63.4294967295.sock"


def validate(config: PodConfig) -> None:
    """Check every value against its rule.

    Raises:
        ConfigError: names the setting, its value and the rule.
    """
    for name, (low, high) in _RANGES.items():
        value = _value(config, name)
        _require(isinstance(value, int) and low <= value <= high, name, value, f"must be {low}..{high}")
    _require(
        _POD_NAME.fullmatch(config.pod) is not None, "pod", config.pod, f"must match {_POD_NAME.pattern}"
    )
    _require(bool(config.model), "model", config.model, "must be a folder, or demo")
    levels, formats = ", ".join(_LOG_LEVELS), ", ".join(_LOG_FORMATS)
    _require(config.log_level in _LOG_LEVELS, "log_level", config.log_level, f"must be one of {levels}")
    _require(config.log_format in _LOG_FORMATS, "log_format", config.log_format, f"must be one of {formats}")
    slice_us, low, high = config.xccl.slice_us, SLICE_US_MIN, SLICE_US_MAX
    _require(
        slice_us == 0 or low <= slice_us <= high, "xccl.slice_us", slice_us, f"must be 0 or {low}..{high}"
    )
    priority, names = config.prefill.priority, ", ".join(PRIORITIES)
    _require(priority in PRIORITIES, "prefill.priority", priority, f"must be one of {names}")
    costs = config.xccl.route_costs_ns
    rule = 'must be "" or six numbers, separated by commas, none negative'
    _require(_ROUTE_COSTS.fullmatch(costs) is not None, "xccl.route_costs_ns", costs, rule)
    dtype, names = config.attention.kv_cache_dtype, ", ".join(KV_CACHE_DTYPES)
    _require(dtype in KV_CACHE_DTYPES, "attention.kv_cache_dtype", dtype, f"must be one of {names}")
    modes = ", ".join(_GC_MODES)
    _require(config.runtime.gc in _GC_MODES, "runtime.gc", config.runtime.gc, f"must be one of {modes}")
    _require(bool(config.gateway.host), "gateway.host", config.gateway.host, "must be a host name or address")
    _validate_relations(config)
    _validate_long_groups(config)
    _validate_runtime_dir(config)


def _validate_relations(config: PodConfig) -> None:
    kv, beat, launcher, scheduler = config.kv, config.heartbeat, config.launcher, config.scheduler
    power_of_two = kv.block_tokens & (kv.block_tokens - 1) == 0
    _require(power_of_two, "kv.block_tokens", kv.block_tokens, "must be a power of two")
    for name in ("kv.cache_tokens", "kv.host_tokens", "prefill.cache_tokens"):
        cache_tokens = cast("int", _value(config, name))
        rule = f"must be a multiple of kv.block_tokens = {kv.block_tokens}"
        _require(cache_tokens % kv.block_tokens == 0, name, cache_tokens, rule)
    _require(
        scheduler.max_num_batched_tokens >= scheduler.max_num_seqs,
        "scheduler.max_num_batched_tokens",
        scheduler.max_num_batched_tokens,
        f"must be at least scheduler.max_num_seqs = {scheduler.max_num_seqs}",
    )
    num_workers, long_workers = config.topology.prefill_workers, config.prefill.long_workers
    rule = f"must be 0 or leave one of topology.prefill_workers = {num_workers} for short prompts"
    _require(0 <= long_workers < max(1, num_workers), "prefill.long_workers", long_workers, rule)
    _require(
        beat.hang_timeout_ms >= 3 * beat.interval_ms,
        "heartbeat.hang_timeout_ms",
        beat.hang_timeout_ms,
        f"must be at least 3 x heartbeat.interval_ms = {3 * beat.interval_ms}",
    )
    _require(
        launcher.restart_backoff_ms_max >= launcher.restart_backoff_ms,
        "launcher.restart_backoff_ms_max",
        launcher.restart_backoff_ms_max,
        f"must be at least launcher.restart_backoff_ms = {launcher.restart_backoff_ms}",
    )


def _validate_long_groups(config: PodConfig) -> None:
    """Both kinds of groups must be able to get requests."""
    num_groups, num_long, long_tokens = (
        config.topology.dp_groups,
        config.topology.long_dp_groups,
        config.gateway.long_tokens,
    )
    if num_long == 0:
        return
    rule = f"must be below topology.dp_groups = {num_groups}, or nobody serves short requests"
    _require(num_long < num_groups, "topology.long_dp_groups", num_long, rule)
    _require(
        long_tokens > 1, "gateway.long_tokens", long_tokens, "must be at least 2, or no request is short"
    )
    for name in ("kv.cache_tokens", "scheduler.max_model_len"):
        most = cast("int", _value(config, name))
        rule = f"must be at most {name} = {most}, or no request is long"
        _require(most == 0 or long_tokens <= most, "gateway.long_tokens", long_tokens, rule)


def _validate_runtime_dir(config: PodConfig) -> None:
    if not config.runtime_dir:
        return
    folder = Path(config.runtime_dir)
    length_bytes = len(os.fsencode(folder / _LONGEST_SOCKET_NAME))
    room = _SOCKET_PATH_BYTES_MAX - len(_LONGEST_SOCKET_NAME) - 1
    rule = f"must be at most {room} bytes long, or Unix sockets cannot live in it"
    _require(length_bytes <= _SOCKET_PATH_BYTES_MAX, "runtime_dir", str(folder), rule)


def _value(config: PodConfig, name: str) -> object:
    value: object = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _require(ok: bool, name: str, value: object, rule: str) -> None:
    if not ok:
        raise ConfigError(f"{name} = {value!r}: {rule}")
