"""What holds in every tick of any push-sum round: any digraph, weights and weather (I-1 to I-4, I-6, I-7).

Weather comes with and without a ledger: without one, mass is lost or made, but s and w always together.
"""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from farflung.aggregation.graphs import column_of, parse_graph, plan_round
from farflung.aggregation.push_sum import begin, mix_all

D = 5


@st.composite
def schedules(draw, n_max=6, ticks_max=8):
    """A plan of column-stochastic matrices and a fate for every message of it."""
    n, ticks = draw(st.integers(1, n_max)), draw(st.integers(1, ticks_max))
    dice = draw(st.randoms(use_true_random=False))
    plan, fates = [], {}
    for tick in range(ticks):
        columns = []
        for i in range(n):
            receivers = dice.sample([j for j in range(n) if j != i], dice.randint(0, min(3, n - 1)))
            columns.append(column_of(i, [(j, Fraction(dice.randint(1, 9), 40)) for j in receivers]))
            for j in receivers:
                late = tuple(dice.randint(0, 4) for _ in range(dice.randint(0, 3)))
                fates[tick, i, j] = dice.choice([None, late, late, (0,), (0,)])
        plan.append(tuple(columns))
    return tuple(plan), lambda tick, sender, receiver: fates[tick, sender, receiver]


def offsets(seed, n):
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def members(plan, phi_nd, weights):
    zero_d = torch.zeros(D, dtype=torch.float64)
    return [
        begin(i, plan, phi_d, zero_d, [weight]) for i, (phi_d, weight) in enumerate(zip(phi_nd, weights, strict=False))
    ]


WEIGHTS = st.lists(st.sampled_from([0.0, 1e-3, 1.0, 3.0, 1e6]), min_size=6, max_size=6)


@given(schedules(), WEIGHTS, st.integers(0, 10**6))
@settings(max_examples=150, deadline=None)
def test_weights_and_every_coordinate_are_conserved_in_every_tick(schedule, weights, seed):
    """I-1 and I-2, coordinate by coordinate: what is held and what is under way, each once."""
    plan, fate = schedule
    rounds = members(plan, offsets(seed, len(plan[0])), weights)
    first = [member.masses[0] for member in rounds]
    start_d, size_d = sum(mass.numerator_d.clone() for mass in first), sum(mass.numerator_d.abs() for mass in first)
    weight = sum(mass.weight for mass in first)

    def watch(tick, rounds, under_way):
        masses = [*(member.masses[0] for member in rounds), *under_way]
        assert ((sum(mass.numerator_d for mass in masses) - start_d).abs() <= 1e-14 * size_d).all()
        assert abs(sum(mass.weight for mass in masses) - weight) <= 1e-14 * weight

    mix_all(rounds, fate=fate, watch=watch)


@given(schedules(), WEIGHTS, st.integers(0, 10**6), st.booleans())
@settings(max_examples=150, deadline=None)
def test_weights_stay_positive_and_ratios_between_the_inputs_in_every_tick(schedule, weights, seed, ledger):
    """I-3 and I-6. Who began with weight keeps some for ever, as everybody keeps a share."""
    plan, fate = schedule
    phi_nd = offsets(seed, len(plan[0]))
    rounds = members(plan, phi_nd, weights)
    brought_nd = torch.stack([phi_d for phi_d, weight in zip(phi_nd, weights, strict=False) if weight] or [phi_nd[0]])
    low_d, high_d, slack = brought_nd.amin(0), brought_nd.amax(0), 1e-13

    def watch(tick, rounds, under_way):
        for member, began in zip(rounds, weights, strict=False):
            (mass,) = member.masses
            assert mass.weight > 0 or (began == 0 and not mass.numerator_d.any())
            if mass.weight:
                assert ((low_d - slack <= mass.ratio()) & (mass.ratio() <= high_d + slack)).all()

    mix_all(rounds, fate=fate, ledger=ledger, watch=watch)


@given(schedules(), WEIGHTS, st.floats(-1e6, 1e6), st.booleans())
@settings(max_examples=150, deadline=None)
def test_a_constant_stays_the_constant_in_every_tick(schedule, weights, value, ledger):
    """I-4, from the first tick on, but for what fp64 cannot hold."""
    plan, fate = schedule
    rounds = members(plan, torch.full((len(plan[0]), D), value, dtype=torch.float64), weights)

    def watch(tick, rounds, under_way):
        for (mass,) in (member.masses for member in rounds):
            assert not mass.weight or ((mass.ratio() - value).abs() <= 1e-14 * abs(value) + 1e-300).all()

    mix_all(rounds, fate=fate, ledger=ledger, watch=watch)


def gossip(plan, x_nd):
    """Doubly stochastic gossip without any weight: shares of x leave one after the other, and are added by sender."""
    x_nd = x_nd.copy()
    for mixing in plan:
        sent = {}
        for i, column in enumerate(mixing):
            whole_d = x_nd[i].copy()
            for to, share in column.sends:
                rest_d = x_nd[i] - (share * whole_d.astype(np.float64)).astype(x_nd.dtype)
                sent[i, to], x_nd[i] = x_nd[i] - rest_d, rest_d
        for (_, to), part_d in sent.items():
            x_nd[to] += part_d
    return x_nd


SPECS = (
    "base(k=1)",
    "base(k=3)",
    "exponential",
    "one-peer-exponential",
    "ring",
    "complete",
    "od-equidyn",
    "ou-equidyn",
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("n", [2, 3, 6, 8, 13])
def test_with_equal_weights_push_sum_is_gossip_bit_for_bit(spec, n, dtype):
    """I-7: all graphs here are regular; z is the gossiped vector itself, divided by 1."""
    plan = plan_round(parse_graph(spec), n, 6, run_id=b"run", round_index=1)
    phi_nd, zero_d = offsets(n, n).to(dtype), torch.zeros(D, dtype=dtype)
    rounds = [begin(i, plan, phi_d, zero_d, [1.0]) for i, phi_d in enumerate(phi_nd)]
    mix_all(rounds)
    assert {member.masses[0].weight for member in rounds} == {1.0}
    found_nd = torch.stack([member.masses[0].ratio() for member in rounds]).numpy()
    assert found_nd.tobytes() == gossip(plan, phi_nd.numpy()).tobytes()
