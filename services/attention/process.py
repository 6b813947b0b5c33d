"""An attention worker's process: the executor of one DP group.

Life cycle:
    1. take the owner lock and an incarnation; say `Hello` (state starting);
    2. map the model's tensors except all experts;
    3. sweep what earlier incarnations left; create the segment: cells for every expert rank, the managed block that
       experts pull activations from, and the app area that holds the KV blocks;
    4. start the hot loop, which greets the scheduler of this DP group and fetches KV between steps; say ready;
    5. on SIGTERM: stop the loop, unlink the segment, say `Goodbye`.

Opens: a DEALER to the manager (event loop) and one to its scheduler (hot loop); its own segment; every expert
worker's and, for KV, prefill worker's segment. If the scheduler dies, the step at hand is finished or abandoned, and
the next incarnation greeted. If an expert worker dies, the layer's exchange is sent again to its next incarnation. If
the manager dies, the last pod map stays in force. If this process dies, its KV blocks die with it and the scheduler
computes the requests again.
"""

from __future__ import annotations

import asyncio

import structlog

from bus import config as settings
from bus import process
from bus.clock import NS_PER_MS, now_ns
from bus.config import PodConfig
from bus.control.member import Member
from bus.control.messages import ExecutorReady
from bus.distflow.sink import KvSink
from bus.errors import ConfigError
from bus.garbage import ManagedGc
from bus.memory.layout import SegmentLayout
from bus.memory.segment import Segment
from bus.priority import prioritise
from bus.xccl.group import AddressTable
from bus.xccl.trampoline import RoutedAttention
from services.attention.experts import RemoteExperts
from services.balance.placement import ExpertMap
from services.model.attention_model import AttentionModel
from services.model.config import ModelConfig, load_config
from services.model.kv_cache import KvCache
from services.model.numerics import check_row_independence
from services.model.sampler import Sampler
from services.pod import a2e_shape, create_segment, thread_failure
from services.steps.executor import StepExecutor
from services.steps.host_file import HostFile
from services.steps.hot_loop import HotLoop
from services.steps.transfers import KvFetches

STOP_TIMEOUT_S = 2.0

log = structlog.get_logger(__name__)


async def attention_main(config: PodConfig, index: int) -> None:
    """Serve as the attention worker of DP group `index` until cancelled."""
    member = Member(config, "attention", index)
    member.segment = member.segment_name
    async with member:
        model_config = load_config(settings.model_path(config))
        check_settings(config, model_config)
        model = await asyncio.to_thread(load_model, config, model_config, member)
        shape = a2e_shape(config, model_config)
        num_blocks = config.kv.cache_tokens // config.kv.block_tokens
        kv_bytes = model.kv_bytes(num_blocks, config.kv.block_tokens)
        data = shape.attention_layout()
        layout = SegmentLayout(data.num_cells, data.managed_bytes, kv_bytes)
        segment = create_segment(config, member, layout)
        try:
            await serve(config, member, segment, model, num_blocks)
        finally:
            segment.close()
            segment.unlink()


def check_settings(config: PodConfig, model: ModelConfig) -> None:
    """Raise ConfigError, naming field, value and rule, for settings that do not fit the model."""
    if 0 < model.num_experts < config.topology.expert_workers:
        raise ConfigError(
            f"topology.expert_workers = {config.topology.expert_workers}: must be at most the model's "
            f"{model.num_experts} experts"
        )
    if config.scheduler.max_model_len > model.max_position_embeddings:
        raise ConfigError(
            f"scheduler.max_model_len = {config.scheduler.max_model_len}: must be at most the model's window of "
            f"{model.max_position_embeddings}"
        )


def load_model(config: PodConfig, model_config: ModelConfig, member: Member) -> AttentionModel:
    """Check the machine's arithmetic and map everything of the model but the experts. Raises ConfigError."""
    check_row_independence()
    return AttentionModel.load(
        settings.model_path(config),
        model_config,
        progress=lambda done, total: member.set_detail(f"loading weights {done}/{total}"),
        kv_cache_dtype=config.attention.kv_cache_dtype,
    )


async def serve(
    config: PodConfig, member: Member, segment: Segment, model: AttentionModel, num_blocks: int
) -> None:
    """Run the hot loop until cancelled; raises what ended it."""
    prioritise(config.xccl.slice_us, config.xccl.nice)
    kv = model.allocate_kv(segment.app, num_blocks, config.kv.block_tokens)
    host = open_host_file(config, member.index, kv)
    table = AddressTable()
    side = RoutedAttention(segment, a2e_shape(config, model.config), member.index, table, config=config.xccl)
    experts = remote_experts(config, member, segment, side, table, model.config)
    executor = StepExecutor(
        model,
        kv,
        experts,
        Sampler(settings.model_path(config), model.config.vocab_size),
        rows_max=config.scheduler.max_num_batched_tokens,
        incarnation=member.incarnation,
        host=host,
    )
    fetches = kv_fetches(config, member, segment, model, num_blocks)
    garbage = ManagedGc(config.runtime.gc)
    loop = HotLoop(
        executor,
        segment,
        greeting(config, member, model.config, kv, host),
        identity=member.identity,
        scheduler=lambda: member.lookup("scheduler", member.index),
        transfers=fetches,
        garbage=garbage,
    )
    failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    loop.on_failure = thread_failure(failed)
    hang_ns = config.heartbeat.hang_timeout_ms * NS_PER_MS // 2
    member.vouch = lambda: now_ns() - segment.heartbeat_ns() < hang_ns
    member.counters = lambda: {**executor.counters_now(), **(fetches.counters() if fetches else {})}
    garbage.take_over()
    loop.start()
    member.set_state("ready")
    try:
        await failed
    finally:
        loop.stop(STOP_TIMEOUT_S)
        side.close()
        table.close()
        if host is not None:
            host.close()


def kv_fetches(
    config: PodConfig, member: Member, segment: Segment, model: AttentionModel, num_blocks: int
) -> KvFetches | None:
    """Return the receiving side of KV transfer; None in a pod without prefill workers."""
    if not config.topology.prefill_workers:
        return None
    sink = KvSink(
        segment.app,
        num_blocks=num_blocks,
        block_bytes=model.kv_bytes(1, config.kv.block_tokens),
        index=member.index,
        incarnation=member.incarnation,
        rank=member.name,
    )
    return KvFetches(sink, member.incarnation)


def remote_experts(
    config: PodConfig,
    member: Member,
    segment: Segment,
    side: RoutedAttention,
    table: AddressTable,
    model: ModelConfig,
) -> RemoteExperts:
    """Return the way to the expert workers."""
    expert_map = ExpertMap.contiguous(
        model.num_experts, config.topology.expert_workers, has_shared_expert=model.has_shared_expert
    )
    experts = RemoteExperts(
        side,
        table,
        segment,
        expert_map,
        config.xccl,
        dp_rank=member.index,
        rows_max=config.scheduler.max_num_batched_tokens,
        num_slots=model.top_k + int(expert_map.has_shared_expert),
        hidden=model.hidden_size,
    )
    experts.pod_map = lambda: member.pod_map
    return experts


def open_host_file(config: PodConfig, index: int, kv: KvCache) -> HostFile | None:
    """Return the file that keeps evicted blocks, None where there is to be none. Raises ResourceError."""
    if config.kv.host_tokens == 0:
        return None
    path = settings.runtime_dir(config) / f"attention-{index}.kv"
    return HostFile(path, num_slots=config.kv.host_tokens // kv.block_tokens, block_bytes=kv.array[0].nbytes)


def greeting(
    config: PodConfig, member: Member, model: ModelConfig, kv: KvCache, host: HostFile | None
) -> ExecutorReady:
    """Return what the scheduler needs to know of this worker."""
    return ExecutorReady(
        index=member.index,
        incarnation=member.incarnation,
        num_blocks=kv.num_blocks,
        block_tokens=kv.block_tokens,
        max_model_len=config.scheduler.max_model_len or model.max_position_embeddings,
        vocab_size=model.vocab_size,
        num_host_blocks=host.num_slots if host is not None else 0,
        host_bytes_per_s=host.bytes_per_s() if host is not None else 0,
        block_bytes=kv.array[0].nbytes,
    )


def main() -> None:
    """Run this process until it is told to stop."""
    process.run(attention_main, "attention")


if __name__ == "__main__":
    main()
