"""What the roles with a data plane share: the agreed shape of the exchange, and how a segment comes into being."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from bus.config import PodConfig
from bus.control.member import Member
from bus.control.messages import PodMap
from bus.memory.layout import SegmentLayout
from bus.memory.segment import Segment, check_memory, sweep, total_bytes
from bus.xccl.cost import CostRule, Route
from bus.xccl.endpoint import Rank
from bus.xccl.group import AddressTable
from bus.xccl.relay_layout import RelayShape
from services.model.config import ModelConfig


def a2e_shape(config: PodConfig, model: ModelConfig) -> RelayShape:
    """Return the shape of A2E/E2A that every process of the pod derives from the same settings."""
    return RelayShape(
        num_attention_ranks=config.topology.dp_groups,
        num_expert_ranks=config.topology.expert_workers,
        rows_max=config.scheduler.max_num_batched_tokens,
        num_slots=model.top_k + int(model.has_shared_expert),
        hidden=model.hidden_size,
        int8=config.xccl.int8,
        has_trampolines=CostRule.parse(config.xccl.route_costs_ns).only is not Route.DIRECT,
    )


def learn_addresses(table: AddressTable, pod_map: PodMap) -> None:
    """Tell `table` where every member with a segment lives."""
    for member in pod_map.members:
        if member.segment:
            table.learn(Rank(member.service, member.index), member.incarnation, member.segment)


def create_segment(config: PodConfig, member: Member, layout: SegmentLayout) -> Segment:
    """Create `member`'s segment after sweeping what its dead incarnations left.

    Raises:
        ResourceError: the pod's bound or the machine's free memory does not allow it.
    """
    pod_prefix = f"/xds-{config.pod}-"
    sweep(f"{pod_prefix}{member.name}-")
    check_memory(layout.total_bytes, config.xccl.shared_bytes_max, bytes_held=total_bytes(pod_prefix))
    return Segment.create(
        member.segment,
        layout,
        service=member.service,
        index=member.index,
        incarnation=member.incarnation,
    )


def thread_failure(failed: asyncio.Future[None]) -> Callable[[BaseException], None]:
    """Return a callback with which a thread hands its exception to the event loop that awaits `failed`."""
    loop = asyncio.get_running_loop()

    def hand_over(error: BaseException) -> None:
        loop.call_soon_threadsafe(_fail, failed, error)

    return hand_over


def _fail(future: asyncio.Future[None], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)
