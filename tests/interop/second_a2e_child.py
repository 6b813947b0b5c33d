"""A rank of A2E / E2A that speaks the second implementation: `python -m tests.interop.second_a2e_child ROLE JSON`.

Prints one JSON object per line: {"segment": ...} once its segment is there, then what it found. It begins when a line
comes in on stdin: then all peers are there.
"""

from __future__ import annotations

import json
import sys
import time
from array import array
from typing import Any

from tests.interop.second import Areas, BusError, Segment
from tests.interop.second_a2e import Attention, Expert, Pair, Shape

DEADLINE_S = 20.0


def say(**fields: object) -> None:
    """Print one finding."""
    print(json.dumps(fields), flush=True)


def create(config: dict[str, Any], service: str, areas: Areas) -> Segment:
    """Create the own segment, say so, and wait for the word to begin."""
    own = Segment.create(
        config["name"],
        areas,
        service=service,
        index=config["index"],
        incarnation=config["incarnation"],
        num_lanes=1,
    )
    say(segment=own.name)
    sys.stdin.readline()
    return own


def run_expert(config: dict[str, Any], shape: Shape) -> Segment:
    """Answer `count` requests."""
    own = create(config, "expert", shape.expert_areas())
    peers = [Segment.attach(name) for name in config["peers"]]
    Expert(own, peers, shape, config["index"]).serve(config["count"], time.monotonic() + DEADLINE_S)
    return own


def run_attention(config: dict[str, Any], shape: Shape) -> Segment:
    """Do the exchanges named in `config`, and say each result as [row, slot, values]."""
    own = create(config, "attention", shape.attention_areas())
    end = Attention(own, [Segment.attach(name) for name in config["peers"]], shape, config["index"])
    for exchange in config["exchanges"]:
        rows = [array("f", row).tobytes() for row in exchange["rows"]]
        pairs = [Pair(*pair) for pair in exchange["pairs"]]
        found = end.exchange(rows, pairs, exchange["event"], time.monotonic() + DEADLINE_S)
        say(results=[[*place, array("f", row).tolist()] for place, row in sorted(found.items())])
    return own


def main() -> None:
    """Run one role to its end."""
    role, config = sys.argv[1], json.loads(sys.argv[2])
    try:
        own = {"expert": run_expert, "attention": run_attention}[role](config, Shape(**config["shape"]))
        sys.stdin.readline()  # the peers have read what lies here
        own.close()
    except BusError as error:
        say(error=error.name, text=str(error))
    say(imported=sorted({name.split(".")[0] for name in sys.modules} & {"bus", "numpy"}))


if __name__ == "__main__":
    main()
