"""An expert worker's process.

Life cycle:
    1. take the owner lock and an incarnation; say `Hello` (state starting);
    2. map the tensors of the experts that this rank owns (and of the shared expert), nothing else of the model;
    3. sweep what earlier incarnations left; create the segment (cells and y blocks for every attention rank);
    4. start the hot loop; say ready. From then on attention workers find the segment through the pod map;
    5. on SIGTERM: stop the loop, unlink the segment, say `Goodbye`.

Opens: a DEALER to the manager; its own segment; the segments of attention workers, when they first write to it.
If an attention worker dies, nothing here notices but that its cell stays silent; its next incarnation is attached when
its first message comes and the pod map names it. If the manager dies, serving goes on. If the hot loop fails, the
process ends with an error and is started again.
"""

from __future__ import annotations

import asyncio

import structlog

from bus import config as settings
from bus import process
from bus.clock import NS_PER_MS, NS_PER_S, now_ns
from bus.config import PodConfig
from bus.control.member import Member
from bus.errors import ConfigError
from bus.garbage import ManagedGc
from bus.memory.segment import Segment
from bus.priority import prioritise
from bus.xccl.group import AddressTable
from bus.xccl.relay import RoutedExpert
from services.balance.placement import owned_experts
from services.expert.engine import ExpertEngine
from services.model.config import ModelConfig, load_config
from services.model.expert_model import ExpertModel
from services.model.numerics import check_row_independence
from services.pod import a2e_shape, create_segment, thread_failure

STOP_TIMEOUT_S = 2.0

log = structlog.get_logger(__name__)


async def expert_main(config: PodConfig, index: int) -> None:
    """Serve as expert rank `index` until cancelled."""
    member = Member(config, "expert", index)
    member.segment = member.segment_name
    async with member:
        model_config = load_config(settings.model_path(config))
        model = await asyncio.to_thread(load_model, config, model_config, index, member)
        shape = a2e_shape(config, model_config)
        segment = create_segment(config, member, shape.expert_layout())
        try:
            await serve(config, model_config, member, segment, model)
        finally:
            segment.close()
            segment.unlink()


def load_model(config: PodConfig, model_config: ModelConfig, index: int, member: Member) -> ExpertModel:
    """Check the machine's arithmetic and map this rank's weights. Raises ConfigError."""
    check_row_independence()
    num_workers = config.topology.expert_workers
    if not 0 <= index < num_workers:
        raise ConfigError(f"--index = {index}: must be below topology.expert_workers = {num_workers}")
    if 0 < model_config.num_experts < num_workers:
        rule = f"must be at most the model's {model_config.num_experts} experts"
        raise ConfigError(f"topology.expert_workers = {num_workers}: {rule}")
    return ExpertModel.load(
        settings.model_path(config),
        model_config,
        owned_experts(model_config.num_experts, num_workers, index),
        shared=model_config.has_shared_expert,
        progress=lambda done, total: member.set_detail(f"loading weights {done}/{total}"),
    )


async def serve(
    config: PodConfig, model_config: ModelConfig, member: Member, segment: Segment, model: ExpertModel
) -> None:
    """Run the hot loop until cancelled; raises what ended it."""
    prioritise(config.xccl.slice_us, config.xccl.nice)
    shape = a2e_shape(config, model_config)
    table = AddressTable()
    side = RoutedExpert(segment, shape, member.index, table, config=config.xccl)
    num_experts = model_config.num_experts
    owned = [*owned_experts(num_experts, config.topology.expert_workers, member.index)]
    if model_config.has_shared_expert:
        owned.append(num_experts)
    hang_ns = config.heartbeat.hang_timeout_ms * NS_PER_MS // 2
    garbage = ManagedGc(config.runtime.gc)
    engine = ExpertEngine(
        segment,
        side,
        table,
        model,
        owned=owned,
        num_experts=num_experts,
        idle_beat_ns=min(NS_PER_S, hang_ns // 4),
        garbage=garbage,
    )
    failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    engine.pod_map = lambda: member.pod_map
    engine.on_failure = thread_failure(failed)
    member.vouch = lambda: now_ns() - segment.heartbeat_ns() < hang_ns
    member.counters = engine.counters
    garbage.take_over()
    engine.start()
    member.set_state("ready")
    try:
        await failed
    finally:
        engine.stop(STOP_TIMEOUT_S)
        side.close()
        table.close()


def main() -> None:
    """Run this process until it is told to stop."""
    process.run(expert_main, "expert")


if __name__ == "__main__":
    main()
