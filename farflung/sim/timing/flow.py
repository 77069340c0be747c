"""The inner loop of `exchange.py`: all events of one gather. Everything here is compiled together, in one file.

A receiver serves the blocks that it lacks alike. So one number per receiver, the service that each block has had, says
when the next one is complete: the one that was available first. Rates are max-min fair, and hold until somebody wants
something, is done, or a line changes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
F = TypeVar("F", bound=Callable[..., Any])


def entry(kernel: F) -> F:
    """Compile on the first call; machine code is kept on disk where a folder can be written."""
    options = {"nogil": True, "error_model": "numpy"}
    try:
        return cast(F, numba.njit(cache=True, **options)(kernel))
    except RuntimeError:  # no folder is writable for the cache: compile in every process instead
        return cast(F, numba.njit(**options)(kernel))


@entry
def _level(cap_m: Floats, who: Integers, start: int, stop: int, total: float) -> float:
    """The level that `who[start:stop]` reach if they share `total` fairly: sum of min(cap, level) = total."""
    level = 0.0
    for _ in range(stop - start + 1):
        taken, above = 0.0, 0
        for c in range(start, stop):
            cap = cap_m[who[c]]
            if cap > level:
                above += 1
            else:
                taken += cap
        if above == 0:
            return level
        raised = (total - taken) / above
        if raised <= level:
            return level
        level = raised
    return level


@entry
def _rates(
    up_m: Floats,
    down_m: Floats,
    wants_m: NDArray[np.bool_],
    shared: tuple[Integers, Integers, Floats, Floats],
    rate_m: Floats,
    limit_m: NDArray[np.int8],
    give_m: Floats,
    everybody: Integers,
) -> bool:
    """Max-min fair download rates of those who want something; whether one's rate depends on the others'."""
    starts, crossed, leaves_g, enters_g = shared
    m = len(up_m)
    pool, wanting = 0.0, 0
    for j in range(m):
        give_m[j] = up_m[j]
        wanting += 1 if wants_m[j] else 0
    for g in range(len(leaves_g)):
        inside, leaving = 0, 0.0
        for c in range(starts[g], starts[g + 1]):
            inside += 1 if wants_m[crossed[c]] else 0
            leaving += give_m[crossed[c]]
        leaving *= 1.0 - inside / max(1, wanting)
        if leaving > leaves_g[g]:
            for c in range(starts[g], starts[g + 1]):
                give_m[crossed[c]] *= leaves_g[g] / leaving
    for j in range(m):
        pool += give_m[j]
    for j in range(m):
        others = pool - give_m[j]
        rate_m[j] = min(down_m[j], others) if wants_m[j] else 0.0
        limit_m[j] = 0 if not wants_m[j] else 1 if down_m[j] <= others else 2
    for g in range(len(enters_g)):
        entering, given = 0.0, 0.0
        for c in range(starts[g], starts[g + 1]):
            entering += rate_m[crossed[c]]
            given += give_m[crossed[c]]
        outside = 1.0 - given / pool if pool > 0 else 0.0
        if outside > 0 and outside * entering > enters_g[g]:
            level = _level(rate_m, crossed, starts[g], starts[g + 1], enters_g[g] / outside)
            for c in range(starts[g], starts[g + 1]):
                j = crossed[c]
                if rate_m[j] > level:
                    rate_m[j], limit_m[j] = level, 3
    total = 0.0
    for j in range(m):
        total += rate_m[j]
    contended = len(leaves_g) > 0
    if total > pool * (1 + 1e-12):
        contended = True
        level = _level(rate_m, everybody, 0, m, pool)
        for j in range(m):
            if rate_m[j] > level:
                rate_m[j], limit_m[j] = level, 2
    return contended


@entry
def _serve(
    j: int,
    span_and_rate: tuple[float, float, float, float],
    supply: tuple[Integers, Integers, NDArray[np.bool_]],
    state: tuple[Floats, Floats, Integers, Integers, Floats],
    received_m: Floats,
    held_km: Floats,
) -> None:
    """What receiver j receives at a rate from now until then, or until it is done: all blocks that it lacks alike."""
    payload_a, origin_k, last_a = supply
    begun_am, level_m, lacks_m, head_m, left_m = state
    now, until, rate, block = span_and_rate
    span, at = until - now, now
    served = min(rate * span, left_m[j])
    received_m[j] += served
    left_m[j] -= served
    done = left_m[j] <= 1e-9 * block
    while lacks_m[j] > 0:
        while origin_k[payload_a[head_m[j]]] == j:
            head_m[j] += 1
        need = max(0.0, begun_am[head_m[j], j] + block - level_m[j])
        wait = need * lacks_m[j] / rate
        if wait > span and not done:
            level_m[j] += span * rate / lacks_m[j]
            return
        at, span = min(at + wait, until), max(0.0, span - wait)
        level_m[j] += need
        if last_a[head_m[j]]:
            held_km[payload_a[head_m[j]], j] = at
        head_m[j] += 1
        lacks_m[j] -= 1
    left_m[j] = 0.0


@entry
def _until(now: float, events: tuple[float, float, float], rate_m: Floats, left_m: Floats, contended: bool) -> float:
    """When rates may change next; inf: never again. Whoever is done leaves its share to the others, if they contend."""
    until = min(events[0], events[1], events[2])
    last = now
    for j in range(len(rate_m)):
        if rate_m[j] > 0:
            ready = now + left_m[j] / rate_m[j]
            last = max(last, ready)
            if contended:
                until = min(until, ready)
    return last if until == np.inf and last > now else until


@entry
def flow(
    up_m: Floats,
    down_m: Floats,
    shared: tuple[Integers, Integers, Floats, Floats],
    supply: tuple[Floats, Integers, Integers, float, int],
    changes: tuple[Floats, Integers, Floats, Floats],
    end_s: float,
    held_km: Floats,
    received_m: Floats,
    times_e: Floats,
    limits_em: NDArray[np.int8],
) -> int:
    """Play all events; fills `held_km`, `received_m` and the log, returns the log's length; -1: it was too short."""
    supply_s, payload_a, origin_k, block, blocks = supply
    change_s, change_member, change_up, change_down = changes
    m, supplies = len(up_m), len(supply_s)
    begun_am = np.zeros((supplies, m))  # a receiver's service level when a block became available
    level_m, lacks_m, head_m, left_m = np.zeros(m), np.zeros(m, np.int64), np.zeros(m, np.int64), np.zeros(m)
    everybody = np.arange(m)
    state = (begun_am, level_m, lacks_m, head_m, left_m)
    wants_m, rate_m, limit_m = np.zeros(m, np.bool_), np.zeros(m), np.zeros(m, np.int8)
    seen_k, last_a = np.zeros(len(origin_k), np.int64), np.zeros(supplies, np.bool_)
    supplied, changed, used, stale, contended, give_m = 0, 0, 0, True, False, np.zeros(m)
    now = min(supply_s[0] if supplies else np.inf, change_s[0] if len(change_s) else np.inf)
    while now < end_s:
        if used == len(times_e):
            return -1
        while changed < len(change_s) and change_s[changed] <= now:
            up_m[change_member[changed]], down_m[change_member[changed]] = change_up[changed], change_down[changed]
            changed, stale = changed + 1, True
        while supplied < supplies and supply_s[supplied] <= now:
            payload = payload_a[supplied]
            seen_k[payload] += 1
            last_a[supplied] = seen_k[payload] == blocks
            for j in range(m):
                begun_am[supplied, j] = level_m[j]
                if j != origin_k[payload]:
                    lacks_m[j] += 1
                    left_m[j] += block
            supplied += 1
        for j in range(m):
            if wants_m[j] != (lacks_m[j] > 0 and down_m[j] > 0):
                wants_m[j] = not wants_m[j]
                stale = True
        if stale:
            contended = _rates(up_m, down_m, wants_m, shared, rate_m, limit_m, give_m, everybody)
            times_e[used] = now
            for j in range(m):
                limits_em[used, j] = limit_m[j]
            used, stale = used + 1, False
        next_supply_s = supply_s[supplied] if supplied < supplies else np.inf
        next_change_s = change_s[changed] if changed < len(change_s) else np.inf
        until = _until(now, (next_supply_s, next_change_s, end_s), rate_m, left_m, contended)
        if until == np.inf:
            break
        for j in range(m):
            if rate_m[j] > 0:
                _serve(j, (now, until, rate_m[j], block), (payload_a, origin_k, last_a), state, received_m, held_km)
        now = until
    return used
