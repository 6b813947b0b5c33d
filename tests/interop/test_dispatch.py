"""Dispatch/combine between the library and a second implementation, written from bus/README.md: real processes."""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from bus.clock import Deadline
from bus.config import XcclConfig
from bus.errors import BusError, EventMismatch, PeerDied, PeerStalled, SegmentCorrupt
from bus.memory.segment import Segment
from bus.xccl.dispatch import Dispatcher
from bus.xccl.dispatch_layout import DispatchHandle, DispatchResult, DispatchShape, Int8DispatchResult
from bus.xccl.event import Event
from bus.xccl.group import AddressTable
from bus.xccl.reference import quantise_rows, transport
from tests.harness.dispatch_world import Routed, expert_product, fill, fill_int8, int8_product
from tests.interop import second, second_dispatch
from tests.interop.conftest import Peer
from tests.interop.groups import SECONDS, FacingEnds, MixedGroup, closing

Float32Array = npt.NDArray[np.float32]
Group = MixedGroup[Dispatcher]
CONFIG = XcclConfig(spin_us=0, poll_interval_ms=5)
SIZES = {"max_tokens": 5, "top_k": 3, "hidden": 20, "num_local_experts": 2, "num_microbatches": 2}
FLOAT, WIDENED, INT8 = "float32", "int8, widened", "int8"  # how a rank's experts take rows


@pytest.fixture
def mixed(pod: str, launch: Callable[..., Peer]) -> Callable[..., Any]:
    """Open a group; `forms[rank]` says how its experts take rows."""

    @contextmanager
    def run(their_ranks: Sequence[int], forms: Sequence[str]) -> Iterator[Group]:
        is_int8 = forms[0] != FLOAT
        shapes = [
            DispatchShape(num_ranks=len(forms), int8=is_int8, deliver_int8=form == INT8, **SIZES)
            for form in forms
        ]
        group = Group(pod, shapes[0], their_ranks)

        def their_config(rank: int) -> dict[str, Any]:
            shape = {"num_ranks": len(forms), "int8": is_int8, **SIZES}
            return {"shape": shape, "takes_int8": forms[rank] == INT8}

        def make(segment: Segment, rank: int, table: AddressTable) -> Dispatcher:
            return Dispatcher(segment, shapes[rank], rank, table, config=CONFIG)

        with closing(group):
            group.launch(launch, "dispatch", their_config)
            group.open(make)
            yield group

    return run


def routed(rng: np.random.Generator, num_ranks: int) -> list[Routed]:
    """Batches from none to full, with slots without expert, and ranks that get nothing."""
    inputs = []
    for _ in range(num_ranks):
        num = int(rng.integers(0, SIZES["max_tokens"] + 1))
        x = rng.standard_normal((num, SIZES["hidden"])).astype(np.float32)
        experts = rng.integers(0, 2 * num_ranks, (num, SIZES["top_k"])).astype(np.int32)
        experts[rng.random(experts.shape) < 0.3] = -1
        inputs.append(Routed(x, experts, rng.random(experts.shape, np.float32)))
    return inputs


def value(form: str, expert: int, row: Float32Array) -> Float32Array:
    """What comes back for a row from an expert of a rank of that form."""
    if form == INT8:
        y, scale = int8_product(expert, *quantise_rows(row))
        return y.astype(np.float32) * scale[:, None]
    is_int8 = form != FLOAT
    return transport(expert_product(expert, transport(row, int8=is_int8)), int8=is_int8)


def twin(given: Routed, forms: Sequence[str]) -> Float32Array:
    """What a rank's combine must yield, whoever holds the experts."""
    out = np.zeros_like(given.x)
    for token, slot in np.argwhere(given.topk_idx >= 0):
        expert = int(given.topk_idx[token, slot])
        form = forms[expert // SIZES["num_local_experts"]]
        out[token] += given.weights[token, slot] * value(form, expert, given.x[token : token + 1])[0]
    return out


class Ours:
    """The library's ranks, step by step."""

    def __init__(self, group: Group, forms: Sequence[str]) -> None:
        self._group, self._forms = group, forms
        self._open: dict[tuple[int, Event], tuple[Any, DispatchHandle]] = {}

    def dispatch(self, rank: int, given: Routed, event: Event, seconds: float = SECONDS) -> None:
        """Dispatch, and let the experts work."""
        side, deadline = self._group.ours[rank], Deadline.after_ms(int(seconds * 1000))
        args = given.x, given.topk_idx
        result: DispatchResult | Int8DispatchResult
        if self._forms[rank] == INT8:
            result, handle = side.dispatch_int8(*args, event=event, deadline=deadline)
            fill_int8(result, rank, SIZES["num_local_experts"])
        else:
            result, handle = side.dispatch(*args, event=event, deadline=deadline)
            fill(result, rank, SIZES["num_local_experts"])
        self._open[rank, event] = result, handle

    def combine(self, rank: int, given: Routed, event: Event, seconds: float = SECONDS) -> Float32Array:
        """Return the sums."""
        result, handle = self._open.pop((rank, event))
        deadline = Deadline.after_ms(int(seconds * 1000))
        return self._group.ours[rank].combine(result.y, given.weights, handle, deadline=deadline)

    def exchange(self, rank: int, given: Routed, event: Event, seconds: float = SECONDS) -> Float32Array:
        """Do both."""
        self.dispatch(rank, given, event, seconds)
        return self.combine(rank, given, event, seconds)


def words(given: Routed, event: Event) -> dict[str, Any]:
    """A rank's input, for a process."""
    return {
        "event": event.pack(),
        "rows": [row.tobytes().hex() for row in given.x],
        "experts": given.topk_idx.tolist(),
        "weights": given.weights.tolist(),
    }


def check_all(group: Group, ours: dict[int, Any], inputs: Sequence[Routed], forms: Sequence[str]) -> None:
    """Every rank's sums are the twin's, bit for bit."""
    for rank, future in ours.items():
        assert future.result(SECONDS + 10).tobytes() == twin(inputs[rank], forms).tobytes()
    for rank, peer in group.theirs.items():
        assert peer.line() == {"sums": [row.tobytes().hex() for row in twin(inputs[rank], forms)]}


def exchange_all(
    group: Group, ours: Ours, inputs: Sequence[Routed], event: Event, forms: Sequence[str]
) -> None:
    group.order("exchange", lambda rank: words(inputs[rank], event))
    check_all(group, group.begin(lambda rank: ours.exchange(rank, inputs[rank], event)), inputs, forms)


@pytest.mark.parametrize(
    ("their_ranks", "forms"),
    [
        ([1], [FLOAT] * 2),
        ([0, 2], [FLOAT] * 4),
        ([1], [WIDENED] * 2),
        ([0, 2], [INT8] * 3),
        ([1, 2], [INT8, WIDENED, INT8, WIDENED]),
    ],
    ids=str,
)
def test_every_rank_has_the_twin_s_sums(
    mixed: Callable[..., Any], their_ranks: Sequence[int], forms: Sequence[str]
) -> None:
    rng = np.random.default_rng(len(forms))
    with mixed(their_ranks, forms) as group:
        ours = Ours(group, forms)
        for step in range(12):
            exchange_all(group, ours, routed(rng, len(forms)), Event(step, 3, step % 2), forms)
        group.finish()


@pytest.mark.parametrize("form", [WIDENED, INT8])
@pytest.mark.parametrize("number", [0.0, np.nan, np.inf, 3e38, 1e-39, 3e-45, 127.0])
def test_rows_that_are_hard_to_quantise(mixed: Callable[..., Any], form: str, number: float) -> None:
    """Not finite, so small that the scale is subnormal or 0, ties, and zeros; each beside rows that are not."""
    forms, event = [form] * 2, Event(1, 0)
    inputs = busy(np.random.default_rng(1), 2)
    for given in inputs:
        given.x[::2] = np.arange(SIZES["hidden"]) / 2 * (1 if number == 127 else min(number, 1e-3))
        given.x[::2, -1] = number
    with mixed([1], forms) as group, np.errstate(all="ignore"):
        ours = Ours(group, forms)
        group.order("exchange", lambda rank: words(inputs[rank], event))
        came = ours.exchange(0, inputs[0], event)
        assert np.array_equal(came, twin(inputs[0], forms), equal_nan=True)
        theirs = bytes.fromhex("".join(group.theirs[1].line()["sums"]))
        assert np.array_equal(
            np.frombuffer(theirs, np.float32), twin(inputs[1], forms).reshape(-1), equal_nan=True
        )
        group.finish()


def test_two_microbatches_are_in_flight(mixed: Callable[..., Any]) -> None:
    forms, rng = [FLOAT] * 3, np.random.default_rng(3)
    with mixed([0, 2], forms) as group:
        ours = Ours(group, forms)
        for step in range(6):
            events = [Event(step, 0, microbatch) for microbatch in (0, 1)]
            batches = [routed(rng, 3) for _ in events]
            for event, inputs in zip(events, batches, strict=True):
                group.order("dispatch", lambda rank, i=inputs, e=event: words(i[rank], e))
                ours.dispatch(1, inputs[1], event)
                assert [peer.line() for peer in group.theirs.values()] == [{}, {}]
            for event, inputs in zip(events, batches, strict=True):
                group.order("combine", lambda rank, i=inputs, e=event: words(i[rank], e))
                check_all(
                    group, group.begin(lambda r, i=inputs, e=event: ours.combine(r, i[r], e)), inputs, forms
                )
        group.finish()


def busy(rng: np.random.Generator, num_ranks: int) -> list[Routed]:
    """Full batches in which every rank has a row for every other."""
    inputs = []
    for _ in range(num_ranks):
        x = rng.standard_normal((SIZES["max_tokens"], SIZES["hidden"])).astype(np.float32)
        experts = rng.integers(0, 2 * num_ranks, (len(x), SIZES["top_k"])).astype(np.int32)
        experts[:, 0] = np.resize(np.arange(0, 2 * num_ranks, 2), len(x))
        inputs.append(Routed(x, experts, rng.random(experts.shape, np.float32)))
    return inputs


def failure(work: Callable[[], object]) -> type[BusError]:
    with pytest.raises(BusError) as caught:
        work()
    return caught.type


FIRST, AGAIN = Event(1, 0), Event(1, 0, attempt=2)


def test_our_rank_that_gives_up_is_not_waited_for(mixed: Callable[..., Any]) -> None:
    """Theirs come late: what we had staged for them is withdrawn, and we are at the next attempt."""
    forms, inputs = [FLOAT] * 3, busy(np.random.default_rng(7), 3)
    with mixed([0, 2], forms) as group:
        ours = Ours(group, forms)
        assert failure(lambda: ours.dispatch(1, inputs[1], FIRST, 0.03)) is PeerStalled
        again = group.begin(lambda rank: ours.exchange(rank, inputs[rank], AGAIN))
        group.order("exchange", lambda rank: words(inputs[rank], FIRST))
        assert [peer.line()["error"] for peer in group.theirs.values()] == ["EventMismatch"] * 2
        group.order("exchange", lambda rank: words(inputs[rank], AGAIN))
        check_all(group, again, inputs, forms)
        group.finish()


def test_their_rank_that_gives_up_is_not_waited_for(mixed: Callable[..., Any]) -> None:
    forms, inputs = [FLOAT] * 3, busy(np.random.default_rng(8), 3)
    with mixed([1], forms) as group:
        ours = Ours(group, forms)
        group.order("dispatch", lambda rank: {**words(inputs[rank], FIRST), "seconds": 0.03})
        assert group.theirs[1].line()["error"] == "PeerStalled"
        group.order("exchange", lambda rank: words(inputs[rank], AGAIN))
        late = group.begin(lambda rank: failure(lambda: ours.exchange(rank, inputs[rank], FIRST)))
        assert [late[rank].result(SECONDS + 10) for rank in (0, 2)] == [EventMismatch] * 2
        again = group.begin(lambda rank: ours.exchange(rank, inputs[rank], AGAIN))
        check_all(group, again, inputs, forms)
        group.finish()


def test_an_answer_that_will_not_come_is_not_waited_for(mixed: Callable[..., Any]) -> None:
    """First theirs and then ours goes on with another event between dispatch and combine."""
    forms, inputs = [INT8] * 2, busy(np.random.default_rng(9), 2)
    with mixed([1], forms) as group:
        ours = Ours(group, forms)
        group.order("dispatch", lambda rank: words(inputs[rank], FIRST))
        waiting = group.begin(lambda rank: failure(lambda: ours.exchange(rank, inputs[rank], FIRST)))
        assert group.theirs[1].line() == {}
        group.order("exchange", lambda rank: words(inputs[rank], AGAIN))
        assert waiting[0].result(SECONDS + 10) is EventMismatch
        check_all(group, group.begin(lambda r: ours.exchange(r, inputs[r], AGAIN)), inputs, forms)

        group.order("exchange", lambda rank: words(inputs[rank], Event(2, 0)))
        ours.dispatch(0, inputs[0], Event(2, 0))
        again = group.begin(lambda rank: ours.exchange(rank, inputs[rank], Event(3, 0)))
        assert group.theirs[1].line()["error"] == "EventMismatch"
        group.order("exchange", lambda rank: words(inputs[rank], Event(3, 0)))
        check_all(group, again, inputs, forms)
        group.finish()


def test_either_notices_that_the_other_has_ended(mixed: Callable[..., Any]) -> None:
    forms, inputs = [FLOAT] * 3, busy(np.random.default_rng(10), 3)
    with mixed([1, 2], forms) as group:
        ours = Ours(group, forms)
        group.theirs[1].end()
        group.order("exchange", lambda rank: words(inputs[rank], FIRST), [2])
        assert failure(lambda: ours.exchange(0, inputs[0], FIRST)) is PeerDied
        answer = group.theirs[2].line()
        assert (answer["error"], answer["text"]) == ("PeerDied", "ranks [1] have ended")


# ---------------------------------------------------------------- words that cannot be

SHAPE = DispatchShape(num_ranks=2, max_tokens=3, top_k=2, hidden=4, num_local_experts=2)
THEIR_SHAPE = second_dispatch.Shape(2, 3, 2, 4, 2)
BLOCK = second_dispatch.Block.of(THEIR_SHAPE)
EXPERTS = [[0, 2], [1, 3], [2, 3]]  # two pairs for rank 0, four for rank 1


class Pair(FacingEnds[Dispatcher]):
    """Both ends of a group of two, and what ours sends."""

    def __init__(self, pod: str) -> None:
        super().__init__(pod, SHAPE, THEIR_SHAPE.areas())
        self.ours = Dispatcher(self.segment, SHAPE, 0, self.table, config=CONFIG)
        self.theirs = second_dispatch.Exchange([self.our_segment, self.their_segment], THEIR_SHAPE, 1)
        self.x, self.experts = np.ones((3, 4), np.float32), np.array(EXPERTS, np.int32)
        self.rows = [array("f", row) for row in self.x]

    def spoil(self, segment: second.Segment, part: str, index: int, value: int) -> None:
        """Change a word of a block, or of the other's cell in `segment`: the first of an event is on lane 0."""
        words: Any
        if part == "cell":
            writer = 1 if segment is self.our_segment else 0
            words, at = segment.u64, segment.areas.cells_offset // 8 + writer * 24 + index
        else:
            words, at = segment.u32, (segment.areas.managed_offset + getattr(BLOCK, part)) // 4 + index
        words[at] = value


@pytest.fixture
def both(pod: str) -> Iterator[Pair]:
    pair = Pair(pod)
    yield pair
    pair.close()


TORN = [
    ("cell", 2, 0 << 32 | 3),  # another number of pairs than `starts` says
    ("cell", 2, 1 << 32 | 2),
    ("cell", 2, 5 << 32 | 2),  # more pairs than tokens have
    ("cell", 3, 4),  # more tokens than a batch has
    ("cell", 3, 0),
    ("starts", 1, 7),
    ("starts", 0, 2**32 - 1),
    ("pair_row", 0, 3),
    ("pair_row", 1, 2**32 - 1),
]


@pytest.mark.parametrize(("part", "index", "value"), TORN)
def test_we_refuse_what_they_cannot_have_announced(both: Pair, part: str, index: int, value: int) -> None:
    both.theirs.announce(both.rows, EXPERTS, FIRST.pack())
    both.spoil(both.our_segment if part == "cell" else both.their_segment, part, index, value)
    with pytest.raises(SegmentCorrupt, match="expert-1"):
        both.ours.dispatch(both.x, both.experts, event=FIRST, deadline=Deadline.after_ms(5_000))


@pytest.mark.parametrize(
    ("part", "index", "value"),
    [
        ("cell", 2, 2 << 32 | 3),
        ("cell", 2, 3 << 32 | 4),
        ("cell", 3, 4),
        ("cell", 3, 2),
        ("starts", 3, 7),
        ("starts", 2, 1),
        ("pair_row", 2, 3),
        ("pair_row", 5, 2**32 - 1),
    ],
)
def test_they_refuse_what_we_cannot_have_announced(both: Pair, part: str, index: int, value: int) -> None:
    both.ours._stage(both.x, both.experts, FIRST)
    both.ours._announce(FIRST)
    both.spoil(both.their_segment if part == "cell" else both.our_segment, part, index, value)
    both.theirs.announce(both.rows, EXPERTS, FIRST.pack())
    with pytest.raises(second.SegmentCorrupt):
        both.theirs.receive(FIRST.pack(), time.monotonic() + 5)


@pytest.mark.parametrize(
    ("part", "index", "value"), [("cell", 18, 1), ("y_start", 0, 12), ("y_start", 1, 2**31)]
)
def test_we_refuse_answers_that_cannot_be(both: Pair, part: str, index: int, value: int) -> None:
    """Of 12 rows of y, two or more begin at the place that is spoiled; the answer's cell is on lane 2."""
    both.theirs.announce(both.rows, EXPERTS, FIRST.pack())
    deadline = Deadline.after_ms(5_000)
    result, handle = both.ours.dispatch(both.x, both.experts, event=FIRST, deadline=deadline)
    arrived = both.theirs.receive(FIRST.pack(), time.monotonic() + 5)
    with pytest.raises(second.PeerStalled):  # it answers, and waits for ours
        both.theirs.combine([a.row for a in arrived], [[1, 1]] * 3, FIRST.pack(), time.monotonic())
    both.spoil(both.our_segment if part == "cell" else both.their_segment, part, index, value)
    with pytest.raises(SegmentCorrupt, match="expert-1"):
        both.ours.combine(result.y, np.ones((3, 2), np.float32), handle, deadline=deadline)


@pytest.mark.parametrize(
    ("part", "index", "value"), [("cell", 18, 1), ("y_start", 2, 12), ("y_start", 3, 2**31)]
)
def test_they_refuse_answers_that_cannot_be(both: Pair, part: str, index: int, value: int) -> None:
    both.theirs.announce(both.rows, EXPERTS, FIRST.pack())
    result, handle = both.ours.dispatch(both.x, both.experts, event=FIRST, deadline=Deadline.after_ms(5_000))
    with pytest.raises(PeerStalled):
        weights = np.ones((3, 2), np.float32)
        both.ours.combine(result.y, weights, handle, deadline=Deadline.after_ms(1))
    both.spoil(both.their_segment if part == "cell" else both.our_segment, part, index, value)
    arrived = both.theirs.receive(FIRST.pack(), time.monotonic() + 5)
    with pytest.raises(second.SegmentCorrupt):
        both.theirs.combine([a.row for a in arrived], [[1, 1]] * 3, FIRST.pack(), time.monotonic() + 5)
