"""The functions that Python calls: each does all work of one call in machine code, since a call costs about 2 us."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from farflung.sim.network import events
from farflung.sim.network.compiling import SOURCES, entry
from farflung.sim.network.layout import Numbers, State


class Entries(NamedTuple):
    """What `events` says of the function of the same name, compiled on first call (once per machine: 20 s)."""

    start: Callable[[State, int, int, int, float, int, float, float, float], int]
    cancel: Callable[[State, int, int], float]
    advance: Callable[[State, int], tuple[int, int]]
    settle_now: Callable[[State], int]
    set_capacity: Callable[[State, int, float, int], None]
    use: Callable[[State, Numbers], None]
    totals: Callable[[State, int, Numbers, Numbers], None]


def _entries(sources: str) -> Entries:
    def start(
        state: State, ident: int, source: int, target: int, line_bytes: float, now_ns: int,
        round_trip_s: float, window: float, window_limit: float,
    ) -> int:  # fmt: skip
        _ = sources
        return events.start(
            state, ident, source, target, line_bytes, now_ns, round_trip_s, window, window_limit
        )  # fmt: skip

    def cancel(state: State, slot: int, now_ns: int) -> float:
        _ = sources
        return events.cancel(state, slot, now_ns)

    def advance(state: State, now_ns: int) -> tuple[int, int]:
        _ = sources
        return events.advance(state, now_ns)

    def settle_now(state: State) -> int:
        _ = sources
        return events.settle_now(state)

    def set_capacity(state: State, link: int, capacity: float, now_ns: int) -> None:
        _ = sources
        events.set_capacity(state, link, capacity, now_ns)

    def use(state: State, used: Numbers) -> None:
        _ = sources
        events.use(state, used)

    def totals(state: State, now_ns: int, sent: Numbers, received: Numbers) -> None:
        _ = sources
        events.totals(state, now_ns, sent, received)

    return Entries(
        start=entry(start),
        cancel=entry(cancel),
        advance=entry(advance),
        settle_now=entry(settle_now),
        set_capacity=entry(set_capacity),
        use=entry(use),
        totals=entry(totals),
    )


ENTRIES = _entries(SOURCES)
