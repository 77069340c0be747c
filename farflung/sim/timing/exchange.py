"""How long a gather takes: everybody needs everybody's payload, and whoever holds a chunk passes it on. As a fluid.

One file of F bytes takes at least max(F / u_source, F / d_min, n F / sum u), and a fluid reaches that (Kumar and Ross,
"Peer-assisted file distribution: the minimum distribution time", HotWeb 2006). All to all, with sources that start at
different times, the same three limits hold at every instant:

* a payload is nowhere sooner than its origin has sent it once, at the origin's uplink (`sent_s`);
* a receiver takes what is there at its downlink at most;
* all receivers together take what all uplinks together give, except that nobody gives to itself: the uplinks are one
  pool, shared max-min fairly. Shared lines cap what crosses them.

A receiver serves all payloads that it lacks alike (rarest first), so equal sizes complete in the order in which they
were announced. A payload becomes available in `blocks` steps while its origin sends it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from farflung.sim.timing.flow import flow

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

EFFICIENCY = 0.9
"""Share of what plain TCP would carry that real nodes' exchange reaches: 84 to 86 % of a 20 Mbit/s line, of which one
stream gets 96 % and acknowledgements of the other direction take 2 % (`benchmarks/narrow_links.py`): 0.85 / 0.94."""

FLIGHTS = 8
"""One-way delays between an announcement and the last relayed chunk, besides the bytes: the announcement, the digest
list and back, the first chunks and back, news of a relay's chunk, asking for it and back."""

BLOCKS = ((0.5, 4), (0.2, 2), (0.0, 1))
"""Steps in which a payload becomes available, by the share of the exchange that the slowest origin's own sending takes.
Where the pool is what limits, a finer picture of each origin changes nothing."""

IDLE, DOWNLOAD, UPLOAD, SHARED = 0, 1, 2, 3
"""What limits a receiver: nothing to receive, its own line, the others' uplinks, a shared line."""


class Change(NamedTuple):
    """From `at_s` on a member's line has these capacities (payload bytes per second)."""

    at_s: float
    member: int
    up: float
    down: float


@dataclass(frozen=True)
class Lines:
    """What m members' lines carry, in payload bytes per second; shared line g is crossed by `crossing[g]`."""

    up_m: Floats
    down_m: Floats
    shared_up: Floats
    shared_down: Floats
    crossing: tuple[Integers, ...]


@dataclass(frozen=True)
class Gathered:
    """One exchange of k payloads among m members."""

    held_km: Floats
    """When each member has received each payload, latency not counted; its own: when announced; inf: never."""

    sent_k: Floats
    """When each origin had sent its payload once."""

    received_m: Floats
    """Bytes."""

    times_e: Floats
    """Starts of the stretches during which all rates are constant."""

    limits_em: NDArray[np.int8]
    """What limited each member in each of them."""

    def limited(self, member: int, start_s: float, end_s: float) -> dict[int, float]:
        """Seconds of [start_s, end_s) by what limited a member; what is not covered is IDLE. Adds up to the length."""
        seconds = {IDLE: 0.0, DOWNLOAD: 0.0, UPLOAD: 0.0, SHARED: 0.0}
        if len(self.times_e) == 0 or end_s <= start_s:
            return seconds | {IDLE: max(0.0, end_s - start_s)}
        edges = np.clip(np.append(self.times_e, np.inf), start_s, end_s)
        lengths = np.diff(edges)
        for limit in (DOWNLOAD, UPLOAD, SHARED):
            seconds[limit] = float(lengths[self.limits_em[:, member] == limit].sum())
        seconds[IDLE] = max(0.0, end_s - start_s - seconds[DOWNLOAD] - seconds[UPLOAD] - seconds[SHARED])
        return seconds


def gather(
    lines: Lines,
    announced_k: Floats,
    origin_k: Integers,
    size_bytes: float,
    changes: Sequence[Change] = (),
    *,
    end_s: float = np.inf,
) -> Gathered:
    """Exchange payloads of `size_bytes`, announced at the times `announced_k` (finite, any order), until `end_s`.

    Costs O(events x m) with about (k x blocks + m) events; keeps k x blocks x m numbers.
    """
    k, m = len(announced_k), len(lines.up_m)
    blocks = _blocks(lines.up_m, origin_k)
    available, sent_k = _availability(lines, announced_k, origin_k, size_bytes / blocks, blocks, changes)
    times, payloads = available.ravel(), np.repeat(np.arange(k), blocks)
    order = np.argsort(times, kind="stable")
    order = order[np.isfinite(times[order])]
    ordered = sorted(changes)
    starts = np.cumsum([0, *(len(crossed) for crossed in lines.crossing)]).astype(np.int64)
    crossed = np.concatenate([*lines.crossing, np.empty(0, np.int64)]).astype(np.int64)
    supply = (times[order], payloads[order], origin_k.astype(np.int64), size_bytes / blocks, blocks)
    change = (
        np.array([item.at_s for item in ordered], np.float64),
        np.array([item.member for item in ordered], np.int64),
        np.array([item.up for item in ordered], np.float64),
        np.array([item.down for item in ordered], np.float64),
    )
    room, used = 2 * (len(order) + len(ordered) + m) + 16, -1
    while used < 0:
        held_km, received_m = np.full((k, m), np.inf), np.zeros(m)
        times_e, limits_em = np.empty(room), np.zeros((room, m), np.int8)
        lines_m = (lines.up_m.copy(), lines.down_m.copy())
        shared = (starts, crossed, lines.shared_up, lines.shared_down)
        used = flow(*lines_m, shared, supply, change, end_s, held_km, received_m, times_e, limits_em)
        room *= 2
    held_km[np.arange(k), origin_k] = announced_k
    mine = np.zeros((k, m), bool)
    mine[np.arange(k), origin_k] = True
    np.maximum(held_km, sent_k[:, None], out=held_km, where=~mine)
    return Gathered(held_km, sent_k, received_m, times_e[:used], limits_em[:used])


def _blocks(up_m: Floats, origin_k: Integers) -> int:
    slowest, pool = float(up_m[origin_k].min(initial=np.inf)), float(up_m.sum())
    if not 0 < slowest < np.inf:
        return 1
    lasting = max(1 / slowest, len(origin_k) * (len(up_m) - 1) / pool)
    return next(blocks for share, blocks in BLOCKS if 1 / slowest >= share * lasting)


def _availability(
    lines: Lines, announced_k: Floats, origin_k: Integers, block_bytes: float, blocks: int, changes: Sequence[Change]
) -> tuple[Floats, Floats]:
    """When the origin begins to send each block, and when it has sent the last one."""
    up_m = lines.up_m.copy()
    for capacity, crossed in zip(lines.shared_up, lines.crossing, strict=True):
        if len(crossed) < len(up_m):
            up_m[crossed] = np.minimum(up_m[crossed], capacity)
    with np.errstate(divide="ignore"):
        per_block_k = block_bytes / up_m[origin_k]
    edges = announced_k[:, None] + np.arange(blocks + 1) * np.where(np.isinf(per_block_k), 0.0, per_block_k)[:, None]
    edges[np.isinf(per_block_k), 1:] = np.inf
    by_member: dict[int, list[Change]] = {}
    for change in sorted(changes):
        by_member.setdefault(change.member, []).append(change)
    for k, origin in enumerate(origin_k.tolist()):
        if origin in by_member:
            steps = [(-np.inf, float(up_m[origin])), *((item.at_s, item.up) for item in by_member[origin])]
            edges[k] = [_when_sent(steps, float(announced_k[k]), block_bytes * b) for b in range(blocks + 1)]
    return edges[:, :-1], edges[:, -1]


def _when_sent(steps: Sequence[tuple[float, float]], start_s: float, size_bytes: float) -> float:
    """When `size_bytes` from `start_s` on are through a line with rate steps (time, bytes/s)."""
    now_s, left = start_s, size_bytes
    for (_, rate), (until_s, _) in zip(steps, [*steps[1:], (np.inf, 0.0)], strict=True):
        if until_s <= now_s:
            continue
        if rate > 0 and left <= rate * (until_s - now_s):
            return now_s + left / rate
        left -= rate * (until_s - now_s) if rate > 0 else 0.0
        now_s = until_s
    return now_s if left <= 0 else np.inf
