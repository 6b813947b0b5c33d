"""A2E / E2A between the library and a second implementation, written from bus/README.md: real processes.

Direct and through trampolines of either, float32 and INT8; attention ranks, owners and trampolines are mixed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from bus.clock import Deadline
from bus.config import XcclConfig
from bus.errors import PeerDied, SegmentCorrupt
from bus.memory.segment import Segment, segment_name
from bus.xccl.cost import Route
from bus.xccl.endpoint import Rank
from bus.xccl.event import Event
from bus.xccl.group import AddressTable
from bus.xccl.reference import exchange
from bus.xccl.relay import RoutedExpert
from bus.xccl.relay_layout import RelayShape
from bus.xccl.trampoline import RoutedAttention
from tests.interop.conftest import Peer

Float32Array = npt.NDArray[np.float32]
Int32Array = npt.NDArray[np.int32]
SIZES: dict[str, Any] = {"rows_max": 7, "num_slots": 3, "hidden": 20, "num_microbatches": 2}
EVENTS = [Event(step, 3, step % 2, 1) for step in range(12)]
CONFIG = XcclConfig(spin_us=0, poll_interval_ms=5)
WAIT_NS = 2_000_000


@dataclass
class Case:
    """One exchange of an attention rank."""

    event: Event
    x: Float32Array
    ranks: Int32Array
    experts: Int32Array
    through: bool

    def words(self) -> dict[str, Any]:
        """Return it for a process."""
        places = [at for at in np.ndindex(self.ranks.shape) if self.ranks[at] >= 0]
        pairs = [[*at, int(self.ranks[at]), int(self.experts[at])] for at in places]
        x = self.x.tolist()
        return {"event": self.event.pack(), "rows": x, "pairs": pairs, "through": self.through}

    def twin(self, *, int8: bool) -> Float32Array:
        """Return what must come back; slots without expert are zero."""
        return exchange(self.x, self.ranks, self.experts, product, int8=int8)


def product(expert: int, row: Float32Array) -> Float32Array:
    """What experts of both implementations do."""
    return (row * np.float32(expert + 1)).astype(np.float32)


def cases(attention: int, num_experts: int, *, has_trampolines: bool) -> list[Case]:
    """Rows that name step and row; the last row of some cases has no expert, and some cases have none at all."""
    made = []
    for event in EVENTS:
        rng = np.random.default_rng(100 * attention + event.step)
        num_rows = 1 + event.step % SIZES["rows_max"]
        x = (np.arange(num_rows)[:, None] * 100 + event.step + rng.random(SIZES["hidden"])).astype(np.float32)
        ranks = rng.integers(-1, num_experts, (num_rows, SIZES["num_slots"])).astype(np.int32)
        experts = rng.integers(0, 8, ranks.shape).astype(np.int32)
        made.append(Case(event, x, ranks, experts, has_trampolines and event.step % 3 > 0))
    return made


@dataclass
class Pod:
    """Attention and expert ranks of both kinds. Ours are 5th incarnations, theirs 9th."""

    name: str
    launch: Callable[..., Peer]
    shape: RelayShape
    ours: frozenset[str]
    peers: dict[str, Peer] = field(default_factory=dict)

    def members(self, service: str) -> list[str]:
        """Return the ranks of a service."""
        counts = {"attention": self.shape.num_attention_ranks, "expert": self.shape.num_expert_ranks}
        return [f"{service}-{i}" for i in range(counts[service])]

    def segment_of(self, member: str) -> str:
        """Return the name of a rank's segment."""
        service, index = member.split("-")
        return segment_name(self.name, service, int(index), 5 if member in self.ours else 9)

    def start_theirs(self, exchanges: dict[str, list[Case]]) -> None:
        """Launch their processes; they wait for the word to begin."""
        shape = self.shape
        theirs = {
            **SIZES,
            "num_attention": shape.num_attention_ranks,
            "num_experts": shape.num_expert_ranks,
            "num_domains": shape.num_domains,
            "has_trampolines": shape.has_trampolines,
            "int8": shape.int8,
        }
        names = {
            "attention": [self.segment_of(m) for m in self.members("attention")],
            "experts": [self.segment_of(m) for m in self.members("expert")],
        }
        for member in [*self.members("attention"), *self.members("expert")]:
            if member not in self.ours:
                service, index = member.split("-")
                own = {"name": self.segment_of(member), "index": int(index), "incarnation": 9}
                given = [case.words() for case in exchanges.get(member, [])]
                config = {"shape": theirs, "exchanges": given, **names, **own}
                self.peers[member] = self.launch("second_a2e_child", service, config)

    @contextmanager
    def end_of(self, member: str) -> Iterator[RoutedAttention | RoutedExpert]:
        """Open one of our ranks."""
        service, index = member.split("-")
        is_attention = service == "attention"
        layout = self.shape.attention_layout() if is_attention else self.shape.expert_layout()
        name, rank = self.segment_of(member), int(index)
        segment = Segment.create(name, layout, service=service, index=rank, incarnation=5)
        with closing(AddressTable()) as table:
            for other in [*self.members("attention"), *self.members("expert")]:
                kind, number = other.split("-")
                incarnation = 5 if other in self.ours else 9
                table.learn(Rank(kind, int(number)), incarnation, self.segment_of(other))
            make = RoutedAttention if is_attention else RoutedExpert
            with closing(make(segment, self.shape, rank, table, config=CONFIG)) as end:
                yield end
        segment.unlink()
        segment.close()

    def finish(self) -> None:
        """End their processes; each says that it did its part."""
        for member, peer in self.peers.items():
            peer.go_on()
            if member.startswith("expert"):
                assert peer.line()["answered"] > 0
                peer.go_on()
            peer.finish()


def raise_it(error: SegmentCorrupt) -> None:
    raise error


def serve(end: RoutedExpert, stop: threading.Event) -> None:
    """Be one of our expert ranks."""
    while not stop.is_set():
        for arrival in end.poll(raise_it):
            for place, (row, expert) in enumerate(zip(arrival.pair_row, arrival.pair_expert, strict=True)):
                arrival.y[place] = product(int(expert), arrival.x[row])
            end.commit(arrival)
        end.wait(timeout_ns=WAIT_NS)


def attend(end: RoutedAttention, case: Case) -> Float32Array:
    """Do one exchange of one of our attention ranks."""
    out = np.zeros((*case.ranks.shape, SIZES["hidden"]), np.float32)
    route = Route.TRAMPOLINE if case.through else Route.DIRECT
    handle = end.a2e_send(case.x, case.ranks, case.experts, case.event, route)
    end.e2a_recv(handle, out, Deadline.after_ms(20_000))
    return out


def check_line(found: list[list[Any]], case: Case, *, int8: bool) -> None:
    """What one of theirs said of an exchange is the twin's, and of nothing else."""
    places = [at for at in np.ndindex(case.ranks.shape) if case.ranks[at] >= 0]
    assert [(row, slot) for row, slot, _ in found] == places
    wanted = case.twin(int8=int8)
    for row, slot, values in found:
        assert (np.array(values, np.float32) == wanted[row, slot]).all()


DIRECT, FORWARDED = {"has_trampolines": False}, {"has_trampolines": True}


@pytest.mark.parametrize("int8", [False, True], ids=["float32", "int8"])
@pytest.mark.parametrize(
    "ours", ["attention-0 expert-1", "attention-1 attention-2 expert-0", "expert-0", "attention-2"]
)
@pytest.mark.parametrize(
    "how", [DIRECT, FORWARDED, {**FORWARDED, "num_domains": 2}], ids=["direct", "forwarded", "two-domains"]
)
def test_every_pair_comes_back(
    pod: str, launch: Callable[..., Peer], how: dict[str, Any], ours: str, int8: bool
) -> None:
    """Three attention ranks at once, each with its exchanges in order; two expert ranks."""
    shape = RelayShape(num_attention_ranks=3, num_expert_ranks=2, int8=int8, **how, **SIZES)
    group = Pod(pod, launch, shape, frozenset(ours.split()))
    given = {
        member: cases(i, 2, has_trampolines=shape.has_trampolines)
        for i, member in enumerate(group.members("attention"))
    }
    group.start_theirs(given)
    stop = threading.Event()
    with ExitStack() as stack:
        ends = {member: stack.enter_context(group.end_of(member)) for member in sorted(group.ours)}
        servers = [
            threading.Thread(target=serve, args=(end, stop))
            for end in ends.values()
            if isinstance(end, RoutedExpert)
        ]
        for started in (*group.peers.values(), *servers):
            (started.go_on if isinstance(started, Peer) else started.start)()
        try:
            for member, end in ends.items():
                if isinstance(end, RoutedAttention):
                    for case in given[member]:
                        assert attend(end, case).tobytes() == case.twin(int8=int8).tobytes()
            for member, peer in group.peers.items():
                if member.startswith("attention"):
                    for case in given[member]:
                        check_line(peer.line()["results"], case, int8=int8)
        finally:
            stop.set()
            for server in servers:
                server.join(20)
        group.finish()


@pytest.mark.parametrize("ours", ["attention-0", "expert-0"], ids=["their-trampoline", "our-trampoline"])
def test_a_trampoline_reports_an_owner_that_has_ended(
    pod: str, launch: Callable[..., Peer], ours: str
) -> None:
    """Attention rank 0 goes through expert rank 0 to rank 1, which is not there any more."""
    shape = RelayShape(num_attention_ranks=1, num_expert_ranks=2, has_trampolines=True, **SIZES)
    group = Pod(pod, launch, shape, frozenset([ours]))
    x, there = np.ones((1, SIZES["hidden"]), np.float32), np.array([[1, -1, 0]], np.int32)
    case = Case(EVENTS[0], x, there, np.zeros_like(there), through=True)
    group.start_theirs({"attention-0": [case]})
    stop = threading.Event()
    with group.end_of(ours) as end:
        for member, peer in group.peers.items():
            if member != "expert-1":
                peer.go_on()
        group.peers["expert-1"].end()
        if isinstance(end, RoutedAttention):
            with pytest.raises(PeerDied, match="expert-1"):
                attend(end, case)
        else:
            server = threading.Thread(target=serve, args=(end, stop))
            server.start()
            answer = group.peers["attention-0"].line()
            assert (answer["error"], answer["text"]) == ("PeerDied", "expert rank 1 has ended")
            stop.set()
            server.join(20)
