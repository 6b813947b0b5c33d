"""A prefill worker's process: an executor that computes prompts for others.

Life cycle:
    1. take the owner lock and an incarnation; step behind the token path (`yield_to_token_path`); say `Hello`
       (state starting);
    2. map the whole model, or with `prefill.expert_parallel` only some of its experts; experts are mapped, so their
       bytes are shared with the expert workers;
    3. sweep what earlier incarnations left; create the segment: its app area holds KV blocks and transfer table;
    4. start the hot loop, which greets the TE-shell; say ready;
    5. on SIGTERM: stop the loop, unlink the segment, say `Goodbye`.

Opens: a DEALER to the manager (event loop) and one to the TE-shell (hot loop); its own segment, from which attention
workers fetch KV; with `prefill.expert_parallel` the segments of the other prefill workers. If the shell dies, all
offers are withdrawn and the next incarnation is greeted. If the manager dies, the last pod map stays in force. If
this process dies, its KV dies with it and the shell has the prompts computed again.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path

import structlog

from bus import config as settings
from bus import process
from bus.clock import NS_PER_MS, now_ns
from bus.config import PodConfig
from bus.control.member import Member
from bus.control.messages import ExecutorReady
from bus.distflow.source import KvSource
from bus.distflow.table import TransferLayout
from bus.errors import ConfigError
from bus.garbage import ManagedGc
from bus.memory.layout import SegmentLayout
from bus.memory.segment import Segment
from bus.xccl.dispatch import Dispatcher
from bus.xccl.group import AddressTable
from services.balance.placement import owned_experts
from services.model.attention_model import AttentionModel
from services.model.config import ModelConfig, load_config
from services.model.expert_model import ExpertModel
from services.model.numerics import check_row_independence
from services.model.sampler import Sampler
from services.pod import create_segment, thread_failure
from services.prefill.exchange import SharedExperts, dispatch_shape
from services.prefill.experts import LocalExperts, load_experts
from services.steps.executor import StepExecutor
from services.steps.hot_loop import HotLoop
from services.steps.offers import Offers

STOP_TIMEOUT_S = 2.0
NICE = 10

log = structlog.get_logger(__name__)


async def prefill_main(config: PodConfig, index: int) -> None:
    """Serve as prefill worker `index` until cancelled."""
    num_workers = config.topology.prefill_workers
    if index >= num_workers:
        raise ConfigError(f"--index = {index}: must be below topology.prefill_workers = {num_workers}")
    yield_to_token_path(config.prefill.priority)
    member = Member(config, "prefill", index)
    member.segment = member.segment_name
    async with member:
        model_config = load_config(settings.model_path(config))
        model, experts = await asyncio.to_thread(load_models, config, model_config, member)
        layout = transfer_layout(config, model)
        rows = exchange_layout(config, model_config)
        segment = create_segment(
            config, member, SegmentLayout(rows.num_cells, rows.managed_bytes, layout.app_bytes)
        )
        try:
            await serve(config, member, segment, KvSource(segment, layout), model, experts)
        finally:
            segment.close()
            segment.unlink()


def yield_to_token_path(priority: str) -> None:
    """Have the scheduler of the machine prefer the processes that every token waits for.

    `idle` leaves a core the moment that anybody else wants it, and counts as idle when the kernel looks for a core for
    somebody who wakes up; `low` keeps a small share; `normal` is one among equals.

    These count within a session; where this process leads one (a container's), its autogroup's niceness is what counts.
    """
    if priority == "normal":
        return
    if priority == "idle":
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    else:
        os.nice(NICE)
    if os.getsid(0) == os.getpid():
        with contextlib.suppress(OSError):
            Path("/proc/self/autogroup").write_text(str(NICE))


def load_models(
    config: PodConfig, model_config: ModelConfig, member: Member
) -> tuple[AttentionModel, ExpertModel]:
    """Check the machine's arithmetic and map the whole model. Raises ConfigError."""
    check_row_independence()
    folder = settings.model_path(config)

    def progress(done: int, total: int) -> None:
        member.set_detail(f"loading weights {done}/{total}")

    model = AttentionModel.load(
        folder, model_config, progress=progress, kv_cache_dtype=config.attention.kv_cache_dtype
    )
    return model, load_experts(folder, model_config, owned(config, model_config, member.index), progress)


def shares_experts(config: PodConfig) -> bool:
    """Tell whether this worker has some of the experts only."""
    return config.prefill.expert_parallel and config.topology.prefill_workers > 1


def owned(config: PodConfig, model: ModelConfig, index: int) -> range:
    """Return the experts of one worker.

    Raises:
        ConfigError: there are more workers than experts to share.
    """
    num_workers = config.topology.prefill_workers
    if not shares_experts(config):
        return range(model.num_experts)
    if num_workers > model.num_experts:
        rule = f"{num_workers} prefill workers cannot share the model's {model.num_experts} experts"
        raise ConfigError(f"prefill.expert_parallel = True: {rule}")
    return owned_experts(model.num_experts, num_workers, index)


def exchange_layout(config: PodConfig, model: ModelConfig) -> SegmentLayout:
    """Return what the exchange of rows needs of a segment."""
    if not shares_experts(config):
        return SegmentLayout(0, 0, 0)
    return dispatch_shape(config, model, rows_max(config, window(config, model))).layout()


def window(config: PodConfig, model: ModelConfig) -> int:
    """Return the longest sequence in tokens."""
    return config.scheduler.max_model_len or model.max_position_embeddings


def transfer_layout(config: PodConfig, model: AttentionModel) -> TransferLayout:
    """Return what lies where in the segment: the KV blocks, and a row of answers for each attention worker."""
    num_blocks = config.prefill.cache_tokens // config.kv.block_tokens
    return TransferLayout(
        num_blocks=num_blocks,
        block_bytes=model.kv_bytes(1, config.kv.block_tokens),
        num_slots=num_blocks,  # every offer has a block that no other has
        num_sinks=config.topology.dp_groups,
    )


def rows_max(config: PodConfig, max_model_len: int) -> int:
    """Return the largest step in tokens: without chunks, that is the longest prompt."""
    step_tokens = config.prefill.max_num_batched_tokens
    return step_tokens if config.prefill.enable_chunked_prefill else max(step_tokens, max_model_len)


async def serve(
    config: PodConfig,
    member: Member,
    segment: Segment,
    source: KvSource,
    model: AttentionModel,
    expert_model: ExpertModel,
) -> None:
    """Run the hot loop until cancelled; raises what ended it."""
    ready = greeting(config, member, model.config)
    experts = experts_side(config, member, segment, expert_model)
    offers = Offers(source, member.incarnation)
    executor = StepExecutor(
        model,
        model.allocate_kv(segment.app, ready.num_blocks, ready.block_tokens),
        experts,
        Sampler(settings.model_path(config), model.config.vocab_size),
        rows_max=rows_max(config, ready.max_model_len),
        incarnation=member.incarnation,
        offers=offers,
        has_common_steps=isinstance(experts, SharedExperts),
        beat=segment.beat,
    )
    garbage = ManagedGc(config.runtime.gc)
    loop = HotLoop(
        executor,
        segment,
        ready,
        identity=member.identity,
        scheduler=lambda: member.lookup("shell", 0),
        transfers=offers,
        garbage=garbage,
    )
    failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    loop.on_failure = thread_failure(failed)
    hang_ns = config.heartbeat.hang_timeout_ms * NS_PER_MS // 2

    def vouch() -> bool:
        # A wait for other workers has a deadline of its own. At idle priority a step may wait long for a core.
        is_silent = now_ns() - segment.heartbeat_ns() >= hang_ns
        return not is_silent or experts.is_waiting or loop.waits_for_core()

    member.vouch = vouch
    member.counters = lambda: {**executor.counters_now(), **offers.counters()}
    garbage.take_over()
    loop.start()
    member.set_state("ready")
    try:
        await failed
    finally:
        loop.stop(STOP_TIMEOUT_S)
        experts.close()


def experts_side(
    config: PodConfig, member: Member, segment: Segment, model: ExpertModel
) -> LocalExperts | SharedExperts:
    """Return the way to the experts: they are here, or here and there."""
    local = LocalExperts(model, segment.beat, wire_int8=config.xccl.int8)
    if not shares_experts(config):
        return local
    table = AddressTable()
    shape = dispatch_shape(config, model.config, rows_max(config, window(config, model.config)))
    experts = SharedExperts(
        Dispatcher(segment, shape, member.index, table, config=config.xccl, service="prefill"),
        table,
        model,
        local,
        config.xccl,
        rank=member.index,
        num_ranks=shape.num_ranks,
        beat=segment.beat,
    )
    experts.pod_map = lambda: member.pod_map
    return experts


def greeting(config: PodConfig, member: Member, model: ModelConfig) -> ExecutorReady:
    """Return what the TE-shell needs to know of this worker."""
    return ExecutorReady(
        index=member.index,
        incarnation=member.incarnation,
        num_blocks=config.prefill.cache_tokens // config.kv.block_tokens,
        block_tokens=config.kv.block_tokens,
        max_model_len=window(config, model),
        vocab_size=model.vocab_size,
    )


def main() -> None:
    """Run this process until it is told to stop."""
    process.run(prefill_main, "prefill")


if __name__ == "__main__":
    main()
