"""A process that does next to nothing, some times a second: what a wake-up costs on this host, now.

Run by its path. It imports nothing of ours, so that nothing of ours that becomes dear makes it dear too.
"""

from __future__ import annotations

import asyncio
import json
import time

INTERVAL_S = 0.25


async def main() -> None:
    """Wake up, encode and decode a few fields, sleep; say `ready` first."""
    print("ready", flush=True)
    fields = {"service": "sleeper", "index": 0, "counters": {"jobs": 0, "bytes": 0}, "at_ns": 0}
    while True:
        await asyncio.sleep(INTERVAL_S)
        fields["at_ns"] = time.monotonic_ns()
        json.loads(json.dumps(fields))


if __name__ == "__main__":
    asyncio.run(main())
