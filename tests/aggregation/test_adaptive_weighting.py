"""Shares that grow with distance still sum to 1, and depend on no scale (arXiv:2412.07252, T8). Oracle: the formula."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from farflung.aggregation.adaptive_weighting import (
    AdaptiveWeighting,
    Distances,
    adapted,
    distance_between,
    parse_adaptive,
)
from farflung.aggregation.graphs import check_mixing, matrix_of, parse_graph, plan_round
from farflung.aggregation.mass import Mass, add_sums, mass_error
from farflung.aggregation.persistent import check_regular
from farflung.aggregation.push_sum import begin, mix_all
from farflung.protocol.errors import ConfigError, LocalError
from farflung.protocol.identity import PeerId

MEMBERS = tuple(PeerId(bytes(19) + bytes([i])) for i in range(16))
SPECS = ("complete", "exponential", "ring", "base(k=2)", "one-peer-exponential", "random-matching", "od-equidyn")


def distances_of(values):
    """Peer i at values[i]; None: not heard."""
    return Distances({MEMBERS[i]: value for i, value in enumerate(values) if value is not None})


def mixing_of(spec, n, tick=0):
    return plan_round(parse_graph(spec), n, 1, run_id=b"run", round_index=tick)[0]


def shares_of(values, spec="complete", rule=None, me=0):
    mixing = adapted(mixing_of(spec, len(values)), me, MEMBERS[: len(values)], distances_of(values), rule or PLAIN)
    return {share.to: share.share for share in mixing[me].sends}


PLAIN = AdaptiveWeighting()
LENGTHS = st.one_of(st.none(), st.floats(0, 1e12), st.just(0.0))


@given(
    st.sampled_from(SPECS),
    st.lists(LENGTHS, min_size=1, max_size=16),
    st.integers(0, 15),
    st.integers(0, 9),
    st.floats(0.001, 0.99),
    st.floats(0.001, 1000),
)
@settings(max_examples=200, deadline=None)
def test_columns_sum_to_one_exactly_and_everybody_keeps_a_share(spec, values, me, tick, v, k):
    n, rule = len(values), AdaptiveWeighting(v, k)
    base = mixing_of(spec, n, tick)
    mixing = adapted(base, me % n, MEMBERS[:n], distances_of(values), rule)
    check_mixing(mixing)
    column, plain = mixing[me % n], base[me % n]
    total = sum(map(Fraction, [column.keep, *(share.share for share in column.sends)]))
    assert total == 1
    assert all((share.share * 2**53).is_integer() for share in column.sends)
    assert [share.to for share in column.sends] == [share.to for share in plain.sends]
    assert column.keep >= plain.keep
    assert column.keep >= v * (1 - plain.keep)  # each share is at most 1 − v of the graph's
    assert mixing[: me % n] == base[: me % n]
    assert mixing[me % n + 1 :] == base[me % n + 1 :]


def test_shares_are_the_papers_with_distances_in_units_of_the_median():
    values, v, k = [None, 1.0, 2.0, 3.0, 8.0, 0.5], 0.2, 0.7
    got = shares_of(values, rule=AdaptiveWeighting(v, k))
    for to in range(1, 6):
        r = values[to] / 2.0
        expected = (1 - v) / (1 + v) * (1 + v - math.exp(-k * r**2)) / 6  # the degree counts the sender
        assert got[to] == pytest.approx(expected, rel=1e-14)
    assert got[5] < got[1] < got[2] < got[3] < got[4] < (1 - v) / 6


def test_equal_distances_are_uniform_and_so_is_not_knowing():
    same, unknown = shares_of([None, *[7.0] * 5]), shares_of([None] * 6)
    assert len(set(same.values())) == 1
    assert same == unknown == shares_of([None, *[0.0] * 5])
    assert same[1] == pytest.approx(0.9 / 1.1 * (1.1 - math.exp(-1)) / 6, rel=1e-14)


@given(st.lists(st.floats(0.01, 100), min_size=3, max_size=12), st.floats(1e-9, 1e9), st.integers(-60, 60))
@settings(max_examples=100, deadline=None)
def test_shares_do_not_depend_on_the_scale_of_distances(values, scale, power):
    plain = shares_of([None, *values])
    scaled = shares_of([None, *(scale * value for value in values)])
    assert list(scaled.values()) == pytest.approx(list(plain.values()), rel=1e-12)
    assert shares_of([None, *(2.0**power * value for value in values)]) == plain


def test_bare_distances_of_a_large_model_would_say_nothing():
    """T8 and the paper's own k = 1: at ‖z_i − z_j‖ of 10 or 100 the exponential is gone, and all shares are alike."""
    rule = AdaptiveWeighting()
    assert rule.factor(10.0) == rule.factor(100.0)
    shares = shares_of([None, 10.0, 50.0, 100.0])
    assert shares[3] > 2 * shares[1]


def test_a_newcomer_counts_as_usual_and_who_left_counts_no_more():
    got = shares_of([None, 1.0, 3.0, 3.0, None])
    assert got[4] == got[2] == got[3]
    distances = distances_of([None, 1.0, 3.0, 3.0, 1e9, 1e9, 1e9, 1e9])
    mixing = adapted(mixing_of("complete", 5), 0, MEMBERS[:5], distances, PLAIN)
    kept = adapted(mixing_of("complete", 5), 0, MEMBERS[:5], distances.among(MEMBERS[:5]), PLAIN)
    assert mixing == kept
    assert {share.to: share.share for share in mixing[0].sends} == shares_of([None, 1.0, 3.0, 3.0, 1e9])


def test_a_distance_among_zeros_is_the_farthest():
    got = shares_of([None, 0.0, 0.0, 0.0, 1e-300])
    assert got[4] == pytest.approx(0.9 / 5)
    assert got[1] == got[2] == got[3] < got[4]


def test_hearing_gives_a_new_value_and_lengths_are_lengths():
    first = Distances({})
    second = first.heard(MEMBERS[1], 2.0).heard(MEMBERS[1], 3.0)
    assert (first.by_peer, second.by_peer) == ({}, {MEMBERS[1]: 3.0})
    for distance in (-1.0, math.nan, math.inf):
        with pytest.raises(LocalError):
            first.heard(MEMBERS[1], distance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_distances_are_between_ratios_not_numerators(dtype):
    left_d, right_d = torch.randn(2, 100, generator=torch.Generator().manual_seed(1)).to(dtype)
    mine, theirs = Mass(4 * left_d, 4.0), Mass(0.5 * right_d, 0.5)
    assert distance_between(mine, theirs) == pytest.approx((left_d - right_d).double().norm().item(), rel=1e-5)
    assert distance_between(mine, Mass(2 * left_d, 2.0)) == 0.0
    assert distance_between(mine, Mass(torch.zeros_like(left_d), 0.0)) is None
    with pytest.raises(LocalError):
        distance_between(mine, Mass(torch.ones(3, dtype=dtype), 1.0))


def rounds_with(phi_nd, plan):
    zero_d = torch.zeros_like(phi_nd[0])
    return [begin(i, plan, phi_d, zero_d, [1.0 + i % 3]) for i, phi_d in enumerate(phi_nd)]


def adapted_plan(plan, phi_nd, rule):
    """Everybody's columns by the distances of their vectors, for all ticks of a round."""
    n = len(phi_nd)
    for i in range(n):
        apart = [None if i == j else (phi_nd[i] - phi_nd[j]).norm().item() for j in range(n)]
        plan = tuple(adapted(mixing, i, MEMBERS[:n], distances_of(apart), rule) for mixing in plan)
    return plan


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("seed", range(3))
def test_mass_is_conserved_and_members_agree_on_the_same_mean_by_adapted_shares(spec, seed):
    n, ticks = 5 + seed, 60 if spec in ("complete", "exponential") else 300
    phi_nd = torch.randn(n, 20, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    phi_nd[0] *= 30  # somebody is far off
    plan = plan_round(parse_graph(spec), n, ticks, run_id=b"run", round_index=0)
    plan = adapted_plan(plan, phi_nd, AdaptiveWeighting(0.3, 2.0))
    rounds = rounds_with(phi_nd, plan)
    before = add_sums(member.sums() for member in rounds)
    weights = torch.tensor([1.0 + i % 3 for i in range(n)], dtype=torch.float64)
    mix_all(rounds, fate=lambda tick, i, j: () if (tick + i * j + seed) % 5 == 0 else (0, tick % 3))
    assert mass_error(before, add_sums(member.sums() for member in rounds)) <= 1e-12
    z_nd = torch.stack([member.masses[0].ratio() for member in rounds])
    assert (z_nd - weights @ phi_nd / weights.sum()).abs().max() < 1e-3


def test_receivers_get_unequal_shares_so_persistent_mass_refuses_them():
    phi_nd = torch.randn(6, 9, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    (mixing,) = adapted_plan((mixing_of("complete", 6),), phi_nd, PLAIN)
    assert np.ptp(matrix_of(mixing).sum(1)) > 0.01
    with pytest.raises(ConfigError, match="regular"):
        check_regular(mixing)


def test_adaptive_weighting_is_refused_among_liars_with_the_reason():
    assert parse_adaptive("adaptive", liars=0) == AdaptiveWeighting(0.1, 1.0)
    assert parse_adaptive("adaptive(v=0.2,k=3)", liars=0) == AdaptiveWeighting(0.2, 3.0)
    with pytest.raises(ConfigError, match=r"furthest away.*liars = 2"):
        parse_adaptive("adaptive", liars=2)


@pytest.mark.parametrize("spec", ["adaptive(v=0)", "adaptive(v=1)", "adaptive(k=0)", "adaptive(k=1e9)", "uniform"])
def test_settings_that_cannot_work_are_refused(spec):
    with pytest.raises(ConfigError):
        parse_adaptive(spec, liars=0)


def test_a_mixing_of_other_members_is_refused():
    for me, members in ((0, MEMBERS[:4]), (5, MEMBERS[:5]), (-1, MEMBERS[:5])):
        with pytest.raises(LocalError):
            adapted(mixing_of("ring", 5), me, members, Distances({}), PLAIN)
