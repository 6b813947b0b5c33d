"""A process that speaks the second implementation: `python -m tests.interop.second_child ROLE JSON`.

Prints one JSON object per line: {"segment": ...} once its segment is there, then what it found.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from tests.interop.second import Areas, BusError, Segment
from tests.interop.second_p2p import Array, Receiver, Sender
from tests.interop.second_reach import ReadReceiver, ReadSender

DEADLINE_S = 20.0
APP_BYTES = 1 << 20
NUM_LANES = 3


def say(**fields: object) -> None:
    """Print one finding."""
    print(json.dumps(fields), flush=True)


def deadline() -> float:
    """Return the moment after which this process waits for nothing."""
    return time.monotonic() + DEADLINE_S


class Child:
    """The own segment, the peer's, and both ends of the link between them. The peer's slot is 0, the own one is
    1."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        ring_bytes = 1 << 16
        self.own = Segment.create(
            config["name"],
            Areas.of(2 * NUM_LANES, ring_bytes, APP_BYTES),
            service="expert",
            index=0,
            incarnation=config["incarnation"],
            num_lanes=NUM_LANES,
        )
        say(segment=self.own.name)
        self.peer = Segment.attach(config["peer"])

    def receiver(self) -> Receiver:
        """Open the receiving end."""
        slots, size = self.config["num_slots"], self.config["slot_bytes"]
        return Receiver(self.own, self.peer, 1, 0, ring_offset=0, num_slots=slots, slot_bytes=size)

    def sender(self) -> Sender:
        """Open the sending end."""
        return Sender(self.own, self.peer, 1, 0, deadline())

    def close(self) -> None:
        """Remove the own segment."""
        self.peer.close()
        self.own.close()


def echo(child: Child) -> None:
    """Return every message as it came, opening both ends anew after half of them."""
    count = child.config["count"]
    for half in (range(count // 2), range(count // 2, count)):
        receiver, sender = child.receiver(), None
        for i in half:
            arrays = receiver.recv(1000 + i, deadline())
            sender = sender or child.sender()  # the peer grants its ring when it waits for the answer
            sender.send(arrays, 2000 + i, deadline())


def echo_pulled(child: Child) -> None:
    """Return every message's first part from the app area."""
    receiver, sender = child.receiver(), None
    for i in range(child.config["count"]):
        array = receiver.recv(1000 + i, deadline())[0]
        sender = sender or child.sender()
        at = child.own.areas.app_offset + 4096 * i
        child.own.bytes[at : at + len(array.data)] = array.data
        sender.send_pulled(Array(array.dtype, array.shape, b""), 4096 * i, 2000 + i, deadline())


def echo_read(child: Child) -> None:
    """Return every message's first part, read in the own memory once that is proved; say how often either was."""
    slots, size = child.config["num_slots"], child.config["slot_bytes"]
    receiver = ReadReceiver(child.own, child.peer, 1, 0, ring_offset=0, num_slots=slots, slot_bytes=size)
    sender, num_sent = None, 0
    for i in range(child.config["count"]):
        array = receiver.recv(1000 + i, deadline())[0]
        sender = sender or ReadSender(child.own, child.peer, 1, 0, deadline())
        if sender.has_proof():
            num_sent += 1
            sender.send_read(array, 2000 + i, deadline())
        else:
            sender.send([array], 2000 + i, deadline())
    assert sender is not None
    say(received=receiver.num_read, sent=num_sent, helped=sender.num_helped)
    sender.close()
    receiver.close()


def receive(child: Child) -> None:
    """Say the event id, or the error, of `count` messages."""
    receiver = child.receiver()
    for i in range(child.config["count"]):
        arrays = receiver.recv(1000 + i, deadline())
        say(event=1000 + i, bytes=arrays[0].data.hex())
    receiver.recv(1, deadline())


def send(child: Child) -> None:
    """Send `count` messages that name sender, incarnation and number."""
    sender = child.sender()
    for i in range(child.config["count"]):
        sender.send([testimony(child.own.incarnation, i)], 1000 + i, deadline())
    sender.send([testimony(child.own.incarnation, 99)], 1, deadline())


def testimony(incarnation: int, number: int) -> Array:
    """Return 300 uint32 that say who sent them and which message it is: longer than a slot of the tests'
    rings."""
    word = (incarnation << 16 | number).to_bytes(4, "little")
    return Array("<u4", (300,), word * 300)


def main() -> None:
    """Run one role to its end; errors of the bus are findings."""
    role, config = sys.argv[1], json.loads(sys.argv[2])
    child = Child(config)
    try:
        roles = {"echo": echo, "echo-pulled": echo_pulled, "echo-read": echo_read}
        {**roles, "receive": receive, "send": send}[role](child)
        say(done=True)
    except BusError as error:
        say(error=error.name, text=str(error))
    finally:
        child.close()
    say(imported=sorted({name.split(".")[0] for name in sys.modules} & {"bus", "numpy"}))


if __name__ == "__main__":
    main()
