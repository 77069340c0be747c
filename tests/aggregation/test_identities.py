"""What runs are equal to: data parallel training, the classics, one member alone (I-11, I-12, I-13, I-16).

Oracles are written from the papers in fp64, or are torch's own optimisers on real modules.
"""

import functools

import numpy as np
import pytest
import torch
from mixing_runs import (
    by_pairs,
    by_push_sum,
    defined_step,
    gather,
    product_step,
    quadratics,
    run,
)

SIZES = (3, 4, 2, 6, 5)
"""Examples per member and batch: weights of the mean."""


# I-11: one local step, a full average and an outer rate of 1 are data parallel training


def network(dtype=torch.float64):
    with torch.random.fork_rng():
        torch.manual_seed(7)
        layers = torch.nn.Linear(6, 9), torch.nn.Tanh(), torch.nn.Linear(9, 4)
    return torch.nn.Sequential(*layers).to(dtype)


def batch(i, round_index):
    """Inputs and labels of member i in one round."""
    generator = torch.Generator().manual_seed(1000 * round_index + i)
    input_bi = torch.randn(SIZES[i], 6, generator=generator, dtype=torch.float64)
    return input_bi, torch.randint(0, 4, (SIZES[i],), generator=generator)


def loss_of(model, members, round_index):
    """The mean over all examples of these members."""
    inputs, labels = zip(*(batch(i, round_index) for i in members), strict=True)
    dtype = next(model.parameters()).dtype
    return torch.nn.functional.cross_entropy(model(torch.cat(inputs).to(dtype)), torch.cat(labels))


def flat(model):
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def backward(model, members, round_index, clip):
    model.zero_grad()
    loss_of(model, members, round_index).backward()
    if clip:
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)


def data_parallel(make_optimizer, rounds, clip=None):
    """One model that sees everybody's examples in every step: what all-reduced gradients give."""
    model = network()
    optimizer = make_optimizer(model.parameters())
    for round_index in range(rounds):
        backward(model, range(len(SIZES)), round_index, clip)
        optimizer.step()
    return flat(model)


def swarm(make_optimizer, mix, step, rounds, dtype=torch.float64, clip=None):
    """Members with modules and inner optimisers of their own, whose state stays with them."""
    models = [network(dtype) for _ in SIZES]
    optimizers = [make_optimizer(model.parameters()) for model in models]

    def train(i, theta_d, round_index):
        torch.nn.utils.vector_to_parameters(theta_d, models[i].parameters())
        backward(models[i], [i], round_index, clip)
        optimizers[i].step()
        return flat(models[i])

    return run(mix, step, train, [flat(model) for model in models], rounds)


SGD = functools.partial(torch.optim.SGD, lr=0.3)
MOMENTUM = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01)
NESTEROV = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True)
INNERS = {"sgd": SGD, "momentum": MOMENTUM, "nesterov": NESTEROV}


def apart(theta_nd, oracle_d):
    """By how much the worst member is off, relative to how far training went."""
    return ((theta_nd.double() - oracle_d).norm(dim=1).max() / (oracle_d - flat(network())).norm()).item()


@pytest.mark.parametrize("inner", INNERS)
@pytest.mark.parametrize("spec", ["base(k=1)", "base(k=2)", "complete"])
def test_one_local_step_and_a_full_push_sum_average_are_data_parallel_training(inner, spec):
    """I-11, weighted: members with batches of 3, 4, 2, 6 and 5 are one batch of 20."""
    ref_d = torch.linspace(-0.3, 0.3, len(flat(network())), dtype=torch.float64)
    theta_nd = swarm(INNERS[inner], by_push_sum(SIZES, spec, ref_d), defined_step("sgd", 1.0), 25)
    assert apart(theta_nd, data_parallel(INNERS[inner], 25)) <= 2e-14


@pytest.mark.parametrize("inner", INNERS)
@pytest.mark.parametrize("mix", [gather(SIZES), by_push_sum(SIZES)], ids=["gather", "push-sum"])
def test_and_so_they_are_with_the_products_rule_and_outer_step_up_to_fp32(inner, mix):
    theta_nd = swarm(INNERS[inner], mix, product_step("sgd(lr=1.0)"), 25, torch.float32)
    assert 1e-12 < apart(theta_nd, data_parallel(INNERS[inner], 25)) <= 3e-6


@pytest.mark.parametrize(
    ("inner", "clip"),
    [(functools.partial(torch.optim.AdamW, lr=0.02), None), (SGD, 0.3)],
    ids=["adamw", "local clipping"],
)
def test_with_adamw_or_with_local_clipping_they_are_not(inner, clip):
    """Neither is linear in the gradient: promise no more than I-11 says."""
    theta_nd = swarm(inner, by_push_sum(SIZES), defined_step("sgd", 1.0), 25, clip=clip)
    assert 0.02 < apart(theta_nd, data_parallel(inner, 25, clip)) < 1
    assert (theta_nd - theta_nd[0]).abs().max() <= 1e-13  # the members agree all the same


# I-12: the classics


CLIENTS = (3.0, 1.0, 2.0, 6.0, 4.0)
"""Examples per client: FedAvg's n_k."""
START_D = torch.linspace(-2, 2, 8, dtype=torch.float64)


def fed_avg(train, rounds, server_rate=1.0, momentum=0.0, look_ahead=False):
    """arXiv:1602.05629, Alg. 1, and with a server momentum arXiv:1909.06335 (FedAvgM), in numpy."""
    w_d, v_d, total = START_D.numpy().copy(), np.zeros(8), sum(CLIENTS)
    for round_index in range(rounds):
        ends = [train(k, torch.from_numpy(w_d.copy()), round_index).numpy() for k in range(len(CLIENTS))]
        move_d = sum(n_k / total * (w_d - end_d) for n_k, end_d in zip(CLIENTS, ends, strict=True))
        v_d = momentum * v_d + move_d
        w_d = w_d - server_rate * (move_d + momentum * v_d if look_ahead else v_d)
    return torch.from_numpy(w_d)


EXACT_MIXES = {
    "gather": gather(CLIENTS),
    "push-sum": by_push_sum(CLIENTS),
    "push-sum, k = 3": by_push_sum(CLIENTS, "base(k=3)"),
}


def furthest(theta_nd, oracle_d):
    return (theta_nd.double() - oracle_d).abs().max().item()


@pytest.mark.parametrize("mix", EXACT_MIXES.values(), ids=EXACT_MIXES)
@pytest.mark.parametrize("spec", ["sgd(lr=1)", "nesterov(lr=1,momentum=0)", "heavy-ball(lr=1,momentum=0)"])
def test_a_run_without_outer_momentum_at_rate_one_is_fedavg(mix, spec):
    train = quadratics(3, len(CLIENTS))
    theta_nd = run(mix, product_step(spec), train, [START_D.float()] * len(CLIENTS), 20)
    assert furthest(theta_nd, fed_avg(train, 20)) <= 2e-6


@pytest.mark.parametrize("mix", EXACT_MIXES.values(), ids=EXACT_MIXES)
def test_a_run_with_heavy_ball_is_fedavgm_and_with_nesterov_it_is_not(mix):
    """Nesterov is off by 0.51 where coordinates are of order 1, heavy ball by the roundings of fp32: 3e-7."""
    train, starts = quadratics(3, len(CLIENTS)), [START_D.float()] * len(CLIENTS)
    oracle_d = fed_avg(train, 20, 0.3, 0.9)
    heavy_nd = run(mix, product_step("heavy-ball(lr=0.3,momentum=0.9)"), train, starts, 20)
    nesterov_nd = run(mix, product_step("nesterov(lr=0.3,momentum=0.9)"), train, starts, 20)
    assert furthest(heavy_nd, oracle_d) <= 1e-6
    assert furthest(nesterov_nd, oracle_d) > 0.4
    assert furthest(nesterov_nd, fed_avg(train, 20, 0.3, 0.9, look_ahead=True)) <= 5e-6


def alone(train, rounds, rate, momentum):
    """One worker. momentum 0: Lookahead (arXiv:1907.08610, Alg. 1, α = rate). Else SNOO (arXiv:2510.15830, Alg. 1)."""
    slow_d, b_d = START_D.numpy().copy(), np.zeros(8)
    for round_index in range(rounds):
        fast_d = train(0, torch.from_numpy(slow_d.copy()), round_index).numpy()
        if momentum:
            b_d = momentum * b_d + (slow_d - fast_d)
            slow_d = slow_d - rate * ((slow_d - fast_d) + momentum * b_d)
        else:
            slow_d = slow_d + rate * (fast_d - slow_d)
    return torch.from_numpy(slow_d)


@pytest.mark.parametrize("mix", [gather([2.0]), by_push_sum([2.0]), by_pairs()], ids=["gather", "push-sum", "pairs"])
@pytest.mark.parametrize(
    ("spec", "rate", "momentum"),
    [
        ("sgd(lr=0.5)", 0.5, 0.0),
        ("nesterov(lr=0.5,momentum=0)", 0.5, 0.0),
        ("nesterov(lr=0.7,momentum=0.8)", 0.7, 0.8),
    ],
    ids=["lookahead", "lookahead as nesterov", "snoo"],
)
def test_one_member_alone_is_lookahead_or_snoo_in_every_mode(mix, spec, rate, momentum):
    train = quadratics(4, 1)
    theta_nd = run(mix, product_step(spec), train, [START_D.float()], 20)
    assert furthest(theta_nd, alone(train, 20, rate, momentum)) <= 5e-6


# I-13: what must not move does not, and copies of one node are that node


def vectors(seed, n, d, dtype=torch.float32):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


OUTERS = ("sgd(lr={})", "nesterov(lr={},momentum=0.9)", "heavy-ball(lr={},momentum=0.5)")


def modes(weights, ref_d=None):
    return {
        "gather": gather(weights),
        "push-sum": by_push_sum(weights, ref_d=ref_d),
        "push-sum, one tick": by_push_sum(weights, "one-peer-exponential", ref_d, ticks=1),
        "pairs": by_pairs(2, ref_d),
    }


MODES = tuple(modes([1.0]))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("outer", OUTERS)
def test_with_an_outer_rate_of_zero_no_bit_of_any_anchor_moves(mode, outer):
    n, starts = 6, list(vectors(1, 6, 50))
    starts = [starts[0]] * n if mode == "gather" else starts  # members who mix may differ
    mix = modes([1.0, 2.0, 1.0, 4.0, 1.0, 3.0], starts[1])[mode]
    theta_nd = run(mix, product_step(outer.format("0")), quadratics(1, n, 50), starts, 5)
    assert theta_nd.numpy().tobytes() == torch.stack(starts).numpy().tobytes()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("outer", OUTERS)
@pytest.mark.parametrize("n", [1, 5, 8])
def test_members_who_agree_and_did_not_train_stay_where_they_are(mode, outer, n):
    """To the bit if they are at the reference, for all offsets are zero; else to the roundings of an offset."""
    (start_d, ref_d), weights = vectors(2, 2, 50), [float(1 + i % 3) for i in range(n)]
    step = product_step(outer.format("0.7"))
    for reference_d, slack in ((start_d, 0.0), (ref_d, 3e-6)):
        theta_nd = run(modes(weights, reference_d)[mode], step, lambda i, theta_d, _: theta_d, [start_d] * n, 4)
        assert (theta_nd - start_d).abs().max() <= slack


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("n", [2, 5, 8])
def test_members_who_all_do_the_same_are_one_member(mode, n):
    """To the bit where halving is all that happens (n a power of two, weights alike), else to roundings."""
    train, start_d, ref_d = quadratics(5, 1), vectors(3, 1, 8)[0], vectors(4, 1, 8)[0]
    step = product_step("nesterov(lr=0.6,momentum=0.9)")

    def all_alike(i, theta_d, round_index):
        return train(0, theta_d, round_index)

    alone_d = run(modes([1.0], ref_d)[mode], step, train, [start_d], 15)[0]
    theta_nd = run(modes([1.0] * n, ref_d)[mode], step, all_alike, [start_d] * n, 15)
    assert (theta_nd - alone_d).abs().max() <= (0 if n != 5 or mode in ("gather", "pairs") else 2e-6)
    assert (alone_d - start_d).abs().max() > 0.1


# I-16: many members whose data leave much open find the solution of least norm


def regressions(seed, n, rows, d, steps):
    """n members with `rows` equations each, all solvable together; local gradient descent until it stands still."""
    generator = np.random.default_rng(seed)
    a_nbd, truth_d = generator.standard_normal((n, rows, d)), generator.standard_normal(d)
    y_nb = a_nbd @ truth_d

    def train(i, theta_d, round_index):
        a_bd, y_b, at_d = a_nbd[i], y_nb[i], theta_d.double().numpy()
        rate = 1 / np.linalg.norm(a_bd, 2) ** 2
        for _ in range(steps):
            at_d = at_d - rate * a_bd.T @ (a_bd @ at_d - y_b)
        return torch.from_numpy(at_d).to(theta_d.dtype)

    return train, a_nbd.reshape(-1, d), y_nb.ravel()


def test_many_local_steps_and_averaging_find_the_solution_of_least_norm():
    """I-16: from zero; from elsewhere, the solution nearest to the start. Closed form by the pseudo-inverse."""
    train, a_md, y_m = regressions(1, 5, 3, 200, 50)
    inverse_dm = np.linalg.pinv(a_md)
    mix, step = by_push_sum([1.0, 2.0, 1.0, 2.0, 1.0]), defined_step("sgd", 1.0)
    for start_d in (np.zeros(200), np.linspace(-1, 1, 200)):
        theta_nd = run(mix, step, train, [torch.from_numpy(start_d)] * 5, 400)
        nearest_d = start_d + inverse_dm @ (y_m - a_md @ start_d)
        assert abs(theta_nd.numpy() - nearest_d).max() <= 1e-13
    assert abs(nearest_d - inverse_dm @ y_m).max() > 0.1


@pytest.mark.parametrize("mode", ["gather", "push-sum"])
def test_and_so_they_do_with_the_products_outer_step_up_to_fp32(mode):
    train, a_md, y_m = regressions(2, 4, 3, 60, 60)
    theta_nd = run(
        modes([1.0] * 4)[mode], product_step("nesterov(lr=0.7,momentum=0.7)"), train, [torch.zeros(60)] * 4, 150
    )
    assert abs(theta_nd.numpy() - np.linalg.pinv(a_md) @ y_m).max() <= 5e-6
