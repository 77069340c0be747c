"""A member's clocks in virtual time."""

from __future__ import annotations

from farflung.sim.loop import NS, VirtualLoop

EPOCH_MS = 1_767_225_600_000
"""The wall clock when a world begins: 2026-01-01. Any will do, as long as every run has the same."""


class SimClock:
    """A `runtime.Clock`. The wall clock is `skew_s` ahead; the monotonic one is everybody's."""

    def __init__(self, loop: VirtualLoop, skew_s: float = 0.0) -> None:
        self._loop, self.skew_s = loop, skew_s

    def now_s(self) -> float:
        """Seconds since the world began."""
        return self._loop.now_ns / NS

    def unix_ms(self) -> int:
        """Milliseconds since 1970, as this member's computer believes."""
        return EPOCH_MS + self._loop.now_ns // 1_000_000 + int(self.skew_s * 1e3)
