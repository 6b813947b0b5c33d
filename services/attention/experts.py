"""The expert workers as an attention worker uses them: A2E, E2A, and what to do when one of them dies.

An exchange is repeated, under a higher attempt, until every expert rank has answered; everything before it still
stands. Nobody waits for ever: after `xccl.peer_wait_timeout_ms` without an expert worker the step fails.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import structlog

from bus.clock import Deadline
from bus.config import XcclConfig
from bus.control.messages import PodMap
from bus.errors import PeerDied, PeerStalled, SegmentCorrupt
from bus.memory.segment import Segment
from bus.xccl.endpoint import Rank
from bus.xccl.event import Event
from bus.xccl.group import AddressTable
from bus.xccl.trampoline import RoutedAttention
from services.attention.core import ExpertDirectory
from services.balance.placement import ExpertMap
from services.model.attention_model import MoeInput
from services.steps.executor import ExpertsAway, StepAbandoned

Float32Array = npt.NDArray[np.float32]

_MAP_POLL_S = 0.02


class RemoteExperts:
    """The attention side of the exchange, and the addresses that it looks up. One thread.

    `rows_max` is the largest step in tokens, `hidden` the width of a row.
    """

    def __init__(
        self,
        side: RoutedAttention,
        table: AddressTable,
        segment: Segment,
        expert_map: ExpertMap,
        settings: XcclConfig,
        *,
        dp_rank: int,
        rows_max: int,
        num_slots: int,
        hidden: int,
    ):
        self._side, self._table, self._segment = side, table, segment
        self._expert_map, self._settings, self._dp_rank = expert_map, settings, dp_rank
        self._directory = ExpertDirectory(expert_map.num_expert_ranks)
        self._expert_out = np.zeros((rows_max, num_slots, hidden), np.float32)
        self._log = structlog.get_logger()
        self.num_exchanges = 0
        self.num_retries = 0
        self.pod_map: Callable[[], PodMap] = lambda: PodMap(pod="", epoch=0)
        self.wanted: Callable[[], bool] = lambda: True

    def counters(self) -> dict[str, int]:
        """Return what was counted here, by name."""
        return {
            "exchanges": self.num_exchanges,
            "exchange_retries": self.num_retries,
            "trampoline_exchanges": self._side.stats()["trampoline_exchanges"],
        }

    def exchange(self, layer: int, moe: MoeInput, step_seq: int) -> Float32Array:
        """See `services.steps.executor.ExpertsSide`."""
        slots = self._expert_map.slots(moe.topk_idx, self._dp_rank + step_seq)
        slot_expert, slot_rank = map(np.ascontiguousarray, slots)
        out = self._expert_out[: moe.x.shape[0]]
        give_up = Deadline.after_ms(self._settings.peer_wait_timeout_ms)
        attempt = 0
        while True:
            attempt += 1
            self._connect_experts(give_up)
            event = Event(step=step_seq, layer=layer, attempt=attempt)
            try:
                handle = self._side.a2e_send(moe.x, slot_rank, slot_expert, event)
                self._side.e2a_recv(handle, out, Deadline.after_ms(self._settings.stall_timeout_ms))
                self._segment.beat()
            except (PeerDied, PeerStalled, SegmentCorrupt) as error:
                self._note_loss(error, give_up)
                continue
            self.num_exchanges += 1
            return out

    def _note_loss(self, error: PeerDied | PeerStalled | SegmentCorrupt, give_up: Deadline) -> None:
        self.num_retries += 1
        self._log.warning("exchange_retry", error=str(error))
        self._note_dead()
        if give_up.expired():
            raise ExpertsAway(str(error)) from error

    def _note_dead(self) -> None:
        for index in range(self._expert_map.num_expert_ranks):
            rank = Rank("expert", index)
            incarnation = self._table.incarnation(rank)
            if incarnation and not self._table.alive(rank):
                self._directory.lost(index, incarnation)

    def _connect_experts(self, give_up: Deadline) -> None:
        while True:
            self._attach_new()
            missing = self._directory.missing()
            if not missing:
                return
            if not self.wanted():
                raise StepAbandoned
            if give_up.expired():
                away = ", ".join(f"expert-{r}" for r in missing)
                raise ExpertsAway(f"{away} away for {self._settings.peer_wait_timeout_ms} ms")
            self._segment.beat()
            time.sleep(_MAP_POLL_S)

    def _attach_new(self) -> None:
        for member in self._directory.to_connect(self.pod_map()):
            rank = Rank("expert", member.index)
            self._table.learn(rank, member.incarnation, member.segment)
            try:
                self._table.segment(rank, asker=f"attention-{self._dp_rank}")
            except PeerDied:
                continue  # died in between; the next map names its successor
            self._directory.connected(member.index, member.incarnation)
            self._log.info("expert_connected", rank=member.index, incarnation=member.incarnation)
