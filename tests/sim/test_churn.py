"""Sessions: in order, apart, reproducible, and distributed as their closed forms say."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest

from farflung.protocol.errors import ConfigError
from farflung.sim.churn import GAP_MIN_S, SESSION_MIN_S, SESSIONS_MAX, Session, clipped, sessions
from farflung.sim.draw import Draw
from farflung.sim.scenario import Churn

HOUR_S = 3600.0
WEIBULL = Churn(session_s=Draw("weibull", (0.59, 2340.0)), gap_s=Draw("exponential", (1200.0,)), crash=0.25)
LOGNORMAL = Churn(kind="lognormal", session_s=Draw("lognormal", (600.0, 1.0)), gap_s=Draw.fixed(300))
MTBF = Churn(kind="exponential", session_s=Draw("exponential", (900.0,)), gap_s=Draw("exponential", (300.0,)))
DIURNAL = Churn(kind="diurnal", low=0.3, high=0.9, period_h=24.0)
KINDS = (WEIBULL, LOGNORMAL, MTBF, DIURNAL)


def drawn(churn: Churn, member: int = 0, *, hours: float = 2000.0, seed: int = 1, first_s: float = 0.0):
    return sessions(churn, seed=seed, group=0, member=member, horizon_s=hours * HOUR_S, first_s=first_s)


def online_share(churn: Churn, members: int, at_s: float, *, seed: int = 1) -> float:
    hours = at_s / HOUR_S + 1
    there = sum(
        any(start <= at_s < end for start, end, _ in drawn(churn, member, hours=hours, seed=seed))
        for member in range(members)
    )
    return there / members


@pytest.mark.parametrize("churn", KINDS, ids=lambda churn: churn.kind)
@pytest.mark.parametrize("first_s", [0.0, 5000.0])
def test_sessions_are_in_order_and_apart(churn, first_s):
    for member in range(20):
        found = drawn(churn, member, hours=300, first_s=first_s)
        for session in found:
            assert session.start_s >= first_s
            assert session.end_s - session.start_s >= SESSION_MIN_S - 1e-6
        for before, after in pairwise(found):
            assert after.start_s - before.end_s >= GAP_MIN_S - 1e-6


@pytest.mark.parametrize("churn", KINDS, ids=lambda churn: churn.kind)
def test_a_longer_horizon_only_appends(churn):
    for member in range(10):
        short, long = drawn(churn, member, hours=100), drawn(churn, member, hours=777)
        inside = [session for session in long if session.end_s < 100 * HOUR_S]
        assert short[: len(inside)] == tuple(inside)
        assert [s.start_s for s in short] == [s.start_s for s in long if s.start_s < 100 * HOUR_S]


@pytest.mark.parametrize("churn", KINDS, ids=lambda churn: churn.kind)
def test_members_and_seeds_draw_apart_and_again_the_same(churn):
    assert drawn(churn, 3) == drawn(churn, 3)
    assert drawn(churn, 3) != drawn(churn, 4)
    assert drawn(churn, 3) != drawn(churn, 3, seed=2)


def test_lengths_follow_the_weibull_distribution():
    found = [session for member in range(4) for session in drawn(WEIBULL, member)][:4000]
    lengths = np.sort([end - start for start, end, _ in found])
    lengths = lengths[lengths > 1.001 * SESSION_MIN_S]
    n = len(lengths)
    assert n > 3900
    below = 1 - math.exp(-((SESSION_MIN_S / 2340) ** 0.59))  # what was drawn out to the minimum is gone
    cdf = ((1 - np.exp(-((lengths / 2340) ** 0.59))) - below) / (1 - below)
    assert np.abs(cdf - (np.arange(n) + 0.5) / n).max() < 1.95 / math.sqrt(n)
    assert lengths.mean() == pytest.approx(2340 * math.gamma(1 + 1 / 0.59), rel=0.1)


@pytest.mark.parametrize(
    ("churn", "share"),
    [
        (MTBF, 900 / 1200),
        (LOGNORMAL, 600 * math.exp(0.5) / (600 * math.exp(0.5) + 300)),
        (WEIBULL, 2340 * math.gamma(1 + 1 / 0.59) / (2340 * math.gamma(1 + 1 / 0.59) + 1200)),
    ],
    ids=["exponential", "lognormal", "weibull"],
)
def test_the_share_online_is_that_of_the_means(churn, share):
    hours = 1500
    online = [
        sum(min(end, hours * HOUR_S) - start for start, end, _ in drawn(churn, member, hours=hours)) / (hours * HOUR_S)
        for member in range(12)
    ]
    assert np.mean(online) == pytest.approx(share, abs=0.012)


def test_departures_are_crashes_as_often_as_said():
    found = [session.crash for member in range(4) for session in drawn(WEIBULL, member)]
    assert np.mean(found) == pytest.approx(0.25, abs=1.95 * math.sqrt(0.25 * 0.75 / len(found)))


def test_sessions_do_not_depend_on_gaps_nor_on_how_members_leave():
    other = Churn(session_s=WEIBULL.session_s, gap_s=Draw.fixed(7), crash=1.0)
    lengths = [[end - start for start, end, _ in drawn(churn)[:50]] for churn in (WEIBULL, other)]
    assert lengths[0] == pytest.approx(lengths[1])


@pytest.mark.parametrize("hour", [0.0, 3.0, 6.0, 11.0, 18.0, 23.0, 24 * 9 + 6.0])
def test_a_share_follows_the_day(hour):
    target = 0.3 + 0.6 * (1 + math.sin(2 * math.pi * hour / 24)) / 2
    assert online_share(DIURNAL, 1000, hour * HOUR_S) == pytest.approx(target, abs=0.035)


def test_the_keenest_stay_and_the_least_keen_never_come():
    always = Churn(kind="diurnal", low=1.0, high=1.0)
    (session,) = drawn(always, 5, hours=100)
    assert session.start_s == 0.0
    assert session.end_s > 100 * HOUR_S
    assert drawn(Churn(kind="diurnal", low=0.0, high=0.0), 5) == ()
    # most members keep their hours: of many, those of the busiest hour are largely the same a day later
    noons = [
        {
            member
            for member in range(200)
            if any(start <= (24 * day + 6) * HOUR_S < end for start, end, _ in drawn(DIURNAL, member, hours=80))
        }
        for day in (0, 1)
    ]
    assert len(noons[0] & noons[1]) > 0.85 * len(noons[0])
    assert noons[0] != noons[1]


def test_clipping_cuts_what_lies_before():
    whole = (Session(0.0, 10.0, True), Session(20.0, 30.0, False), Session(40.0, math.inf, False))
    assert clipped(whole, 25.0) == (Session(25.0, 30.0, False), Session(40.0, math.inf, False))
    assert clipped(whole, 29.5) == (Session(40.0, math.inf, False),)


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(ConfigError, match=rf"{SESSIONS_MAX:,} times.*got 100000 h"):
        drawn(Churn(kind="exponential", session_s=Draw("exponential", (0.5,)), gap_s=Draw.fixed(0.5)), hours=100_000)
    with pytest.raises(ConfigError, match=r"got 'hosts\.csv'"):
        drawn(Churn(kind="trace", trace="hosts.csv"))
