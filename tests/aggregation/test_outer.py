"""The outer step: its definition, torch's optimiser, and every way to share memory."""

import itertools

import numpy as np
import pytest
import torch

from farflung.aggregation.outer import momentum_gain, nesterov, parse_outer, sgd
from farflung.aggregation.windows import WINDOW
from farflung.protocol.errors import ConfigError, LocalError

D = 2 * WINDOW + 77
PLACES = ("theta", "momentum", "update", "apart")


def define(lr, momentum, theta, buffer, update):
    """The docstring of `outer`, in numpy, where every operation is rounded by itself."""
    g, b, t = (vector.numpy().astype(np.float64) for vector in (update, buffer, theta))
    new_buffer = (momentum * b + g).astype(np.float32)
    return (t - lr * (g + momentum * new_buffer.astype(np.float64))).astype(np.float32), new_buffer


def fresh_step(outer, theta_d, momentum_d, update_d, threads=1):
    theta_out_d = torch.full_like(theta_d, float("nan"))
    momentum_out_d = torch.full_like(theta_d, float("nan")) if outer.state_buffers else None
    outer.step(
        theta_d,
        momentum_d if outer.state_buffers else None,
        update_d,
        theta_out_d=theta_out_d,
        momentum_out_d=momentum_out_d,
        threads=threads,
    )
    return theta_out_d, momentum_out_d


def bits(vector):
    return np.asarray(vector).tobytes()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("lr", "momentum"), [(0.7, 0.9), (1.0, 0.0), (0.1, 0.5)])
def test_steps_equal_their_definition_bit_for_bit(lr, momentum, threads, random_rows):
    theta_d, momentum_d, update_d = random_rows(0, 3, D)
    inputs = [vector.clone() for vector in (theta_d, momentum_d, update_d)]
    theta_out_d, momentum_out_d = fresh_step(nesterov(lr, momentum), theta_d, momentum_d, update_d, threads)
    wanted_theta, wanted_momentum = define(lr, momentum, theta_d, momentum_d, update_d)
    assert bits(theta_out_d) == bits(wanted_theta)
    assert bits(momentum_out_d) == bits(wanted_momentum)
    plain_out_d, _ = fresh_step(sgd(lr), theta_d, None, update_d, threads)
    assert bits(plain_out_d) == bits(define(lr, 0.0, theta_d, torch.zeros(D), update_d)[0])
    assert all(torch.equal(a, b) for a, b in zip(inputs, (theta_d, momentum_d, update_d), strict=True))


@pytest.mark.parametrize("spec", ["sgd(lr=1.0)", "sgd(lr=0.3)", "nesterov(lr=0.7,momentum=0.9)"])
def test_several_steps_follow_torch(spec, random_rows):
    """Torch rounds to fp32 after every operation, we round once: a few units in the last place of what is added."""
    outer, rounds = parse_outer(spec), 6
    theirs = torch.nn.Parameter(random_rows(1, 1, 999)[0].clone())
    optimizer = torch.optim.SGD([theirs], lr=outer.lr, momentum=outer.momentum, nesterov=outer.momentum > 0)
    ours, momentum_d, largest_d = theirs.detach().clone(), torch.zeros(999), theirs.detach().abs()
    for update_d in random_rows(2, rounds, 999):
        theirs.grad = update_d.clone()
        optimizer.step()
        ours, momentum_d = fresh_step(outer, ours, momentum_d, update_d)
        step_d = outer.lr * (update_d.abs() + (momentum_d.abs() if outer.state_buffers else 0))
        largest_d = torch.maximum(largest_d, torch.maximum(step_d, theirs.detach().abs()))
    ulp_d = torch.from_numpy(np.spacing(largest_d.numpy()))
    assert ((ours - theirs.detach()).abs() <= 2 * rounds * ulp_d).all()
    assert ((ours - theirs.detach()).abs() <= 2 * ulp_d).float().mean() > 0.95


@pytest.mark.parametrize(
    ("theta_out", "momentum_out"),
    [(a, b) for a, b in itertools.product(PLACES, PLACES) if a != b or a == "apart"],  # the outputs are apart
)
def test_outputs_may_be_the_memory_of_any_input(theta_out, momentum_out, random_rows):
    theta_d, momentum_d, update_d = random_rows(3, 3, D)
    wanted_theta, wanted_momentum = define(0.7, 0.9, theta_d, momentum_d, update_d)
    named = {"theta": theta_d, "momentum": momentum_d, "update": update_d}
    theta_out_d, momentum_out_d = named.get(theta_out, torch.empty(D)), named.get(momentum_out, torch.empty(D))
    outer = nesterov(0.7, 0.9)
    outer.step(theta_d, momentum_d, update_d, theta_out_d=theta_out_d, momentum_out_d=momentum_out_d, threads=2)
    assert bits(theta_out_d) == bits(wanted_theta)
    assert bits(momentum_out_d) == bits(wanted_momentum)


@pytest.mark.parametrize("out", ["theta", "update"])
def test_plain_steps_may_write_over_what_they_read(out, random_rows):
    theta_d, update_d = random_rows(4, 2, D)
    wanted, _ = define(0.7, 0.0, theta_d, torch.zeros(D), update_d)
    out_d = {"theta": theta_d, "update": update_d}[out]
    sgd(0.7).step(theta_d, None, update_d, theta_out_d=out_d, momentum_out_d=None)
    assert bits(out_d) == bits(wanted)


def test_memory_that_is_shared_askew_is_refused():
    memory = torch.zeros(300)
    a, b, askew = memory[:100], memory[100:200], memory[50:150]
    for theta_out_d, momentum_out_d in ((askew, b.clone()), (b.clone(), askew), (a, a)):
        with pytest.raises(LocalError, match="overlaps"):
            nesterov(1.0, 0.9).step(a, b, memory[200:], theta_out_d=theta_out_d, momentum_out_d=momentum_out_d)


@pytest.mark.parametrize("spec", ["sgd(lr=0)", "nesterov(lr=0,momentum=0.9)"])
def test_a_learning_rate_of_zero_keeps_the_anchor(spec, random_rows):
    theta_d, momentum_d, update_d = random_rows(5, 3, 1000)
    assert torch.equal(fresh_step(parse_outer(spec), theta_d, momentum_d, update_d)[0], theta_d)


def test_sgd_at_one_turns_the_anchor_into_the_members_mean():
    anchor_d, trained_nd = torch.zeros(8), torch.arange(16.0).view(2, 8)
    update_d = (anchor_d - trained_nd).mean(0)
    assert torch.equal(fresh_step(parse_outer("sgd(lr=1)"), anchor_d, None, update_d)[0], trained_nd.mean(0))


def test_vectors_that_do_not_fit_are_our_bug():
    one, other = torch.zeros(4), torch.zeros(5)
    with pytest.raises(LocalError):
        sgd(1.0).step(one, one.clone(), one, theta_out_d=one.clone(), momentum_out_d=None)
    with pytest.raises(LocalError):
        nesterov(1.0, 0.5).step(one, None, one, theta_out_d=one.clone(), momentum_out_d=one.clone())
    with pytest.raises(LocalError):
        sgd(1.0).step(one, None, other, theta_out_d=one.clone(), momentum_out_d=None)
    with pytest.raises(LocalError):
        sgd(1.0).step(one, None, one.double(), theta_out_d=one.clone(), momentum_out_d=None)


def test_the_gain_is_how_far_the_step_goes_along_the_update(random_rows):
    momentum_d, update_d = random_rows(6, 2, D)
    theta_out_d, _ = fresh_step(nesterov(1.0, 0.9), torch.zeros(D), momentum_d, update_d)
    along = torch.dot(-theta_out_d.double(), update_d.double()) / update_d.double().square().sum()
    gain = momentum_gain(0.9, momentum_d, update_d)
    assert gain == pytest.approx(float(along), rel=1e-5)
    assert gain == momentum_gain(0.9, momentum_d, update_d, threads=3)
    assert momentum_gain(0.9, torch.zeros(D), update_d) == 1.9
    assert momentum_gain(0.9, momentum_d, torch.zeros(D)) == 1.9
    assert momentum_gain(0.9, 10 * update_d, update_d) == pytest.approx(10)


def test_specs_are_canonical():
    assert parse_outer(" sgd( lr = 1 ) ").spec == "sgd(lr=1.0)"
    assert parse_outer("nesterov(momentum=0.90,lr=7e-1)").spec == "nesterov(lr=0.7,momentum=0.9)"
    for spec in ("sgd(lr=1e-05)", "sgd(lr=100.0)", "nesterov(lr=0.1,momentum=0.0)"):
        assert parse_outer(spec).spec == spec
        assert parse_outer(parse_outer(spec).spec).lr == parse_outer(spec).lr
    assert [parse_outer(spec).state_buffers for spec in ("sgd(lr=1)", "nesterov(lr=1,momentum=0)")] == [0, 1]


@pytest.mark.parametrize(
    "spec",
    [
        *("sgd", "sgd()", "sgd(1.0)", "sgd(lr=)", "sgd(lr=-1)", "sgd(lr=nan)", "sgd(lr=inf)", "sgd(lr=1e999)"),
        *("sgd(lr=101)", "sgd(lr=1_0)", "sgd(lr=0x1)", "sgd(lr=1,lr=1)", "sgd(lr=1,momentum=0.9)", "sgd(lr=١)"),
        *("nesterov(lr=0.7)", "nesterov(lr=0.7,momentum=1)", "nesterov(lr=0.7,momentum=-0.1)", "adam(lr=1)", ""),
        *("sgd(lr=1.0", "sgd(lr=1.0))", "sgd(lr=1.0) x", "sgd((lr=1))", "sgd(lr=1,)", "x" * 10_000),
    ],
)
def test_a_spec_that_is_wrong_is_refused_in_one_line(spec):
    with pytest.raises(ConfigError) as refused:
        parse_outer(spec)
    assert "sgd(lr=" in str(refused.value) or "nesterov(lr=" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 300
