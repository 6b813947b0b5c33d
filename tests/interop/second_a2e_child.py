"""A rank of A2E / E2A that speaks the second implementation: `python -m tests.interop.second_a2e_child ROLE JSON`.

Prints one JSON object per line: {"segment": ...} once its segment is there, then what it found. It begins when a line
comes in on stdin: then all ranks are there. An expert rank serves until the next one.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from array import array
from typing import Any

from tests.interop.second import Areas, BusError, Segment
from tests.interop.second_a2e import Attention, Expert, Pair, Shape

DEADLINE_S = 20.0
LOOK_S = 0.005


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


def attach(names: list[str], own: Segment) -> list[Segment]:
    """Map the segments of one service."""
    return [own if name == own.name else Segment.attach(name) for name in names]


def run_expert(config: dict[str, Any], shape: Shape) -> Segment:
    """Serve until the next line comes in."""
    own = create(config, "expert", shape.expert_areas())
    attention, experts = (attach(config[service], own) for service in ("attention", "experts"))
    end = Expert(own, attention, experts, shape, config["index"])
    line = threading.Thread(target=sys.stdin.readline, daemon=True)
    line.start()
    while line.is_alive():
        end.wait(LOOK_S)
        end.look_for_the_dead()
    say(answered=end.num_answered, forwarded=end.num_forwarded)
    return own


def run_attention(config: dict[str, Any], shape: Shape) -> Segment:
    """Do the exchanges named in `config`, and say each result as [row, slot, values]."""
    own = create(config, "attention", shape.attention_areas())
    end = Attention(own, attach(config["experts"], own), shape, config["index"])
    for exchange in config["exchanges"]:
        rows = [array("f", row) for row in exchange["rows"]]
        pairs, deadline_s = [Pair(*pair) for pair in exchange["pairs"]], time.monotonic() + DEADLINE_S
        try:
            found = end.exchange(rows, pairs, exchange["event"], deadline_s, through=exchange["through"])
            say(results=[[*place, row.tolist()] for place, row in sorted(found.items())])
        except BusError as error:
            say(error=error.name, text=str(error))
    return own


def main() -> None:
    """Run one role to its end."""
    role, config = sys.argv[1], json.loads(sys.argv[2])
    own = {"expert": run_expert, "attention": run_attention}[role](config, Shape(**config["shape"]))
    sys.stdin.readline()  # the peers have read what lies here
    own.close()
    say(imported=sorted({name.split(".")[0] for name in sys.modules} & {"bus", "numpy"}))


if __name__ == "__main__":
    main()
