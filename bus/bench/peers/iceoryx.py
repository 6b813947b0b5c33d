"""iceoryx2: publish and subscribe over shared memory, polled, or with an event to sleep on.

The message is copied into the loan and out of the sample with `memmove`, the cheapest copy its Python API allows. The
polled form spins on `receive`; the other one rings a notifier after each sample and sleeps in a listener. Handed over
nothing is copied: the loan is sent as it is, except for its first and its last byte.
"""

from __future__ import annotations

import ctypes
from contextlib import ExitStack
from importlib import import_module
from typing import Any

import numpy as np

from bus.bench.meeting import Meeting, Message
from bus.bench.pingpong import HANDED_OVER, Ends, Link, marks


class Topic:
    """One way to the partner and one back."""

    def __init__(self, node: Any, iox: Any, names: tuple[str, str], size_max: int, *, polled: bool) -> None:
        self._iox, self._polled = iox, polled
        to, back = (_service(node, iox, name) for name in names)
        self._publisher = to.publisher_builder().initial_max_slice_len(size_max).create()
        self._subscriber = back.subscriber_builder().create()
        self._notifier = self._listener = None
        if not polled:
            self._notifier = _event(node, iox, names[0]).notifier_builder().create()
            self._listener = _event(node, iox, names[1]).listener_builder().create()
        self._out, self._into = np.ones(size_max, np.uint8), np.ones(size_max, np.uint8)

    def ends(self, num_bytes: int) -> Ends:
        """See `Link`."""
        loan, receive, move = self._publisher.loan_slice_uninit, self._subscriber.receive, ctypes.memmove
        out, into, payload = self._out.ctypes.data, self._into.ctypes.data, self._out[:num_bytes]

        def rewrite() -> None:
            payload.fill(7)

        def send() -> None:
            sample = loan(num_bytes)
            move(sample.payload_ptr, out, num_bytes)
            sample.assume_init().send()

        def poll() -> None:
            while (sample := receive()) is None:
                pass
            move(into, sample.payload_ptr, num_bytes)
            sample.delete()

        if self._polled:
            return Ends(send, (), poll, (), rewrite)
        notify, wait = self._notifier.notify, self._listener.blocking_wait  # type: ignore[union-attr]

        def send_and_notify() -> None:
            send()
            notify()

        def sleep() -> None:
            while (sample := receive()) is None:
                wait()
            move(into, sample.payload_ptr, num_bytes)
            sample.delete()

        return Ends(send_and_notify, (), sleep, (), rewrite)

    def handing_over(self, num_bytes: int) -> Ends:
        """Return ends of the polled form that copy nothing."""
        loan, receive, byte = (
            self._publisher.loan_slice_uninit,
            self._subscriber.receive,
            ctypes.c_uint8.from_address,
        )
        last = num_bytes - 1
        next_sent, next_expected = marks().__next__, marks().__next__

        def send() -> None:
            sample, mark = loan(num_bytes), next_sent()
            at = sample.payload_ptr
            byte(at).value = byte(at + last).value = mark
            sample.assume_init().send()

        def poll() -> None:
            while (sample := receive()) is None:
                pass
            at, mark = sample.payload_ptr, next_expected()
            if byte(at).value != mark or byte(at + last).value != mark:
                raise AssertionError("another message than was sent")
            sample.delete()

        return Ends(send, (), poll, (), None)

    def close(self) -> None:
        """Delete the ports."""
        for port in (self._publisher, self._subscriber, self._notifier, self._listener):
            if port is not None:
                port.delete()


class HandedOver:
    """The polled form of a topic without a copy."""

    def __init__(self, topic: Topic) -> None:
        self._topic = topic

    def ends(self, num_bytes: int) -> Ends:
        """See `Link`."""
        return self._topic.handing_over(num_bytes)


def open_pairs(meeting: Meeting, stack: ExitStack, size_max: int, options: Message) -> dict[str, Link]:
    """Return the links with the partner."""
    iox = import_module("iceoryx2")
    iox.set_log_level(iox.LogLevel.Error)
    config = iox.config.default()
    config.global_cfg.prefix = iox.FileName.new(f"{meeting.name}-")
    config.global_cfg.root_path = iox.Path.new(f"{meeting.folder}/iceoryx/")
    builder = iox.NodeBuilder.new().config(config)
    node = builder.signal_handling_mode(iox.SignalHandlingMode.Disabled).create(iox.ServiceType.Ipc)
    links: dict[str, Link] = {}
    for polled in (True, False):
        label = "polled" if polled else "events"
        names = [f"{label}/{meeting.num_ranks}/{rank}" for rank in (meeting.rank, meeting.rank ^ 1)]
        topic = Topic(node, iox, (names[0], names[1]), size_max, polled=polled)
        stack.callback(topic.close)
        links[f"iceoryx2 {label}"] = topic
        if polled:
            links[f"iceoryx2 {label}, {HANDED_OVER}"] = HandedOver(topic)
    meeting.gather()  # all ports are there
    return links


def _service(node: Any, iox: Any, name: str) -> Any:
    builder = node.service_builder(iox.ServiceName.new(name)).publish_subscribe(iox.Slice[ctypes.c_uint8])
    return builder.max_publishers(1).max_subscribers(1).open_or_create()


def _event(node: Any, iox: Any, name: str) -> Any:
    return node.service_builder(iox.ServiceName.new(name)).event().open_or_create()
