"""A source and its sinks in one process, over real segments; blocks whose every word says whose it is."""

from __future__ import annotations

import numpy as np

from bus.control.messages import KvTicket
from bus.distflow.sink import KvSink
from bus.distflow.source import KvSource
from bus.distflow.table import TransferLayout
from bus.memory.layout import SegmentLayout
from bus.memory.segment import Segment, segment_name

BLOCK_BYTES = 256
LAYOUT = TransferLayout(
    num_blocks=8, block_bytes=BLOCK_BYTES, num_slots=3, num_sinks=2, payload_bytes_max=100
)


class SourceSide:
    """A prefill worker's segment with its source; block b begins full of the word `b + 1`."""

    def __init__(
        self,
        pod: str,
        *,
        index: int = 0,
        incarnation: int = 1,
        layout: TransferLayout = LAYOUT,
        first_serial: int = 1,
    ):
        name = segment_name(pod, "prefill", index, incarnation)
        area = SegmentLayout(0, 0, layout.app_bytes)
        self.segment = Segment.create(name, area, service="prefill", index=index, incarnation=incarnation)
        self.source = KvSource(self.segment, layout, first_serial=first_serial)
        self.blocks = self.segment.array(
            area.app_offset, (layout.num_blocks, layout.block_bytes // 4), np.uint32
        )
        self.blocks[:] = np.arange(1, layout.num_blocks + 1)[:, None]

    def close(self) -> None:
        """Free everything."""
        del self.blocks
        self.segment.unlink()
        self.segment.close()


class SinkSide:
    """A decode worker's blocks, full of zeros, with its sink."""

    def __init__(
        self, *, index: int = 0, incarnation: int = 1, num_blocks: int = 8, block_bytes: int = BLOCK_BYTES
    ):
        self.blocks = np.zeros((num_blocks, block_bytes // 4), np.uint32)
        self.sink = KvSink(
            self.blocks,
            num_blocks=num_blocks,
            block_bytes=block_bytes,
            index=index,
            incarnation=incarnation,
            rank=f"attention-{index}",
        )

    def fetch(
        self, ticket: KvTicket, block_ids: list[int], *, fetch_id: int = 1, first_block: int = 0
    ) -> str:
        """Receive all at once; return the error."""
        self.sink.post(fetch_id, ticket, first_block, block_ids)
        while self.sink.progress(1 << 30):
            pass
        (completion,) = self.sink.completions()
        assert completion.fetch_id == fetch_id
        return completion.error

    def close(self) -> None:
        """Free everything."""
        self.sink.close()
