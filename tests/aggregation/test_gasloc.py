"""GASLoC is DiLoCo for the mean, and members agree at the root of the plain rate. Oracles: numpy, eigenvalues."""

import numpy as np
import pytest
import torch

from farflung.aggregation import pairs
from farflung.aggregation.gasloc import Gasloc, fitted, landed, parse_gasloc, proposed
from farflung.aggregation.graphs import parse_graph, plan_round
from farflung.aggregation.outer import parse_outer
from farflung.aggregation.push_sum import begin, mix_all
from farflung.aggregation.windows import WINDOW
from farflung.protocol.errors import ConfigError, LocalError

D = 9


def vectors(seed, n, d=D, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=torch.float64).to(dtype)


def exchange(y_nd, spec, round_index, ref_d):
    """Everybody's pull, by a tick of push-sum."""
    plan = plan_round(parse_graph(spec), len(y_nd), 1, run_id=b"run", round_index=round_index)
    rounds = [begin(i, plan, y_d, ref_d, [1.0]) for i, y_d in enumerate(y_nd)]
    mix_all(rounds)
    return [member.finish(y_d, ref_d) for member, y_d in zip(rounds, y_nd, strict=True)]


def step(theta_nd, before_nd, delta_nd, rule, spec, round_index=0):
    y_nd = [proposed(theta_d, delta_d, rule) for theta_d, delta_d in zip(theta_nd, delta_nd, strict=True)]
    pulls = exchange(y_nd, spec, round_index, ref_d=vectors(99, 1, dtype=theta_nd.dtype)[0])
    landings = [landed(*vectors_, rule) for vectors_ in zip(y_nd, before_nd, pulls, strict=True)]
    return torch.stack(landings), torch.stack(y_nd)


def laplacian(edges, n):
    """The paper's: 1 for every edge."""
    out_nn = np.zeros((n, n))
    for i, j in edges:
        out_nn[i, i] += 1
        out_nn[j, j] += 1
        out_nn[i, j] -= 1
        out_nn[j, i] -= 1
    return out_nn


@pytest.mark.parametrize(("spec", "share"), [("ring", 1 / 3), ("complete", 1 / 6)])
@pytest.mark.parametrize("gamma", [0.0, 0.4])
def test_a_step_is_the_papers_with_its_alpha_times_the_edges_share(spec, share, gamma):
    n, rule = 6, Gasloc(0.7, 0.9, gamma)
    edges = [(i, j) for i in range(n) for j in range(i) if spec == "complete" or i - j in (1, n - 1)]
    laplacian_nn, theta_nd = laplacian(edges, n), vectors(1, n)
    expected_nd, y_before_nd = theta_nd.numpy(), theta_nd.numpy()
    before_nd = theta_nd
    for round_index in range(6):
        delta_nd = vectors(10 + round_index, n)
        theta_nd, before_nd = step(theta_nd, before_nd, delta_nd, rule, spec, round_index)
        y_nd = expected_nd - 0.7 * delta_nd.numpy()
        expected_nd = y_nd - 0.9 * share * laplacian_nn @ y_nd + gamma * (y_nd - y_before_nd)
        y_before_nd = y_nd
        assert abs(theta_nd.numpy() - expected_nd).max() <= 1e-13


@pytest.mark.parametrize("n", [2, 5, 8])
def test_on_the_complete_graph_without_gamma_it_is_diloco_with_plain_steps(n):
    """The paper's α = 1 / n for the unweighted Laplacian is our α = 1. Every member; numbers of steps may differ."""
    outer, rule = parse_outer("sgd(lr=0.7)"), parse_gasloc("gasloc(lr=0.7)")
    theta_d = vectors(1, 1, dtype=torch.float32)[0]
    theta_nd = before_nd = theta_d.repeat(n, 1)
    goal_nd = vectors(2, n, dtype=torch.float32)
    for trained in range(1, 20):
        speed_n1 = 1 - 0.9 ** torch.arange(1, n + 1)[:, None]  # member i does i steps
        mean_d = (speed_n1 * (theta_d - goal_nd)).mean(0)
        theta_nd, before_nd = step(theta_nd, before_nd, speed_n1 * (theta_nd - goal_nd), rule, "complete")
        outer.step(theta_d, (), mean_d, theta_out_d=theta_d, state_out=(), trained=trained)
        assert (theta_nd - theta_d).abs().max() < 3e-6
    assert theta_d.abs().max() > 0.1


@pytest.mark.parametrize("spec", ["ring", "complete", "random-matching", "ou-equidyn(eta=0.5)", "base(k=1)"])
@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.8])
def test_the_mean_is_diloco_with_nesterovs_momentum_on_any_symmetric_graph(spec, gamma):
    n, rule = 7, Gasloc(0.4, 0.8, gamma)
    theta_nd = before_nd = vectors(1, n)
    mean_d, buffer_d = theta_nd.mean(0).numpy(), np.zeros(D)
    for round_index in range(25):
        delta_nd = vectors(50 + round_index, n)
        theta_nd, before_nd = step(theta_nd, before_nd, delta_nd, rule, spec, round_index)
        buffer_d = gamma * buffer_d + delta_nd.mean(0).numpy()
        mean_d = mean_d - 0.4 * (delta_nd.mean(0).numpy() + gamma * buffer_d)
        assert abs(theta_nd.mean(0).numpy() - mean_d).max() < 1e-12


def measured_rate(spec, n, rule, ticks):
    """By how much the disagreement of members who do not train shrinks per exchange, late."""
    theta_nd = before_nd = vectors(1, n) - vectors(1, n).mean(0)
    zero_nd, sizes = torch.zeros_like(theta_nd), []
    for round_index in range(ticks):
        theta_nd, before_nd = step_on_offsets(theta_nd, before_nd, zero_nd, rule, spec, round_index)
        sizes.append((theta_nd - theta_nd.mean(0)).norm().item())
    half = ticks // 2
    return (sizes[-1] / sizes[half - 1]) ** (1 / (ticks - half))


def step_on_offsets(theta_nd, before_nd, delta_nd, rule, spec, round_index):
    """`step` from a reference of zero: nothing is rounded to its size, so that rates can be seen for long."""
    y_nd = [proposed(theta_d, delta_d, rule) for theta_d, delta_d in zip(theta_nd, delta_nd, strict=True)]
    pulls = exchange(y_nd, spec, round_index, ref_d=torch.zeros(D, dtype=torch.float64))
    landings = [landed(*vectors_, rule) for vectors_ in zip(y_nd, before_nd, pulls, strict=True)]
    return torch.stack(landings), torch.stack(y_nd)


@pytest.mark.parametrize("n", [10, 12, 16])
def test_on_a_ring_members_agree_at_the_rate_of_the_root_of_chi(n):
    """Λ of a ring with thirds has the eigenvalues 2/3 (1 − cos 2πk/n), in closed form."""
    values = sorted(2 / 3 * (1 - np.cos(2 * np.pi * k / n)) for k in range(n))
    low, high = values[1], values[-1]
    chi, fit = high / low, fitted(parse_graph("ring"), n)
    assert fit.rate == pytest.approx((chi**0.5 - 1) / (chi**0.5 + 1), rel=1e-9)
    assert fit.plain_rate == pytest.approx((chi - 1) / (chi + 1), rel=1e-9)
    assert fit.gamma == pytest.approx(fit.rate**2, rel=1e-12)
    plain = measured_rate("ring", n, Gasloc(0.0, 2 / (low + high), 0.0), 80)
    fast = measured_rate("ring", n, Gasloc(0.0, fit.alpha, fit.gamma), 80)
    assert plain == pytest.approx(fit.plain_rate, rel=0.01)
    assert fast == pytest.approx(fit.rate, rel=0.05)
    assert np.log(fast) / np.log(plain) > 0.5 * chi**0.5  # exchanges saved: χ becomes √χ, up to a constant


def test_the_ring_of_sixteen_in_the_docstring():
    fit = fitted(parse_graph("ring"), 16)
    assert (round(fit.plain_rate, 2), round(fit.rate, 2)) == (0.93, 0.67)
    assert np.log(fit.rate) / np.log(fit.plain_rate) > 5


def test_on_the_complete_graph_one_exchange_is_enough():
    fit = fitted(parse_graph("complete"), 7)
    assert fit == pytest.approx((1.0, 0.0, 0.0, 0.0), abs=1e-12)


@pytest.mark.parametrize("spec", ["random-matching", "base(k=1)", "exponential", "od-equidyn", "one-peer-exponential"])
def test_settings_are_fitted_only_where_theory_holds(spec):
    with pytest.raises(ConfigError, match="static undirected"):
        fitted(parse_graph(spec), 6)
    with pytest.raises(ConfigError):
        fitted(parse_graph("ring"), 1)


def test_pairs_give_the_pull_too():
    """γ = 0, α = 1: both land on their mean, as NoLoCo's exchange does; γ > 0 keeps the pair's mean on Nesterov."""
    theta_nd, delta_nd, ref_d = vectors(1, 2), vectors(2, 2), vectors(3, 1)[0]
    for gamma in (0.0, 0.5):
        rule = Gasloc(0.7, 1.0, gamma)
        y_nd = [proposed(theta_d, delta_d, rule) for theta_d, delta_d in zip(theta_nd, delta_nd, strict=True)]
        rounds = [pairs.begin(y_d, ref_d, 1.0, pairs.Radius(1e9)) for y_d in y_nd]
        pairs.mix_pairs(rounds, plan_round(parse_graph("random-matching"), 2, 1, run_id=b"", round_index=0))
        pulls = [member.finish(y_d, ref_d) for member, y_d in zip(rounds, y_nd, strict=True)]
        out = [landed(*each, rule) for each in zip(y_nd, theta_nd, pulls, strict=True)]
        mean_d = theta_nd.mean(0) - 0.7 * (1 + gamma) * delta_nd.mean(0)
        assert ((out[0] + out[1]) / 2 - mean_d).abs().max() < 1e-14
        assert gamma or torch.allclose(out[0], out[1], rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inputs_stay_and_bytes_do_not_depend_on_threads(dtype):
    y_d, before_d, pull_d = vectors(1, 3, 2 * WINDOW + 5, dtype)
    copies, rule = [v.clone() for v in (y_d, before_d, pull_d)], Gasloc(0.7, 1.3, 0.4)
    ends = [(proposed(y_d, pull_d, rule, threads=k), landed(y_d, before_d, pull_d, rule, threads=k)) for k in (1, 3)]
    assert all(torch.equal(one, two) for one, two in zip(*ends, strict=True))
    assert all(torch.equal(one, two) for one, two in zip((y_d, before_d, pull_d), copies, strict=True))
    assert ends[0][1].dtype == dtype


def test_what_cannot_work_is_refused():
    for spec in ("gasloc", "gasloc(lr=1.0,gamma=1.0)", "gasloc(lr=1.0,alpha=9)", "gasloc(lr=1.0,alpha=0)", "sgd(lr=1)"):
        with pytest.raises(ConfigError):
            parse_gasloc(spec)
    for settings in ((-1.0, 1.0, 0.0), (1.0, 0.0, 0.0), (1.0, 1.0, float("nan")), (float("inf"), 1.0, 0.0)):
        with pytest.raises(ConfigError):
            Gasloc(*settings)
    with pytest.raises(LocalError):
        proposed(torch.ones(3), torch.ones(4), Gasloc())
    with pytest.raises(LocalError):
        landed(torch.ones(3), torch.ones(3), torch.ones(3).double(), Gasloc())
