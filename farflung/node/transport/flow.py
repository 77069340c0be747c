"""How many bytes went by, and how fast they may go."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from farflung.node.runtime import Clock

SLACK_S = 0.05
"""What a busy event loop may be late without slowing an upload down."""


@dataclass(slots=True)
class Traffic:
    """Bytes of messages so far, framing not counted."""

    control_sent: int = 0
    control_received: int = 0
    bulk_sent: int = 0
    bulk_received: int = 0


class UploadCap:
    """A token bucket over everything a node uploads in bulk. None: no cap.

    Streams take turns chunk by chunk (asyncio.Lock is first come, first served), so each gets its fair share. A chunk
    leaves when its bytes have been paid for; of unused time at most SLACK_S is saved up.
    """

    def __init__(self, bytes_per_s: float | None, clock: Clock) -> None:
        if bytes_per_s is not None and bytes_per_s <= 0:
            raise ValueError(f"an upload cap must be positive, got {bytes_per_s}")
        self._bytes_per_s = bytes_per_s
        self._clock = clock
        self._free_at_s = 0.0
        self._turn = asyncio.Lock()

    async def pay(self, size: int) -> None:
        """Return when `size` bytes may leave. A caller that gives up while waiting costs the others nothing."""
        if self._bytes_per_s is None:
            return
        async with self._turn:
            paid_at_s = max(self._free_at_s, self._clock.now_s() - SLACK_S) + size / self._bytes_per_s
            while (wait_s := paid_at_s - self._clock.now_s()) > 0:  # timers may fire a clock tick early
                await asyncio.sleep(wait_s)
            self._free_at_s = paid_at_s
