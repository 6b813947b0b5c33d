"""The ends of A2E / E2A of the library and of a second implementation, written from bus/README.md: real processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from bus.clock import Deadline
from bus.errors import SegmentCorrupt
from bus.memory.segment import Segment, segment_name
from bus.xccl.cost import Route
from bus.xccl.endpoint import Rank
from bus.xccl.event import Event
from bus.xccl.group import AddressTable
from bus.xccl.relay import RoutedExpert
from bus.xccl.relay_layout import RelayShape
from bus.xccl.trampoline import RoutedAttention
from tests.interop.conftest import Peer

SIZES: dict[str, Any] = {"rows_max": 7, "num_slots": 3, "hidden": 20, "num_microbatches": 2}
SHAPE = RelayShape(num_attention_ranks=1, num_expert_ranks=2, has_trampolines=False, **SIZES)
THEIR_SHAPE = {"num_attention": 1, "num_experts": 2, **SIZES}
EVENTS = [Event(step, 3, step % 2, 1) for step in range(12)]
WAIT_NS = 5_000_000


@pytest.fixture
def start(launch: Callable[..., Peer]) -> Callable[..., Peer]:
    def run(role: str, **config: object) -> Peer:
        return launch("second_a2e_child", role, {"shape": THEIR_SHAPE, "incarnation": 9, **config})

    return run


def own_segment(pod: str, service: str, index: int) -> Segment:
    layout = SHAPE.attention_layout() if service == "attention" else SHAPE.expert_layout()
    name = segment_name(pod, service, index, 5)
    return Segment.create(name, layout, service=service, index=index, incarnation=5)


def case(event: Event) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
    """Rows that name step and row, and (rank, expert) per slot; the last row of some cases has no expert at all."""
    rng = np.random.default_rng(event.step)
    num_rows = 1 + event.step % SIZES["rows_max"]
    x = (np.arange(num_rows)[:, None] * 100 + event.step + np.arange(SIZES["hidden"]) / 4).astype(np.float32)
    ranks = rng.integers(-1, 2, (num_rows, SIZES["num_slots"])).astype(np.int32)
    return x, ranks, rng.integers(0, 8, ranks.shape).astype(np.int32)


def test_their_experts_serve_our_attention(pod: str, start: Callable[..., Peer]) -> None:
    segment, table = own_segment(pod, "attention", 0), AddressTable()
    cases = [case(event) for event in EVENTS]
    peers = []
    for r in range(2):
        count = sum(int((ranks == r).any()) for _, ranks, _ in cases)
        name = segment_name(pod, "expert", r, 9)
        peers.append(start("expert", name=name, index=r, peers=[segment.name], count=count))
        peers[r].go_on()
        table.learn(Rank("expert", r), 9, name)
    end = RoutedAttention(segment, SHAPE, 0, table)
    for event, (x, ranks, experts) in zip(EVENTS, cases, strict=True):
        out = np.full((*ranks.shape, SIZES["hidden"]), -1, np.float32)
        end.e2a_recv(end.a2e_send(x, ranks, experts, event, Route.DIRECT), out, Deadline.after_ms(20_000))
        wanted = np.where((ranks < 0)[..., None], -1, x[:, None] * (experts + 1)[..., None])
        assert (out == wanted).all()
    for peer in peers:
        peer.go_on()
        peer.finish()
    end.close()
    table.close()
    segment.unlink()
    segment.close()


def test_our_experts_serve_their_attention(pod: str, start: Callable[..., Peer]) -> None:
    segments = [own_segment(pod, "expert", r) for r in range(2)]
    name, cases = segment_name(pod, "attention", 0, 9), [case(event) for event in EVENTS]
    exchanges = [
        {
            "event": event.pack(),
            "rows": x.tolist(),
            "pairs": [
                [*at, int(ranks[at]), int(experts[at])] for at in np.ndindex(ranks.shape) if ranks[at] >= 0
            ],
        }
        for event, (x, ranks, experts) in zip(EVENTS, cases, strict=True)
    ]
    peer = start("attention", name=name, index=0, peers=[s.name for s in segments], exchanges=exchanges)
    tables = [AddressTable(), AddressTable()]
    ends = [RoutedExpert(segments[r], SHAPE, r, tables[r]) for r in range(2)]
    for table in tables:
        table.learn(Rank("attention", 0), 9, name)
    peer.go_on()
    left, deadline = (
        sum(int((ranks == r).any()) for _, ranks, _ in cases for r in range(2)),
        Deadline.after_ms(20_000),
    )
    while left and not deadline.expired():
        for end in ends:
            for arrival in end.poll(raise_it):
                arrival.y[:] = arrival.x[arrival.pair_row] * (arrival.pair_expert + 1)[:, None]
                end.commit(arrival)
                left -= 1
            end.wait(timeout_ns=WAIT_NS)
    assert left == 0
    for x, ranks, experts in cases:
        results = peer.line()["results"]
        assert [(row, slot) for row, slot, _ in results] == [
            at for at in np.ndindex(ranks.shape) if ranks[at] >= 0
        ]
        for row, slot, values in results:
            assert (np.array(values, np.float32) == x[row] * (experts[row, slot] + 1)).all()
    peer.go_on()
    peer.finish()
    for end, table, segment in zip(ends, tables, segments, strict=True):
        end.close()
        table.close()
        segment.unlink()
        segment.close()


def raise_it(error: SegmentCorrupt) -> None:
    raise error
