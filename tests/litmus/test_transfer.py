"""KV transfer between processes: offers withdrawn and blocks rewritten under the copy, and `kill -9` on either side."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from bus.control.messages import KvTicket
from bus.memory.segment import Segment, segment_name
from tests.litmus.transfer_child import BLOCK_BYTES, LIVING, bear_witness, sink_of, source_of, witness

Spawn = Callable[..., Any]
NUM_RACES = 400


def start(spawn: Spawn, pod: str, role: str, incarnation: int = 1, point: str = LIVING, **how: object) -> Any:
    child = spawn(role, pod, incarnation, point, script="transfer_child.py", **how)
    assert child.line() == "ready"
    return child


def ask(child: Any, line: str) -> str:
    child.say(line)
    answer: str = child.line()
    return answer


def offer(child: Any, first: int, count: int) -> KvTicket:
    return msgspec.json.decode(ask(child, f"offer {first} {count}"), type=KvTicket)


def assert_died_at(child: Any, point: str) -> None:
    assert child.line() == f"fault {point}", "it must die there, not somewhere else"
    assert child.wait() == -signal.SIGKILL


def kill(child: Any) -> None:
    child.process.send_signal(signal.SIGKILL)
    child.process.wait(10)


def fetch(sink: Any, ticket: KvTicket, slice_bytes: int = 1 << 30) -> str:
    sink.post(1, ticket, 0, range(len(ticket.block_ids)))
    while sink.progress(slice_bytes):
        pass
    (completion,) = sink.completions()
    return str(completion.error)


# ------------------------------------------------------------------ races


def test_what_arrives_without_an_error_is_never_foreign(spawn: Spawn, pod: str, cpus: list[set[int]]) -> None:
    """The source withdraws and rewrites at random moments: a fetch that ends well has the words of its offer alone.

    Slots, blocks and the mapping are used again and again. Before and after the races the outcome is certain.
    """
    child = start(spawn, pod, "source", cpus=cpus[1])
    sink, blocks = sink_of(1)
    kept = offer(child, 0, 12)
    assert fetch(sink, kept) == ""
    assert ask(child, "ended") == str(kept.serial)
    withdrawn = offer(child, 0, 12)
    assert ask(child, f"withdraw {withdrawn.serial}") == "withdrawn"
    assert "ended serial 2" in fetch(sink, withdrawn)
    assert ask(child, "ended") == "2"
    outcomes = {"whole": 0, "refused": 0}
    for seed in range(NUM_RACES):
        ticket = msgspec.json.decode(ask(child, f"race {seed}"), type=KvTicket)
        error = fetch(sink, ticket, slice_bytes=(5 + seed % 60) * BLOCK_BYTES // 5)
        if error:
            assert "prefill-0.1" in error and ("ended serial" in error or "being written" in error)
            outcomes["refused"] += 1
            continue
        expected = witness(12, ticket.serial)
        assert (blocks[:12] == expected[:, None]).all(), f"foreign words in serial {ticket.serial}"
        outcomes["whole"] += 1
    assert sum(outcomes.values()) == NUM_RACES
    assert sink.counters.fetches_completed == 1 + outcomes["whole"]
    assert ask(child, "end") == "done"
    sink.close()


# ------------------------------------------------------------------ the source dies


@pytest.mark.parametrize("point", ["write_cell:1", "cell-begun:1", "store_u64:1"])
def test_a_source_killed_before_its_offer_is_published(
    spawn: Spawn, pod: str, faulty_build: Path, point: str
) -> None:
    """Nothing of the offer is visible. `store_u64` is not called by an offer, so there the offer stands."""
    child = start(spawn, pod, "source", point=point, build=faulty_build)
    child.say("offer 3 2")
    name = segment_name(pod, "prefill", 0, 1)
    expected = KvTicket(
        index=0, incarnation=1, segment=name, slot=0, serial=1, num_tokens=1, block_ids=(3, 4)
    )
    sink, blocks = sink_of(1)
    if point.startswith("store"):
        assert msgspec.json.decode(child.line(), type=KvTicket) == expected
        kill(child)
        assert fetch(sink, expected) == ""
    else:
        assert_died_at(child, point.removesuffix(":1") if point.startswith("cell") else point)
        assert "has no offer" in fetch(sink, expected)
        assert not blocks.any()
    sink.close()


@pytest.mark.parametrize(("point", "is_whole"), [("write_cell:2", True), ("cell-begun:2", False)])
def test_a_source_killed_while_it_withdraws(
    spawn: Spawn, pod: str, faulty_build: Path, point: str, is_whole: bool
) -> None:
    """Until the first word of the cell has changed the offer stands, and what a dead source has offered is whole."""
    child = start(spawn, pod, "source", point=point, build=faulty_build)
    ticket = offer(child, 3, 2)
    child.say("withdraw 1")
    assert_died_at(child, point if is_whole else "cell-begun")
    sink, blocks = sink_of(1)
    error = fetch(sink, ticket)
    assert (error == "") == is_whole
    assert is_whole or "being written" in error
    assert blocks[:2, 0].tolist() == (witness(2, 1).tolist() if is_whole else [0, 0])
    sink.close()


def test_a_source_killed_in_mid_copy_is_fetched_to_the_end(spawn: Spawn, pod: str) -> None:
    child = start(spawn, pod, "source")
    first, second = offer(child, 0, 4), offer(child, 4, 4)
    sink, blocks = sink_of(1)
    sink.post(1, first, 0, range(4))
    assert sink.progress(BLOCK_BYTES)
    kill(child)
    sink.post(2, second, 0, range(4, 8))
    while sink.progress(BLOCK_BYTES):
        pass
    assert [c.error for c in sink.completions()] == ["", ""]
    assert blocks[:8, 5].tolist() == [*witness(4, 1), *witness(4, 2)]
    sink.drop_dead()
    assert sink.num_mapped == 0
    sink.close()


def test_the_next_incarnation_of_a_source_is_fetched_from_beside_the_dead_one(spawn: Spawn, pod: str) -> None:
    child = start(spawn, pod, "source")
    old = offer(child, 0, 4)
    kill(child)
    successor = start(spawn, pod, "source", 2)
    new = offer(successor, 4, 3)
    sink, _ = sink_of(1)
    assert new.serial == old.serial and new.segment != old.segment
    assert fetch(sink, old) == ""
    assert fetch(sink, new) == ""
    assert sink.num_mapped == 1
    assert ask(successor, "ended") == "1"
    assert ask(successor, "end") == "done"
    sink.close()


# ------------------------------------------------------------------ the sink dies


@pytest.mark.parametrize(
    ("point", "is_answered"),
    [
        ("copy:1", False),
        ("copy:4", False),
        ("write_cell:1", False),
        ("cell-begun:1", False),
        ("store_u64:1", True),
    ],
)
def test_a_sink_killed_at_any_point_leaves_the_offer_to_its_leader(
    spawn: Spawn, pod: str, faulty_build: Path, point: str, is_answered: bool
) -> None:
    """Whoever is told to withdraw looks once more: an answer without its news counts, half an answer does not."""
    segment, source, blocks = source_of(pod, 1)
    bear_witness(blocks, tuple(range(8)), 1)
    ticket = source.offer(range(8), 1)
    child = start(spawn, pod, "sink", point=point, build=faulty_build)
    child.say(msgspec.json.encode(ticket).decode())
    assert_died_at(child, point.removesuffix(":1") if point.startswith("cell") else point)
    assert source.ended() == [] and source.num_standing == 1
    successor = start(spawn, pod, "sink", 2)
    told = ask(successor, msgspec.json.encode(ticket).decode())
    assert told == " ".join(map(str, witness(8, 1)))
    assert source.ended() == [ticket.serial]
    assert source.counters.blocks_sent == 8
    assert ask(successor, "end") == "done"
    again = source.offer(range(8), 1)
    second = start(spawn, pod, "sink", 3, point=point, build=faulty_build)
    second.say(msgspec.json.encode(again).decode())
    assert_died_at(second, point.removesuffix(":1") if point.startswith("cell") else point)
    source.withdraw([again.serial])
    assert source.ended() == [again.serial]
    assert source.counters.offers_withdrawn == (0 if is_answered else 1)
    assert source.counters.blocks_sent == (16 if is_answered else 8)
    del blocks
    segment.unlink()
    segment.close()


def test_a_stopped_sink_that_comes_back_is_refused(spawn: Spawn, pod: str) -> None:
    """It was stopped in mid-copy; meanwhile the offer is withdrawn, and its slot and blocks serve the next one."""
    segment, source, blocks = source_of(pod, 1)
    bear_witness(blocks, tuple(range(8)), 1)
    ticket = source.offer(range(8), 1)
    sink, own = sink_of(1)
    sink.post(1, ticket, 0, range(8))
    assert sink.progress(BLOCK_BYTES)
    source.withdraw([ticket.serial])
    assert source.ended() == [1]
    for serial in (2, 3):
        bear_witness(blocks, tuple(range(8)), serial)
        assert source.offer(range(8), 1).serial == serial
    while sink.progress(BLOCK_BYTES):
        pass
    assert "holds serial 3" in sink.completions()[0].error
    assert source.ended() == [] and source.counters.blocks_sent == 0
    assert np.array_equal(own[0], np.full_like(own[0], witness(1, 1)[0]))
    sink.close()
    del blocks
    segment.unlink()
    segment.close()
    with pytest.raises(FileNotFoundError):
        Segment.attach(ticket.segment)
