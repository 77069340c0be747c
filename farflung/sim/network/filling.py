"""Max-min fair rates by brute force: the definitions that the fast solver is held to, in plain fp64 Python.

Where every flow takes its whole rate from every link it crosses, `fill` is the textbook's progressive filling. Flows
also take a small share of their rate from the links of the way back, for acknowledgements. A full link then is fair
in what it carries, as a fair queue is: it grants each flow the same bytes per second, data or acknowledgements, and who
wants less leaves the rest to the others. What acknowledgements want is booked beforehand, for a given rate. (To grant
the same *rate* would hold a download to the speed of an upload beside which only its acknowledgements must fit.)
`balance` is that definition, and agrees with `fill` where both apply.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from farflung.protocol.errors import LocalError

ROUNDS_MAX = 10_000
"""`balance` gives up after so many; each settles at least one more level."""


@dataclass(frozen=True)
class Flow:
    """One flow: the links that its data cross, with the share of its rate that each carries, and its own cap."""

    path: tuple[tuple[int, float], ...]
    cap: float = math.inf
    back: tuple[tuple[int, float], ...] = ()
    """The same for its acknowledgements."""
    booked: float = 0.0
    """The rate that its acknowledgements have room for."""


def fill(capacity_l: Sequence[float], flows: Sequence[Flow]) -> list[float]:
    """The max-min fair rate of every flow whose shares are 1, in the unit of the capacities (l links).

    All flows rise together. Where a link is full, the flows that cross it stop; where a flow meets its own cap, it
    stops; the others rise on (Bertsekas and Gallager, Data Networks, 1992, section 6.5.2). Costs one round per stop.
    Raises LocalError for other shares.
    """
    rate_f = [math.nan] * len(flows)
    crossing_l: list[list[int]] = [[] for _ in capacity_l]
    for f, flow in enumerate(flows):
        for link, share in (*flow.path, *flow.back):
            if share != 1 or flow.back:
                raise LocalError(f"progressive filling is for whole shares and no way back; use balance for {share}")
            crossing_l[link].append(f)
    rising = list(range(len(flows)))
    while rising:
        level_l = [
            _level(capacity, crossing, rate_f) for capacity, crossing in zip(capacity_l, crossing_l, strict=True)
        ]
        limit_f = {f: min([flows[f].cap, *(level_l[link] for link, _ in flows[f].path)]) for f in rising}
        lowest = min(limit_f.values())
        for f in rising:
            if limit_f[f] == lowest:
                rate_f[f] = lowest
        rising = [f for f in rising if limit_f[f] > lowest]
    return rate_f


def _level(capacity: float, crossing: Sequence[int], rate_f: Sequence[float]) -> float:
    """The rate at which a link is full if everything that still rises on it rises together."""
    stopped = [rate_f[f] for f in crossing if not math.isnan(rate_f[f])]
    rising = len(crossing) - len(stopped)
    return max(capacity - math.fsum(stopped), 0.0) / rising if rising else math.inf


def balance(capacity_l: Sequence[float], flows: Sequence[Flow]) -> list[float]:
    """The rates at which every full link grants each flow the same bytes per second, or all it wants; any shares.

    One link after the other finds its level from what the others say, again and again until no rate changes by more
    than 1e-14. Raises LocalError after `ROUNDS_MAX` rounds.
    """
    crossing_l: list[list[tuple[int, float, bool]]] = [[] for _ in capacity_l]
    for f, flow in enumerate(flows):
        for way, data in ((flow.path, True), (flow.back, False)):
            for link, share in way:
                crossing_l[link].append((f, share, data))
    level_l, rate_f = [math.inf] * len(capacity_l), [math.inf] * len(flows)

    def limit(f: int, but: int = -1) -> float:
        ways = (*flows[f].path, *flows[f].back)
        return min([flows[f].cap, *(level_l[link] / share for link, share in ways if link != but)])

    for _ in range(ROUNDS_MAX):
        for link, crossings in enumerate(crossing_l):
            wanted = [share * (limit(f, but=link) if data else flows[f].booked) for f, share, data in crossings]
            level_l[link] = _water_level(capacity_l[link], wanted)
        before_f, rate_f = rate_f, [limit(f) for f in range(len(flows))]
        if all(abs(a - b) <= 1e-14 * b for a, b in zip(before_f, rate_f, strict=True)):
            return rate_f
    raise LocalError(f"rates still change after {ROUNDS_MAX} rounds")


def _water_level(capacity: float, wanted: Sequence[float]) -> float:
    """The level with sum min(level, wanted) = capacity, or inf if everything fits: serve the most modest first."""
    left, unserved = capacity, len(wanted)
    for want in sorted(wanted):
        if want * unserved > left:
            return left / unserved
        left, unserved = left - want, unserved - 1
    return math.inf
