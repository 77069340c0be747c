"""How a member comes and goes: its sessions, drawn once, before the run."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from farflung.protocol.errors import ConfigError
from farflung.sim.draw import Draw
from farflung.sim.rng import stream
from farflung.sim.scenario import Churn

SESSION_MIN_S = 1.0
"""A shorter visit is drawn out to this: below, nothing that a member does could finish."""

GAP_MIN_S = 1.0
"""Between two sessions of one member: long enough that everything of the first is over."""

SESSIONS_MAX = 100_000
"""Of one member: 1,000 hours with a session every half minute. Beyond, somebody wrote minutes instead of seconds."""

OFF_ROUTINE = 0.2
"""diurnal: on this share of its days a member keeps other hours than its own. About a fifth of 230,000 volunteer hosts
came and went like independent random variables, the others did not (Javadi et al., IEEE TPDS 22(11), 2011)."""

GOLDEN = (math.sqrt(5) - 1) / 2
"""Multiples of it, modulo 1, lie evenly however many there are (Weyl's sequence)."""

Floats = NDArray[np.float64]


class Session(NamedTuple):
    """A member is there from `start_s` until `end_s` (infinity: for good), and leaves with or without a word."""

    start_s: float
    end_s: float
    crash: bool


ALWAYS = (Session(0.0, math.inf, False),)
"""The founder, and everybody without churn who is there from the start."""


def sessions(
    churn: Churn, *, seed: int, group: int, member: int, horizon_s: float, first_s: float = 0.0
) -> tuple[Session, ...]:
    """The sessions of member `member` (its position in its group) that begin before `horizon_s`, in order.

    weibull, lognormal, exponential: the first session begins at `first_s`; lengths and gaps are drawn independently
    from their own streams (a renewal process; the share online tends to mean session / (mean session + mean gap)). Real
    sessions are Weibull or lognormal with a long tail, not exponential (Stutzbach & Rejaie, IMC 2006); exponential with
    a fixed or exponential gap is the MTBF and repair of data centres. That consecutive sessions of one host resemble
    each other is not modelled. diurnal: see `_diurnal`; what lies before `first_s` is cut off.

    Sessions do not depend on the horizon or on other members: a longer one only appends. Sessions and gaps last at
    least SESSION_MIN_S and GAP_MIN_S. A last session may end beyond the horizon. Costs about 2 us per session.
    Raises ConfigError for more than SESSIONS_MAX, and for a trace: `traces.read_trace` reads those.
    """
    names = ("churn", group, member)
    if churn.kind == "trace":
        raise ConfigError(f"sessions of a trace are read from its file, not drawn, got {churn.trace!r}")
    if churn.kind == "diurnal":
        return _diurnal(churn, seed, names, horizon_s, first_s)
    if churn.session_s is None or churn.gap_s is None:
        raise ConfigError(f"churn of kind {churn.kind!r} needs session_s and gap_s, got {churn.session_s}")
    return _renewal(churn.session_s, churn.gap_s, churn.crash, seed, names, horizon_s, first_s)


def clipped(all_sessions: Iterable[Session], first_s: float) -> tuple[Session, ...]:
    """The sessions without what lies before `first_s`; what is left of one must last SESSION_MIN_S."""
    return tuple(
        session._replace(start_s=max(session.start_s, first_s))
        for session in all_sessions
        if session.end_s - max(session.start_s, first_s) >= SESSION_MIN_S
    )


def _renewal(
    session: Draw, gap: Draw, crash: float, seed: int, names: tuple[str | int, ...], horizon_s: float, first_s: float
) -> tuple[Session, ...]:
    lengths, gaps = stream(seed, *names, "session"), stream(seed, *names, "gap")
    on = off = np.empty(0)
    while not len(on) or first_s + float(on.sum() + off.sum()) < horizon_s:
        more = max(16, len(on))
        on = np.concatenate([on, np.maximum(session.sample_many(lengths, more), SESSION_MIN_S)])
        off = np.concatenate([off, np.maximum(gap.sample_many(gaps, more), GAP_MIN_S)])
        if len(on) > 2 * SESSIONS_MAX:
            break
    edges = first_s + np.cumsum(np.stack([on, off], 1).reshape(-1))
    start = np.concatenate([[first_s], edges[1:-1:2]])
    count = int(np.searchsorted(start, horizon_s))
    _check_count(count, horizon_s)
    crashes = stream(seed, *names, "crash").random(count) < crash
    return _sessions(start[:count], edges[0 : 2 * count : 2], crashes)


def _diurnal(
    churn: Churn, seed: int, names: tuple[str | int, ...], horizon_s: float, first_s: float
) -> tuple[Session, ...]:
    """Hours that follow the day: of many members, a share of low + (high - low) (1 + sin(2 pi t / day)) / 2 is online.

    Each member has a keenness u in (0, 1), evenly spread over the group, and is online while that share is above u: the
    keenest `low` of them always, the least keen never, the others around the busiest hour. On OFF_ROUTINE of its days
    (from one quietest hour to the next) a member has another u, drawn for that day: the share online stays the same,
    the company changes. The day is the same for everybody: regions have no time zones here.
    """
    period_s = churn.period_h * 3600
    days = int(horizon_s / period_s) + 2  # the first began a quarter before 0, the last must reach the horizon
    _check_count(days, horizon_s)
    kind, group, member = names
    evenly = float(stream(seed, kind, group, "keenness").random()) + int(member) * GOLDEN
    odd = stream(seed, *names, "routine").random(days) < OFF_ROUTINE
    keenness = np.where(odd, stream(seed, *names, "day").random(days), evenly % 1.0)
    crashes = stream(seed, *names, "crash").random(days) < churn.crash
    found: list[Session] = []
    for day, (u, crash) in enumerate(zip(keenness.tolist(), crashes.tolist(), strict=True)):
        rise = _rise(u, churn.low, churn.high)
        if rise is None:
            continue
        begin_s, end_s = (day - 0.25 + rise) * period_s, (day + 0.75 - rise) * period_s
        if found and begin_s - found[-1].end_s < GAP_MIN_S:
            found[-1] = Session(found[-1].start_s, end_s, crash)
        else:
            found.append(Session(begin_s, end_s, crash))
    return tuple(session for session in clipped(found, max(first_s, 0.0)) if session.start_s < horizon_s)


def _rise(u: float, low: float, high: float) -> float | None:
    """How far into its day (0..0.5, from the quietest hour) a member of keenness u appears; None: not at all."""
    if u < low:
        return 0.0
    if u >= high:
        return None
    return math.acos(1 - 2 * (u - low) / (high - low)) / (2 * math.pi)


def _sessions(start_s: Floats, end_s: Floats, crash: NDArray[np.bool_]) -> tuple[Session, ...]:
    return tuple(map(Session, start_s.tolist(), end_s.tolist(), crash.tolist()))


def _check_count(count: int, horizon_s: float) -> None:
    if count > SESSIONS_MAX:
        raise ConfigError(
            f"a member would come and go more than {SESSIONS_MAX:,} times: lengths are in seconds; make sessions and "
            f"gaps longer, or the run's limit_h shorter, got {horizon_s / 3600:g} h"
        )
