"""The experts of prefill, shared by all prefill workers: each holds some, and rows travel (paper section 3.2, 6).

All workers run the same steps: as many exchanges in the same order, with no rows where there is nothing to compute.
Steps are named by their plans, which the TE-shell numbers alike for all. Each pair (row, slot) travels as a row with
one expert of weight 1, so that what comes back is the expert's output, and the sum over slots is the one that every
other worker of the pod makes. The shared expert is everywhere.

When a worker dies, or is silent for `xccl.stall_timeout_ms`, the others give the step up (`ExpertsAway`); before the
next one they wait for its next incarnation, `xccl.peer_wait_timeout_ms` at most.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from bus.clock import Deadline
from bus.config import PodConfig, XcclConfig
from bus.control.messages import PodMap
from bus.errors import EventMismatch, PeerDied, PeerStalled, SegmentCorrupt
from bus.xccl.dispatch import Dispatcher
from bus.xccl.dispatch_layout import DispatchResult, DispatchShape
from bus.xccl.endpoint import Rank
from bus.xccl.event import Event
from bus.xccl.group import AddressTable
from services.balance.placement import ExpertMap, owned_experts
from services.model.attention_model import MoeInput
from services.model.expert_model import ExpertModel
from services.model.model_config import ModelConfig
from services.prefill.experts import LocalExperts
from services.steps.executor import ExpertsAway, StepAbandoned

Float32Array = npt.NDArray[np.float32]
Int32Array = npt.NDArray[np.int32]

_LOOK_S = 0.02


def dispatch_shape(config: PodConfig, model: ModelConfig, rows_max: int) -> DispatchShape:
    """Return the shape that all prefill workers derive from the same settings."""
    num_ranks = config.topology.prefill_workers
    return DispatchShape(
        num_ranks=num_ranks,
        max_tokens=rows_max * model.top_k,
        top_k=1,
        hidden=model.hidden_size,
        num_local_experts=-(-model.num_experts // num_ranks),
        int8=config.xccl.int8,
        in_place=True,  # `_compute` has read an expert's rows when it writes its results
    )


def physical_ids(model: ModelConfig, num_ranks: int) -> Int32Array:
    """Return [num_experts] int32: where each expert is, as `DispatchShape` numbers places."""
    owner = ExpertMap.contiguous(model.num_experts, num_ranks, has_shared_expert=False).owner
    num_local = -(-model.num_experts // num_ranks)
    first = np.asarray([owned_experts(model.num_experts, num_ranks, rank).start for rank in range(num_ranks)])
    ids: Int32Array = (owner * num_local + np.arange(model.num_experts) - first[owner]).astype(np.int32)
    return ids


class SharedExperts:
    """`services.steps.executor.ExpertsSide` of one prefill worker among several. One thread.

    Args:
        side: of this worker.
        table: that `side` looks addresses up in; fed here from `pod_map`.
        model: this worker's experts, and the shared one.
        local: does the shared expert.
    """

    def __init__(
        self,
        side: Dispatcher,
        table: AddressTable,
        model: ExpertModel,
        local: LocalExperts,
        settings: XcclConfig,
        *,
        rank: int,
        num_ranks: int,
        beat: Callable[[], None],
    ) -> None:
        self._side, self._table, self._model, self._local = side, table, model, local
        self._settings, self._rank, self._num_ranks, self._beat = settings, rank, num_ranks, beat
        self._physical_ids = physical_ids(model.config, num_ranks)
        self._first_expert = owned_experts(model.config.num_experts, num_ranks, rank).start
        self._known_map: PodMap | None = None
        self._step = -1
        self.is_waiting = False  # for the others, up to a deadline
        self.num_retries = 0
        self.num_exchanges = 0
        self.expert_rows = 0
        self.pod_map: Callable[[], PodMap] = lambda: PodMap(pod="", epoch=0)
        self.wanted: Callable[[], bool] = lambda: True

    def counters(self) -> dict[str, int]:
        """Return what was counted here, by name."""
        shared_rows = self._local.counters()["shared_rows"]
        return {
            "expert_rows": self.expert_rows,
            "shared_rows": shared_rows,
            "exchanges": self.num_exchanges,
        }

    def exchange(self, layer: int, moe: MoeInput, step_seq: int) -> Float32Array:
        """See `ExpertsSide`; every worker must call it for the same layers of the same step."""
        # Whether the step is wanted is only asked before it: whoever left in its middle would leave the others waiting.
        if step_seq != self._step:
            self._meet()
            self._step = step_seq
        config, num_rows = self._model.config, moe.x.shape[0]
        rows = np.repeat(moe.x, config.top_k, axis=0)
        places = self._physical_ids[moe.topk_idx].reshape(-1, 1)
        y = self._travel(rows, places, Event(step=step_seq, layer=layer))
        out = np.empty((num_rows, config.num_slots, config.hidden_size), np.float32)
        out[:, : config.top_k] = y.reshape(num_rows, config.top_k, config.hidden_size)
        if config.has_shared_expert:
            out[:, config.top_k] = self._local.shared(layer, moe.x)
        self.num_exchanges += 1
        return out

    def _travel(self, rows: Float32Array, places: Int32Array, event: Event) -> Float32Array:
        """Return what the expert at `places[i]` makes of `rows[i]`, for all i, and do the same for the others."""
        deadline = Deadline.after_ms(self._settings.stall_timeout_ms)
        self.is_waiting = True
        try:
            result, handle = self._side.dispatch(rows, places, event=event, deadline=deadline)
            self._compute(event.layer, result)
            ones = np.ones((len(rows), 1), np.float32)
            return self._side.combine(result.y, ones, handle, deadline=deadline)
        except (PeerDied, PeerStalled, EventMismatch, SegmentCorrupt) as error:
            self._step = -1  # look for everybody before the next step
            raise ExpertsAway(str(error)) from error
        finally:
            self.is_waiting = False

    def _compute(self, layer: int, result: DispatchResult) -> None:
        begin = 0
        for local, count in enumerate(result.expert_counts):
            if count:
                self._beat()
                part = slice(begin, begin + int(count))
                result.y[part] = self._model.forward(layer, self._first_expert + local, result.x[part])
                begin = part.stop
        self.expert_rows += begin

    def _meet(self) -> None:
        """Wait until all workers live and their addresses are known."""
        give_up = Deadline.after_ms(self._settings.peer_wait_timeout_ms)
        ranks = [Rank("prefill", index) for index in range(self._num_ranks) if index != self._rank]
        while True:
            if not self.wanted():
                raise StepAbandoned
            self._learn()
            missing = [str(rank) for rank in ranks if not self._table.alive(rank)]
            if not missing:
                return
            if give_up.expired():
                waited_ms = self._settings.peer_wait_timeout_ms
                raise ExpertsAway(f"{', '.join(missing)} away for {waited_ms} ms")
            self._beat()
            time.sleep(_LOOK_S)

    def _learn(self) -> None:
        pod_map = self.pod_map()
        if pod_map is not self._known_map:
            for member in pod_map.members:
                if member.service == "prefill" and member.segment and member.index != self._rank:
                    self._table.learn(Rank("prefill", member.index), member.incarnation, member.segment)
            self._known_map = pod_map

    def close(self) -> None:
        """Let go of all mappings."""
        self._side.close()
        self._table.close()
