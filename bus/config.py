"""The one configuration tree of a pod.

Every process must agree on it, so it lives in the bus: the gateway may not import `services`. Sources in
rising order: defaults here, `pod.toml`, environment `XDS_*` (`XDS_SCHEDULER__MAX_NUM_SEQS=8`), command-line
flags and `--set a.b=c`. `load` merges and validates them once; children receive the resolved tree as JSON in
`XDS_RESOLVED`. The SHA-256 of the tree travels in `Hello`, so two processes with different settings never
join one pod. Each setting is declared once, with its unit in its name.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import cast

import msgspec

from bus import config_rules
from bus.errors import ConfigError

DEMO_MODEL = "demo"


class _Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class TopologyConfig(_Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How many processes of each role."""

    dp_groups: int = 2  # each a scheduler and an attention worker
    expert_workers: int = 4  # at most the model's experts
    long_dp_groups: int = 0  # so many DP groups, the last ones, serve long requests only; 0 = all serve all
    prefill_workers: int = 0  # with a TE-shell that leads them; 0 = DP groups prefill themselves


class SchedulerConfig(_Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Continuous batching, per DP group."""

    max_num_seqs: int = 32  # requests that run at once
    max_num_batched_tokens: int = 256  # tokens of one step; longer prompts are chunked
    max_waiting_requests: int = 256  # beyond it: 429
    max_model_len: int = 0  # 0 = the model's own window
    async_scheduling: bool = True  # plan the next step from counts while one is under way
    enable_prefix_caching: bool = True  # reuse the KV of prompt prefixes that were computed before


class PrefillConfig(_Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Prefill workers, where there are any."""

    max_num_seqs: int = 32  # prompts that one worker computes at once
    max_num_batched_tokens: int = 512  # tokens of one step of a prefill worker
    cache_tokens: int = 16384  # KV cache of one prefill worker, in tokens
    tokens_min: int = 64  # a request that lacks fewer tokens is computed by its DP group itself
    max_waiting_tasks: int = 1024  # beyond it, DP groups prefill themselves
    policy: str = "cost"  # which worker computes a prompt (services/shell/policies): cost or round_robin
    enable_chunked_prefill: bool = True  # false: a prompt is computed in one step, however long it is
    expert_parallel: bool = False  # workers share the experts and step together; false: each has them all
    long_workers: int = 0  # of the workers, the last ones: take long prompts, and no others; 0 = all take all
    long_tokens: int = 8192  # from how many tokens a prompt is long
    priority: str = (
        "idle"  # of its workers on the machine: idle (whenever nobody else wants a core), low or normal
    )


class KvConfig(_Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Paged KV cache, per DP group."""

    block_tokens: int = 16  # tokens of one KV block
    cache_tokens: int = 16384  # KV cache of one DP group, in tokens
    host_tokens: int = 0  # evicted KV that a file in runtime_dir keeps, per DP group, in tokens; 0 = none


class AttentionConfig(_Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Attention workers."""

    kv_cache_dtype: str = "auto"  # auto (float32) or int8: latents of MLA in INT8, rotated keys in float32


class XcclConfig(_Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Data plane."""

    spin_us: int = 20  # longest spin before sleeping in the kernel
    poll_interval_ms: int = 20  # a waiter looks at owner locks after so long, twice, ... 32 times that
    stall_timeout_ms: int = 10_000  # a living peer that is silent for so long has stalled
    peer_wait_timeout_ms: int = 60_000  # how long a step waits for a dead peer's next incarnation
    num_lanes: int = 1  # threads that share the copy of a large array
    slice_us: int = 0  # time slice that token-path processes ask the kernel for; 0 = the kernel's own
    nice: int = 0  # added to their nice value; below 0 needs CAP_SYS_NICE
    shared_bytes_max: int = 4 * 1024**3  # sum of all segments of the pod
    int8: bool = False  # true: rows between attention and experts travel as INT8
    route_costs_ns: str = ""  # what A2E/E2A costs (bus/xccl/cost.py); "" = never through trampolines


class RuntimeConfig(_Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How processes use Python and the machine."""

    gc: str = (
        "managed"  # managed: garbage is looked for between steps and when idle; auto: whenever Python likes
    )
    pin_cores: bool = False  # true: a core of its own for each attention, expert and prefill worker


class HeartbeatConfig(_Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Liveness."""

    interval_ms: int = 500  # between heartbeats that have news
    hang_timeout_ms: int = 5_000  # silence after which a living process counts as hung
    lock_poll_interval_ms: int = 250  # how often the manager looks at owner locks


class LauncherConfig(_Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Supervision of a local pod (`xds up`)."""

    restart_backoff_ms: int = 100  # doubles with each early death, up to the maximum
    restart_backoff_ms_max: int = 5_000  # longest wait before a restart
    start_timeout_ms: int = 60_000  # without progress, a start has failed
    stop_timeout_ms: int = 5_000  # from SIGTERM to SIGKILL


class GatewayConfig(_Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """HTTP."""

    host: str = "127.0.0.1"  # address to listen on
    port: int = 8000  # TCP port
    api_keys: tuple[str, ...] = ()  # empty = no key needed
    served_model_name: str = ""  # "" = the model folder's name
    tool_parser: str = (
        "auto"  # auto (by model family), none, deepseek_v3, glm45, hermes, kimi_k2 or minimax_m2
    )
    reasoning_parser: str = (
        "auto"  # auto (by chat template), none, deepseek_r1, glm45, kimi_k2, minimax_m2 or qwen3
    )
    body_bytes_max: int = 4 * 1024**2  # of a request; beyond it: 413
    retry_attempts_max: int = 20  # re-dispatches of one request after deaths
    retry_window_ms: int = 60_000  # how long an accepted request waits for a group that can serve it
    backlog_tokens_max: int = 4096  # tokens that may wait for a client that reads slowly
    policy: str = "prefix"  # which DP group gets a request: round_robin, least_loaded, kv_usage or prefix
    output_reserve_tokens: int = 512  # output to come that counts as KV in use, at most, per request
    balance_percent: int = 50  # prefix: of its KV cache that a group may use more than the least used one
    prefix_percent_min: int = 10  # prefix: of the prompt; a shorter one decides nothing
    long_tokens: int = 8192  # from so many prompt tokens + max_tokens on, a request is long


class PodConfig(_Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole tree."""

    pod: str = "xds"  # name; two pods of one name cannot run at once
    model: str = "demo"  # Hugging Face folder, or the packaged demo model
    runtime_dir: str = ""  # "" = $XDG_RUNTIME_DIR/xds/<pod>, or /tmp/xds-<uid>/<pod>
    log_level: str = "info"  # debug, info, warning or error
    log_format: str = "console"  # console or json
    topology: TopologyConfig = TopologyConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    prefill: PrefillConfig = PrefillConfig()
    kv: KvConfig = KvConfig()
    attention: AttentionConfig = AttentionConfig()
    xccl: XcclConfig = XcclConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    heartbeat: HeartbeatConfig = HeartbeatConfig()
    launcher: LauncherConfig = LauncherConfig()
    gateway: GatewayConfig = GatewayConfig()


# --------------------------------------------------------------------------- merging the sources

RESERVED_VARIABLES = frozenset({"XDS_RESOLVED", "XDS_PDEATHSIG", "XDS_CONFIG"})  # XDS_* that are no settings
_PREFIX = "XDS_"
_LIST_SEPARATOR = ","


def settings() -> dict[str, object]:
    """Return every setting's dotted name with its default, in order of declaration."""
    return {name: default for name, _, default in _leaves(PodConfig)}


def load(
    argv_overrides: Mapping[str, str], config_path: Path | None, environ: Mapping[str, str]
) -> PodConfig:
    """Merge defaults < `config_path` < `XDS_*` of `environ` < `argv_overrides`, and validate the whole.

    Args:
        argv_overrides: dotted name -> text, from flags and `--set`.
        config_path: a TOML file, or None.
        environ: the process's environment; only `XDS_*`, `XDG_RUNTIME_DIR` are read.

    Returns:
        A tree whose `runtime_dir` is absolute and whose `model` is "demo" or an absolute path, so that it
        means the same in every process.

    Raises:
        ConfigError: unknown setting, wrong type, value outside its rule, unreadable file.
    """
    values: dict[str, object] = {}
    if config_path is not None:
        values |= _from_toml(config_path)
    values |= _from_environ(environ)
    values |= {name: _from_text(name, text, "flag") for name, text in argv_overrides.items()}
    config = _build(values)
    config = msgspec.structs.replace(
        config,
        model=config.model if config.model in ("", DEMO_MODEL) else _absolute(config.model),
        runtime_dir=_absolute(config.runtime_dir or _default_runtime_dir(config.pod, environ)),
    )
    config_rules.validate(config)
    return config


def from_resolved(environ: Mapping[str, str]) -> PodConfig:
    """Return the tree that the parent put into `XDS_RESOLVED`, or merge the sources when there is none.

    Raises:
        ConfigError: as `load`, or the variable does not hold a tree.
    """
    text = environ.get("XDS_RESOLVED")
    if text is None:
        path = environ.get("XDS_CONFIG")
        return load({}, Path(path) if path else None, environ)
    try:
        config = msgspec.json.decode(text.encode(), type=PodConfig)
    except msgspec.MsgspecError as error:
        raise ConfigError(f"XDS_RESOLVED: {error}") from None
    config_rules.validate(config)
    return config


def resolved_json(config: PodConfig) -> str:
    """Return the tree as one line of JSON, keys in a fixed order: what `XDS_RESOLVED` holds."""
    return msgspec.json.encode(config, order="deterministic").decode()


def config_sha(config: PodConfig) -> str:
    """Return the SHA-256 (hex) of the resolved tree; equal settings have equal digests in every process."""
    return hashlib.sha256(resolved_json(config).encode()).hexdigest()


def runtime_dir(config: PodConfig) -> Path:
    """Return the folder of the pod's sockets and locks. Not created here."""
    return Path(config.runtime_dir or _default_runtime_dir(config.pod, os.environ))


def model_path(config: PodConfig) -> Path:
    """Return the checkpoint's folder; "demo" is the one that ships with the packages."""
    if config.model == DEMO_MODEL:
        return Path(__file__).resolve().parent.parent / "services" / "demo"
    return Path(config.model)


def model_name(config: PodConfig) -> str:
    """Return the name under which HTTP clients know the model."""
    return config.gateway.served_model_name or Path(config.model).name


def _default_runtime_dir(pod: str, environ: Mapping[str, str]) -> str:
    base = environ.get("XDG_RUNTIME_DIR", "")
    if base and Path(base).is_dir():
        return str(Path(base) / "xds" / pod)
    return f"/tmp/xds-{os.getuid()}/{pod}"


def _absolute(path: str) -> str:
    return os.path.normpath(Path(path).expanduser().absolute())


def _leaves(section: type[msgspec.Struct], prefix: str = "") -> Iterator[tuple[str, object, object]]:
    for field in msgspec.structs.fields(section):
        if isinstance(field.type, type) and issubclass(field.type, msgspec.Struct):
            yield from _leaves(field.type, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", field.type, field.default


_TYPES: dict[str, object] = {name: kind for name, kind, _ in _leaves(PodConfig)}


def _from_toml(path: Path) -> dict[str, object]:
    try:
        tree = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: not TOML: {error}") from None
    return {name: _convert(name, value, f"{path}", strict=True) for name, value in _flatten(tree)}


def _flatten(tree: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _from_environ(environ: Mapping[str, str]) -> dict[str, object]:
    values = {}
    for variable, text in sorted(environ.items()):
        if variable.startswith(_PREFIX) and variable not in RESERVED_VARIABLES:
            name = variable.removeprefix(_PREFIX).lower().replace("__", ".")
            values[name] = _from_text(name, text, f"environment {variable}")
    return values


def _from_text(name: str, text: str, source: str) -> object:
    value: object = text
    if _TYPES.get(name) == tuple[str, ...]:
        value = [part for part in text.split(_LIST_SEPARATOR) if part]
    return _convert(name, value, source, strict=False)


def _convert(name: str, value: object, source: str, *, strict: bool) -> object:
    if name not in _TYPES:
        near = difflib.get_close_matches(name, _TYPES, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{name}: no such setting ({source}){hint}")
    try:
        return msgspec.convert(value, _TYPES[name], strict=strict)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{name} = {value!r} ({source}): {error}") from None


def _build(values: Mapping[str, object]) -> PodConfig:
    tree: dict[str, object] = {}
    for name, value in values.items():
        section = tree
        *parents, leaf = name.split(".")
        for parent in parents:
            section = cast("dict[str, object]", section.setdefault(parent, {}))
        section[leaf] = value
    return msgspec.convert(tree, PodConfig)
