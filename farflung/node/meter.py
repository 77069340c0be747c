"""How fast this member's line is, from what it moves anyway."""

from __future__ import annotations


class Meter:
    """Bytes per second of busy time: the time in which at least one transfer is under way. Used on one event loop.

    A queue between here and the line (a socket's buffer) hides its first bytes: small payloads look faster than the
    line, large ones do not.
    """

    def __init__(self) -> None:
        self._under_way = 0
        self._since_s = self._busy_s = 0.0
        self._bytes = 0
        self._rate_bps = 0.0

    def begin(self, now_s: float) -> None:
        """A transfer begins, or is resumed."""
        if not self._under_way:
            self._since_s = now_s
        self._under_way += 1

    def end(self, now_s: float) -> None:
        """It has ended, or waits for something else than the line."""
        self._under_way -= 1
        if not self._under_way:
            self._busy_s += now_s - self._since_s

    def moved(self, size: int) -> None:
        """So many bytes went by."""
        self._bytes += size

    def take_bps(self, now_s: float) -> float:
        """Bits per second since this was last asked; if nothing moved since, what it was then; 0: never anything."""
        if self._under_way:
            self._busy_s, self._since_s = self._busy_s + now_s - self._since_s, now_s
        if self._bytes and self._busy_s > 0:
            self._rate_bps = 8 * self._bytes / self._busy_s
        self._bytes, self._busy_s = 0, 0.0
        return self._rate_bps
