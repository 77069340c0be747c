"""How fast push-sum agrees: exactly in one period, or by the second eigenvalue per tick (I-8, I-9).

Eigenvalues come from numpy; errors from the product's own rounds, splits and additions.
"""

import random
from fractions import Fraction

import numpy as np
import pytest
import torch
from mixing_runs import by_definition, by_push_sum, defined_step, gather, product_step, quadratics, run

from farflung.aggregation.graphs import column_of, matrix_of, parse_graph, plan_round
from farflung.aggregation.push_sum import begin, mix_all

D = 3
SIZES = (4, 5, 6, 7, 8, 9, 10, 11, 12, 15, 16, 17, 23, 24, 31, 32)
"""Members: at 3 and below both graphs are exact after one tick."""


def moduli(matrix_nn):
    return np.sort(abs(np.linalg.eigvals(matrix_nn)))[::-1]


def errors_of(plan, weights, watched):
    """‖z − mean‖ over all members after each of the `watched` ticks, in fp64."""
    n = len(plan[0])
    phi_nd = torch.randn(n, D, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    mean_d = torch.from_numpy(np.average(phi_nd.numpy(), axis=0, weights=weights))
    rounds = [begin(i, plan, phi_nd[i], torch.zeros_like(mean_d), [weights[i]]) for i in range(n)]
    errors = {}

    def watch(tick, rounds, under_way):
        if tick in watched:
            z_nd = torch.stack([member.masses[0].ratio() for member in rounds])
            errors[tick] = (z_nd - mean_d).norm().item()

    mix_all(rounds, watch=watch)
    return errors


def span_of(second, third):
    """From which tick to which to measure: the rest has died away, as far as it does, and fp64 still sees it."""
    settled = np.log(1e-3) / np.log(third / second)
    first = int(np.ceil(min(settled, np.log(1e-5) / np.log(second))))
    return first, first + max(4, min(60, int(np.log(1e-6) / np.log(second))))


def two_of(matrix_nn):
    """The second eigenvalue by modulus, and the next one that differs."""
    values = moduli(matrix_nn)
    assert values[0] == pytest.approx(1, abs=1e-12)
    return values[1], max(next((value for value in values[2:] if value < values[1] * (1 - 1e-9)), 0.0), 1e-12)


def static(spec, n):
    return plan_round(parse_graph(spec), n, 1, run_id=b"run", round_index=0)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("spec", ["ring", "exponential"])
def test_on_static_graphs_the_error_shrinks_by_the_second_eigenvalue_per_tick(spec, n):
    """I-9. Within 5 %, and so is its distance to 1, which says how many ticks agreement takes."""
    second, third = two_of(matrix_of(static(spec, n)[0]))
    assert 0.05 < second < 1
    first, last = span_of(second, third)
    errors = errors_of(static(spec, n) * (last + 1), [1.0] * n, {first, last})
    measured = (errors[last] / errors[first]) ** (1 / (last - first))
    assert measured == pytest.approx(second, rel=0.05)
    assert 1 - measured == pytest.approx(1 - second, rel=0.05)


def irregular(seed, n):
    """One column-stochastic matrix that is not row-stochastic: ratios agree, weights do not."""
    dice = random.Random(seed)
    columns = []
    for i in range(n):
        others = dice.sample([j for j in range(n) if j not in (i, (i + 1) % n)], 2)
        columns.append(column_of(i, [(j, Fraction(dice.randint(1, 9), 40)) for j in ((i + 1) % n, *others)]))
    return (tuple(columns),)


@pytest.mark.parametrize("seed", range(8))
def test_on_irregular_digraphs_with_unequal_weights_it_does_so_on_average(seed):
    """Complex eigenvalues make the error swing, and what swings is fitted: a straight line through its logarithm."""
    n = 6 + seed
    second, _ = two_of(matrix_of(irregular(seed, n)[0]))
    assert 0.05 < second < 1
    ticks = range(int(np.log(1e-3) / np.log(second)), int(np.log(1e-12) / np.log(second)))
    errors = errors_of(irregular(seed, n) * ticks.stop, [1.0 + i % 3 for i in range(n)], set(ticks))
    slope = np.polyfit(list(ticks), np.log([errors[tick] for tick in ticks]), 1)[0]
    assert np.exp(slope) == pytest.approx(second, rel=0.05)


@pytest.mark.parametrize("n", [5, 6, 7, 9, 12, 13])
def test_where_graphs_change_the_product_over_a_period_says_the_rate(n):
    """One-peer exponential graphs are not exact unless n is a power of two."""
    graph = parse_graph("one-peer-exponential")
    period = plan_round(graph, n, graph.period(n), run_id=b"run", round_index=0)
    second, third = two_of(np.linalg.multi_dot([matrix_of(mixing) for mixing in reversed(period)]))
    assert 0.01 < second < 1
    first, last = span_of(second, third)
    at = [(turn + 1) * len(period) - 1 for turn in (first, last)]
    errors = errors_of(period * (last + 1), [1.0] * n, set(at))
    assert (errors[at[1]] / errors[at[0]]) ** (1 / (last - first)) == pytest.approx(second, rel=0.05)


# K = period: the exact mean, and the run of gather mode


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("n", range(2, 18))
def test_a_period_of_base_is_the_exact_mean_whatever_the_weights(n, k):
    graph, weights = parse_graph(f"base(k={k})"), [float(i % 4) + 0.125 * (i == 0) for i in range(n)]
    for round_index in range(3):
        plan = plan_round(graph, n, graph.period(n), run_id=b"run", round_index=round_index)
        assert errors_of(plan, weights, {len(plan) - 1})[len(plan) - 1] <= 1e-13


@pytest.mark.parametrize("k", [2, 3])  # k = 1: test_push_sum.py
@pytest.mark.parametrize("n", [2, 3, 5, 6, 7, 9, 11, 14, 17])
def test_a_whole_run_on_base_is_the_run_of_the_exact_mean(n, k):
    """I-8 in fp64: nesterov, 20 rounds, unequal weights, an offset from a reference."""
    weights, ref_d = [float(1 + i % 3) for i in range(n)], torch.linspace(-1, 1, 8, dtype=torch.float64)
    train, starts = quadratics(n, n), [torch.zeros(8, dtype=torch.float64)] * n
    step = defined_step("nesterov", 0.6, 0.9)
    theta_nd = run(by_push_sum(weights, f"base(k={k})", ref_d), step, train, starts, 20)
    oracle_nd = run(by_definition(weights), step, train, starts, 20)
    assert (theta_nd - oracle_nd).abs().max() <= 1e-12
    assert oracle_nd.abs().max() > 0.05


@pytest.mark.parametrize("n", [2, 3, 5, 6, 7, 11, 16, 17])
def test_with_the_products_rule_and_outer_step_gather_and_push_sum_part_by_fp32_roundings(n):
    """`mean` and `nesterov` of the product in fp32, 30 rounds; both are as near to the fp64 run."""
    weights, spec = [float(1 + i % 3) for i in range(n)], "nesterov(lr=0.6,momentum=0.9)"
    train, starts = quadratics(n, n), [torch.zeros(8)] * n
    gather_nd = run(gather(weights), product_step(spec), train, starts, 30)
    mixed_nd = run(by_push_sum(weights), product_step(spec), train, starts, 30)
    wide = [start_d.double() for start_d in starts]
    oracle_nd = run(by_definition(weights), defined_step("nesterov", 0.6, 0.9), train, wide, 30)
    for theta_nd in (gather_nd, mixed_nd):
        assert (theta_nd.double() - oracle_nd).abs().max() <= 32 * 2.0**-24 * oracle_nd.abs().max()
    assert (gather_nd == gather_nd[0]).all()
