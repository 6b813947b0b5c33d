"""`xds status`: what the manager knows of the pod, for people or as JSON."""

from __future__ import annotations

import asyncio
import sys
import uuid

import orjson

from bus.clock import Deadline
from bus.config import PodConfig
from bus.control import endpoints, messages, rpc
from bus.control.lock import is_locked
from bus.control.sockets import Dealer
from bus.errors import RequestTimeout, ResourceError
from bus.shutdown import EXIT_FAILURE, EXIT_OK

_ANSWER_TIMEOUT_MS = 3_000  # long enough for a manager that is being started again
# What the table shows of each service; `--json` has all.
_COUNTERS_SHOWN = {
    "expert": ("expert_rows", "shared_rows", "exchanges"),
    "attention": ("computed_tokens", "sampled_tokens", "exchange_retries"),
    "scheduler": (
        "num_running",
        "num_waiting",
        "num_free_blocks",
        "num_generated_tokens",
        "prefix_cache_hits",
    ),
    "shell": ("num_waiting", "num_running", "num_offers", "num_completed_tasks", "prefix_cache_hits"),
    "prefill": ("computed_tokens", "sampled_tokens", "expert_rows"),
    "gateway": ("num_jobs", "num_redispatches"),
}


def ask_status(config: PodConfig) -> messages.PodMap | None:
    """Return the manager's map with heartbeat ages; None when no manager answers in time.

    Raises:
        ResourceError: no such pod runs: neither a manager nor a launcher lives.
    """
    locks = (endpoints.lock_path(config, "manager", 0), endpoints.pod_lock_path(config))
    if not any(is_locked(path) for path in locks):
        raise ResourceError(f"pod {config.pod} is not running (nobody holds {locks[0]})")
    return asyncio.run(_ask(config))


async def _ask(config: PodConfig) -> messages.PodMap | None:
    dealer = Dealer(endpoints.manager_endpoint(config), b"", messages.Status)
    question = messages.GetStatus(request_id=uuid.uuid4().hex)
    try:
        reply = await rpc.request(dealer, question, messages.Status, Deadline.after_ms(_ANSWER_TIMEOUT_MS))
    except RequestTimeout:
        return None
    finally:
        dealer.close()
    return reply.pod_map


def status(config: PodConfig, *, as_json: bool) -> int:
    """Print the pod's state; exit code 0 when it is healthy, 1 when not."""
    pod_map = ask_status(config)
    if pod_map is None:
        pod_map = messages.PodMap(pod=config.pod, epoch=0)
        sys.stderr.write(f"xds: pod {config.pod}: no manager answers\n")
    text = orjson.dumps(status_object(pod_map)).decode() if as_json else "\n".join(table(pod_map))
    sys.stdout.write(f"{text}\n")
    return EXIT_OK if pod_map.healthy else EXIT_FAILURE


def status_object(pod_map: messages.PodMap) -> dict[str, object]:
    """Return what `--json` prints."""
    return {
        "pod": pod_map.pod,
        "healthy": pod_map.healthy,
        "epoch": pod_map.epoch,
        "serving_dp_groups": list(pod_map.serving_dp_groups),
        "members": [
            {
                "service": member.service,
                "index": member.index,
                "pid": member.pid,
                "incarnation": member.incarnation,
                "state": member.state,
                "heartbeat_age_ms": member.heartbeat_age_ms,
                "counters": member.counters,
                "detail": member.detail,
                "endpoint": member.endpoint,
                "segment": member.segment,
                "http": member.http,
            }
            for member in pod_map.members
        ],
    }


def table(pod_map: messages.PodMap) -> list[str]:
    """Return the lines that people read."""
    groups = ", ".join(map(str, pod_map.serving_dp_groups)) or "none"
    health = "healthy" if pod_map.healthy else "not healthy"
    rows = [("MEMBER", "PID", "INCARNATION", "STATE", "HEARTBEAT", "COUNTERS")]
    rows += [_row(member) for member in pod_map.members]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    return [f"pod {pod_map.pod}: {health}, serving DP groups: {groups}, epoch {pod_map.epoch:#x}", *lines]


def _row(member: messages.Member) -> tuple[str, str, str, str, str, str]:
    shown = [name for name in _COUNTERS_SHOWN.get(member.service, ()) if name in member.counters]
    counters = [f"{name}={member.counters[name]}" for name in shown]
    return (
        endpoints.member_name(member.service, member.index),
        str(member.pid),
        str(member.incarnation),
        member.state,
        "-" if member.state == "dead" else f"{member.heartbeat_age_ms} ms ago",
        member.detail or " ".join(counters),
    )
