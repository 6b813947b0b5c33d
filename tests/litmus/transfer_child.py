"""One end of KV transfer in a process of its own: `transfer_child.py ROLE POD INCARNATION POINT`.

A source offers, withdraws and rewrites as it is told on stdin, and prints tickets; a sink fetches what it is told.
Either dies at POINT: a name of `FAULT` in the C code with its count, or "CALL:n", at the n-th call of a function of
`_native`.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from bus.control.messages import KvTicket
from bus.distflow.sink import KvSink
from bus.distflow.source import KvSource
from bus.distflow.table import TransferLayout
from bus.memory import _native
from bus.memory.layout import SegmentLayout
from bus.memory.segment import Segment, segment_name

BLOCK_BYTES = 16384
LAYOUT = TransferLayout(num_blocks=16, block_bytes=BLOCK_BYTES, num_slots=2, num_sinks=2)
LIVING = "none"
WORDS = BLOCK_BYTES // 4


def bear_witness(blocks: npt.NDArray[np.uint32], block_ids: tuple[int, ...], serial: int) -> None:
    """Fill blocks with words that say which offer they are of, and which block of it."""
    for place, block_id in enumerate(block_ids):
        blocks[block_id] = serial << 8 | place


def witness(num_blocks: int, serial: int) -> npt.NDArray[np.uint32]:
    """Return what `bear_witness` fills, one word for each block."""
    return np.uint32(serial << 8) | np.arange(num_blocks, dtype=np.uint32)


def source_of(pod: str, incarnation: int) -> tuple[Segment, KvSource, npt.NDArray[np.uint32]]:
    """Create a source's segment; return its blocks too."""
    name = segment_name(pod, "prefill", 0, incarnation)
    area = SegmentLayout(0, 0, LAYOUT.app_bytes)
    segment = Segment.create(name, area, service="prefill", index=0, incarnation=incarnation)
    blocks = segment.array(area.app_offset, (LAYOUT.num_blocks, WORDS), np.uint32)
    return segment, KvSource(segment, LAYOUT), blocks


def sink_of(incarnation: int, index: int = 0) -> tuple[KvSink, npt.NDArray[np.uint32]]:
    """Return a sink and its blocks."""
    blocks = np.zeros((LAYOUT.num_blocks, WORDS), np.uint32)
    sink = KvSink(
        blocks,
        num_blocks=LAYOUT.num_blocks,
        block_bytes=BLOCK_BYTES,
        index=index,
        incarnation=incarnation,
        rank=f"attention-{index}",
    )
    return sink, blocks


def arm(point: str) -> None:
    """Die at `point` from now on."""
    name, _, count = point.partition(":")
    if hasattr(_native, name):
        setattr(_native, name, _dying(getattr(_native, name), point, int(count)))
    elif point != LIVING:
        os.environ["XDS_FAULT_POINT"] = point


def _dying(function: Callable[..., Any], point: str, count: int) -> Callable[..., Any]:
    calls = 0

    def call(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count:
            os.write(1, f"fault {point}\n".encode())
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args)

    return call


def say(text: str) -> None:
    print(text, flush=True)


def source(pod: str, incarnation: int, point: str) -> None:
    """`offer FIRST COUNT`, `withdraw SERIAL`, `ended`, `race SEED`, `end`."""
    segment, kv, blocks = source_of(pod, incarnation)
    say("ready")
    arm(point)
    for line in sys.stdin:
        verb, *words = line.split()
        if verb == "offer":
            block_ids = tuple(range(int(words[0]), int(words[0]) + int(words[1])))
            bear_witness(blocks, block_ids, kv.counters.offers + 1)
            say(msgspec.json.encode(kv.offer(block_ids, 1)).decode())
        elif verb == "withdraw":
            kv.withdraw([int(words[0])])
            say("withdrawn")
        elif verb == "ended":
            say(" ".join(map(str, kv.ended())))
        elif verb == "race":
            race(kv, blocks, random.Random(int(words[0])))
        else:
            break
    del blocks
    segment.unlink()
    segment.close()
    say("done")


def race(kv: KvSource, blocks: npt.NDArray[np.uint32], draw: random.Random) -> None:
    """Offer some blocks, withdraw them at a random moment while they are fetched, and rewrite them at once."""
    block_ids = tuple(draw.sample(range(LAYOUT.num_blocks), 12))
    bear_witness(blocks, block_ids, kv.counters.offers + 1)
    ticket = kv.offer(block_ids, 1)
    say(msgspec.json.encode(ticket).decode())
    until = time.monotonic_ns() + draw.randrange(600_000)
    while time.monotonic_ns() < until:
        pass
    kv.withdraw([ticket.serial])
    blocks[:] = 0xFFFF_FFFF
    kv.ended()


def sink(pod: str, incarnation: int, point: str) -> None:
    """Fetch each ticket into the first blocks; print the error, or what the blocks say."""
    kv, blocks = sink_of(incarnation)
    say("ready")
    arm(point)
    for line in sys.stdin:
        if line.strip() == "end":
            break
        ticket = msgspec.json.decode(line, type=KvTicket)
        kv.post(ticket.serial, ticket, 0, range(len(ticket.block_ids)))
        while kv.progress(3 * BLOCK_BYTES // 2):
            pass
        (completion,) = kv.completions()
        say(completion.error or " ".join(map(str, blocks[: len(ticket.block_ids), -1])))
    kv.close()
    say("done")


if __name__ == "__main__":
    role, pod_name, number, where = sys.argv[1:]
    {"source": source, "sink": sink}[role](pod_name, int(number), where)
