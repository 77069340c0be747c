"""The classical collectives, to compare with: star, ring and butterfly, among members that all wait for each other.

star: everybody sends to one member, who sends the result back to everybody. ring: reduce-scatter and all-gather around
a ring, 2 (n - 1) steps of 1 / n of the payload. butterfly: everybody reduces 1 / n of the payload for all (as hivemind
averages). Equal transfers that share a network max-min fairly end with the most loaded link: its flows have the lowest
rate from the first to the last byte. So ring and butterfly take max over links of bytes / capacity per phase. In a star
fast uplinks are done early; there the flows are played.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from farflung.sim.timing.exchange import Lines

Floats = NDArray[np.float64]


def star_hub(lines: Lines, members: NDArray[np.int64]) -> int:
    """The member best suited to be the centre: its line takes and gives everybody's bytes soonest."""
    with np.errstate(divide="ignore"):
        cost = 1 / lines.down_m[members] + 1 / lines.up_m[members]
    return int(members[int(np.argmin(cost))])


def collective_s(kind: str, lines: Lines, members: NDArray[np.int64], size_bytes: float, one_way_mm: Floats) -> float:
    """Seconds from the moment all have begun until all have the result. n = 1: 0. inf if a line is dead."""
    n = len(members)
    if n < 2:
        return 0.0
    up, down = lines.up_m[members], lines.down_m[members]
    if kind == "star":
        hub = star_hub(lines, members)
        leaves = members[members != hub]
        there = _drain(size_bytes, _behind(lines, leaves, hub, lines.up_m, lines.shared_up), float(lines.down_m[hub]))
        back = _drain(size_bytes, _behind(lines, leaves, hub, lines.down_m, lines.shared_down), float(lines.up_m[hub]))
        delay = float(one_way_mm[leaves, hub].max() + one_way_mm[hub, leaves].max())
        return there + back + delay
    between = one_way_mm[np.ix_(members, members)]
    if kind == "ring":
        part, steps = size_bytes / n, 2 * (n - 1)
        following = np.roll(np.arange(n), -1)
        with np.errstate(divide="ignore"):
            step_s = float(np.maximum(part / up, part / down[following]).max())
        for capacity, crossed in zip(np.minimum(lines.shared_up, lines.shared_down), lines.crossing, strict=True):
            behind = np.isin(members, crossed)
            step_s = max(step_s, part * int((behind & ~behind[following]).sum()) / capacity)
        return steps * (step_s + float(between[np.arange(n), following].max()))
    load = (n - 1) / n * size_bytes
    with np.errstate(divide="ignore"):
        phase_s = float(max((load / up).max(), (load / down).max()))
    for capacity, crossed in zip(np.minimum(lines.shared_up, lines.shared_down), lines.crossing, strict=True):
        inside = int(np.isin(members, crossed).sum())
        phase_s = max(phase_s, inside * (n - inside) * size_bytes / n / capacity)
    return 2 * (phase_s + float(between.max()))


def _behind(lines: Lines, leaves: NDArray[np.int64], hub: int, rate_m: Floats, shared_g: Floats) -> Floats:
    """The leaves' own limits, each shared line's capacity split among those that cross it."""
    limit = rate_m[leaves].copy()
    for capacity, crossed in zip(shared_g, lines.crossing, strict=True):
        here = np.isin(leaves, crossed)
        if hub not in crossed.tolist() and here.any():
            limit[here] = np.minimum(limit[here], capacity / here.sum())
    return limit


def _drain(size_bytes: float, limit_f: Floats, shared: float) -> float:
    """When flows of equal size, each with its own limit, are through one line that they share max-min fairly."""
    limit_f = np.sort(limit_f)
    if limit_f[0] <= 0 or shared <= 0:
        return float("inf")
    left_f, now_s = np.full(len(limit_f), float(size_bytes)), 0.0
    while len(left_f):
        rate_f = np.minimum(limit_f, _fair(limit_f, shared))
        wait_s = float((left_f / rate_f).min())
        now_s += wait_s
        left_f = left_f - rate_f * wait_s
        going = left_f > 1e-9 * size_bytes
        left_f, limit_f = left_f[going], limit_f[going]
    return now_s


def _fair(limit_f: Floats, shared: float) -> float:
    """The level at which min(limit, level) adds up to `shared`; limits ascend."""
    taken = np.concatenate([[0.0], np.cumsum(limit_f)[:-1]])
    level_f = (shared - taken) / np.arange(len(limit_f), 0, -1)
    above = level_f <= limit_f
    return float(level_f[int(np.argmax(above))]) if above.any() else float("inf")
