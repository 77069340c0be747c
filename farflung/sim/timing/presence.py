"""When members are there: sessions, crashes, departures and partitions as intervals of time."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Span = tuple[float, float]


@dataclass(frozen=True)
class Departure:
    """A member's machine stops being there. Polite: it said so."""

    at_s: float
    polite: bool


class Presence:
    """One member's intervals: `powered` (its machine runs) and `connected` (the swarm can reach it)."""

    def __init__(self, sessions: Sequence[tuple[float, float, bool]]) -> None:
        """`sessions`: (start, end, crash), sorted, not overlapping."""
        self._powered: list[Span] = [(start, end) for start, end, _ in sessions if end > start]
        self._connected = list(self._powered)
        self._polite = {end: not crash for _, end, crash in sessions if math.isfinite(end)}
        self._index()

    def cut(self, start_s: float, end_s: float, *, polite: bool) -> None:
        """The machine is off from start to end."""
        if self.powered(start_s):
            self._polite[start_s] = polite
        self._powered = list(_without(self._powered, start_s, end_s))
        self._connected = list(_without(self._connected, start_s, end_s))
        self._index()

    def isolate(self, start_s: float, end_s: float) -> None:
        """The machine runs from start to end, and nobody can reach it."""
        self._connected = list(_without(self._connected, start_s, end_s))
        self._index()

    def _index(self) -> None:
        self._powered_starts = [start for start, _ in self._powered]
        self._connected_starts = [start for start, _ in self._connected]
        self.always = self._connected == [(0.0, math.inf)]
        """Whether it is there from the beginning to the end."""

    def powered(self, at_s: float) -> bool:
        """Whether the machine runs."""
        return _holds(self._powered, self._powered_starts, at_s)

    def connected(self, at_s: float) -> bool:
        """Whether the swarm can reach it."""
        return _holds(self._connected, self._connected_starts, at_s)

    def next_connected(self, at_s: float) -> float:
        """The first time from `at_s` on at which it can be reached; inf: never."""
        return _next(self._connected, self._connected_starts, at_s)

    def next_powered(self, at_s: float) -> float:
        """The first time from `at_s` on at which the machine runs; inf: never."""
        return _next(self._powered, self._powered_starts, at_s)

    def connected_until(self, at_s: float) -> float:
        """The end of the interval that holds `at_s`."""
        return self._connected[bisect_right(self._connected_starts, at_s) - 1][1]

    def powered_until(self, at_s: float) -> float:
        """The same for the machine."""
        return self._powered[bisect_right(self._powered_starts, at_s) - 1][1]

    def departures(self, start_s: float, end_s: float) -> list[Departure]:
        """When the machine stopped within [start, end)."""
        return [Departure(at, self._polite.get(at, False)) for _, at in self._powered if start_s <= at < end_s]

    def edges(self, start_s: float, end_s: float) -> list[tuple[float, bool]]:
        """When it was cut off or came back within (start, end): (time, connected from then on)."""
        found = [(start, True) for start, _ in self._connected if start_s < start < end_s]
        found += [(end, False) for _, end in self._connected if start_s < end < end_s]
        return sorted(found)

    def powered_s(self, start_s: float, end_s: float) -> float:
        """How long the machine ran within [start, end)."""
        return math.fsum(max(0.0, min(stop, end_s) - max(start, start_s)) for start, stop in self._powered)


def _holds(spans: Sequence[Span], starts: Sequence[float], at_s: float) -> bool:
    index = bisect_right(starts, at_s) - 1
    return index >= 0 and at_s < spans[index][1]


def _next(spans: Sequence[Span], starts: Sequence[float], at_s: float) -> float:
    if _holds(spans, starts, at_s):
        return at_s
    index = bisect_right(starts, at_s)
    return spans[index][0] if index < len(spans) else math.inf


def _without(spans: Iterable[Span], start_s: float, end_s: float) -> Iterable[Span]:
    for first, last in spans:
        if first < min(last, start_s):
            yield first, min(last, start_s)
        if max(first, end_s) < last:
            yield max(first, end_s), last
