"""The hot loop of an expert worker: a thread that never touches asyncio (the paper's persistent kernel, section 5).

Life of an exchange: the doorbell rings; `poll` finds the cells that changed; pairs are grouped by (layer, expert);
each group's rows are gathered straight from the senders' segments, multiplied, and written into this rank's own y
blocks; `commit` pushes the cell that tells the sender. The loop holds no state between exchanges, so nothing is lost
when it dies: the senders ask again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np
import structlog

from bus.control.messages import PodMap
from bus.errors import SegmentCorrupt
from bus.garbage import ManagedGc
from bus.memory.segment import Segment
from bus.xccl.group import AddressTable
from bus.xccl.relay import Arrival, RoutedExpert
from services.expert.core import PairGroup, group_pairs
from services.model.expert_model import ExpertModel
from services.pod import learn_addresses


class ExpertEngine:
    """Serves arrivals until stopped. Counters are written by the hot thread and read by anyone."""

    def __init__(
        self,
        segment: Segment,
        side: RoutedExpert,
        table: AddressTable,
        model: ExpertModel,
        *,
        owned: Sequence[int],
        num_experts: int,
        idle_beat_ns: int,
        garbage: ManagedGc,
    ):
        """`owned` are the expert ids held here; `num_experts` is the id of the shared expert, if there is one.

        `table`, which `side` looks addresses up in, is fed from `pod_map`.
        An idle loop wakes every `idle_beat_ns` to beat its heartbeat word, and otherwise sleeps until it is rung.
        """
        self._segment = segment
        self._side = side
        self._table = table
        self._model = model
        self._owned = np.asarray(owned, np.int32)
        self._is_owned = np.isin(np.arange(num_experts + 1), self._owned)
        self._num_experts = num_experts
        self._idle_beat_ns = idle_beat_ns
        self._garbage = garbage
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="expert-hot-loop", daemon=True)
        self._log = structlog.get_logger()
        self._known_map: PodMap | None = None
        self.pod_map: Callable[[], PodMap] = lambda: PodMap(pod="", epoch=0)
        self.on_failure: Callable[[BaseException], None] = lambda error: None
        self.expert_rows = 0
        self.shared_rows = 0
        self.exchanges = 0
        self.products = 0
        self.corrupt = 0

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """Ask the thread to end and wait for it."""
        self._stopping.set()
        self._segment.ring_doorbell()
        self._thread.join(timeout_s)

    def counters(self) -> dict[str, int]:
        """Work counted where it happened."""
        return {
            "expert_rows": self.expert_rows,
            "shared_rows": self.shared_rows,
            "exchanges": self.exchanges,
            "products": self.products,
            "corrupt_messages": self.corrupt,
            "dropped_messages": self._side.stats()["dropped"],
            "held_weight_bytes": self._model.weights.held_bytes,
            "held_expert_tensors": len(self._model.weights.tensor_names),
        }

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                self._segment.beat()
                self._learn()
                arrivals = self._poll()
                if arrivals:
                    self._serve(arrivals)
                    self._garbage.turn()
                elif not self._side.wait(timeout_ns=self._idle_beat_ns):
                    self._garbage.idle()
        except BaseException as error:
            self.on_failure(error)

    def _learn(self) -> None:
        pod_map = self.pod_map()
        if pod_map is not self._known_map:
            learn_addresses(self._table, pod_map)
            self._known_map = pod_map

    def _poll(self) -> list[Arrival]:
        arrivals = self._side.poll(self._reject)
        return [a for a in arrivals if self._owns_all(a)]

    def _owns_all(self, arrival: Arrival) -> bool:
        experts = arrival.pair_expert
        is_known = experts.min(initial=0) >= 0 and experts.max(initial=0) <= self._num_experts
        if is_known and self._is_owned[experts].all():
            return True
        foreign = ~np.isin(experts, self._owned)
        what = f"expert {arrival.pair_expert[foreign][0]} does not live here"
        self._reject(
            SegmentCorrupt(what, rank="expert", peer=f"attention-{arrival.peer}", event_id=arrival.event_id)
        )
        return False

    def _reject(self, error: SegmentCorrupt) -> None:
        self.corrupt += 1
        self._log.error("corrupt_message", error=str(error))

    def _serve(self, arrivals: list[Arrival]) -> None:
        groups = group_pairs([a.event.layer for a in arrivals], [a.pair_expert for a in arrivals])
        for group in groups:
            self._compute(arrivals, group)
        for arrival in arrivals:
            self._side.commit(arrival)
        self.exchanges += len(arrivals)

    def _compute(self, arrivals: list[Arrival], group: PairGroup) -> None:
        if len(arrivals) == 1:
            picks = [(arrivals[0], group.pair)]
        else:
            picks = [(arrivals[s], group.pair[group.source == s]) for s in np.unique(group.source)]
        rows = [a.x[a.pair_row[pairs]] for a, pairs in picks]
        y = self._model.forward(
            group.layer, group.expert, rows[0] if len(rows) == 1 else np.concatenate(rows)
        )
        begin = 0
        for arrival, pairs in picks:
            arrival.y[pairs] = y[begin : begin + len(pairs)]
            begin += len(pairs)
        self.products += 1
        if group.expert == self._num_experts:
            self.shared_rows += begin
        else:
            self.expert_rows += begin
