"""Persistent push-sum: the mean takes DiLoCo's steps on any graph, in any weather (I-1, I-2, I-10). Oracle: numpy."""

import random
from fractions import Fraction

import numpy as np
import pytest
import torch

from farflung.aggregation.graphs import Column, Share, column_of, matrix_of, parse_graph
from farflung.aggregation.kernels import persistent as compiled
from farflung.aggregation.kernels import persistent_reference as reference
from farflung.aggregation.mass import mass_error
from farflung.aggregation.outer import parse_outer
from farflung.aggregation.persistent import (
    FLOOR,
    PersistentRule,
    begin,
    check_regular,
    parse_persistent,
    plan_tick,
    rebalanced,
)
from farflung.aggregation.persistent_post import Post
from farflung.aggregation.windows import WINDOW
from farflung.protocol.errors import ConfigError, LocalError

D = 11
OPEN = 1e-9
"""A floor that nothing falls below."""
REGULAR = ("base(k=1)", "base(k=2)", "one-peer-exponential", "exponential", "ring", "random-matching", "od-equidyn")


def vectors(seed, n, d=D, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=torch.float64).to(dtype)


def members_of(theta_nd, spec="nesterov(lr=0.7,momentum=0.5)", floor=OPEN, weights=None):
    rule = parse_persistent(spec, floor)
    weights = [1.0] * len(theta_nd) if weights is None else weights
    return [begin(theta_d, rule, weight=weight) for theta_d, weight in zip(theta_nd, weights, strict=True)]


def models(members):
    return torch.stack([member.model() for member in members])


def some_digraph(seed, n):
    """Irregular and directed: shares sum to 1 for senders, not for receivers."""
    dice = random.Random(seed)
    columns = []
    for i in range(n):
        receivers = {(i + 1) % n, *dice.sample(range(n), 2)} - {i}
        columns.append(column_of(i, [(j, Fraction(dice.randint(1, 9), 30)) for j in sorted(receivers)]))
    return tuple(columns)


def mix(members, mixing):
    """A tick of any mixing, regular or not, with perfect weather."""
    sent = [member.send(mixing[i].sends) for i, member in enumerate(members)]
    for shares in sent:
        for to, mass in shares.items():
            members[to].receive(mass)


def rough_fate(seed, loss=0.3, asleep=0.05):
    """30 % lost, some twice, some late, some never sent; the same answer whenever it is asked."""

    def fate(tick, sender, receiver):
        dice = random.Random(repr((seed, tick, sender, receiver)))
        drawn = dice.random()
        if drawn < loss:
            return ()
        if drawn < loss + asleep:
            return None
        return tuple(dice.randint(0, 3) for _ in range(dice.choice([1, 1, 2, 3])))

    return fate


# Kernels and steps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [0, 1, 16, 1003])
def test_compiled_kernels_equal_their_references(dtype, size, random_rows):
    a, b, c, d = random_rows(size, 4, size).to(dtype) * (1 + 1e-9)
    calls = [
        ("plain", a, b, 0.7),
        ("heavy_ball", a, b, c, 0.7, 0.3),
        ("nesterov", a, b, c, 0.7, 0.9),
        ("accelerate", a, b, c, d, 0.3, 0.7),
    ]
    for name, *arguments in calls:
        mine = [x.clone() if isinstance(x, torch.Tensor) else x for x in arguments]
        theirs = [x.clone() if isinstance(x, torch.Tensor) else x for x in arguments]
        getattr(compiled, name)(*[x.numpy() if isinstance(x, torch.Tensor) else x for x in mine])
        getattr(reference, name)(*theirs)
        for x, y in zip(mine, theirs, strict=True):
            assert not isinstance(x, torch.Tensor) or x.numpy().tobytes() == y.numpy().tobytes(), name


@pytest.mark.parametrize("spec", ["sgd(lr=0.7)", "nesterov(lr=0.7,momentum=0.5)", "heavy-ball(lr=0.3,momentum=0.9)"])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_member_alone_takes_the_outer_optimisers_steps_bit_for_bit(spec, threads):
    theta_d, outer = vectors(1, 1, 2 * WINDOW + 7, torch.float32)[0], parse_outer(spec)
    state = tuple(torch.zeros_like(theta_d) for _ in outer.state_names)
    alone = begin(theta_d.clone(), parse_persistent(spec), threads=threads)
    for trained in range(1, 5):
        delta_d = vectors(trained, 1, len(theta_d), torch.float32)[0]
        assert alone.update(delta_d)
        outer.step(theta_d, state, delta_d, theta_out_d=theta_d, state_out=state, trained=trained)
    assert alone.model().numpy().tobytes() == theta_d.numpy().tobytes()
    assert [b.numpy().tobytes() for b in alone.buffers] == [b.numpy().tobytes() for b in state]


# I-10: what the mean does


@pytest.mark.parametrize("spec", ["sgd(lr=0.7)", "nesterov(lr=0.7,momentum=0.9)", "heavy-ball(lr=0.3,momentum=0.9)"])
@pytest.mark.parametrize("seed", range(6))
def test_the_mean_takes_diloco_steps_on_any_graph_in_any_weather(spec, seed):
    """I-10. Updates are drawn, not trained; the mean over members and messages follows the mean update, exactly."""
    dice, n = random.Random(seed), 2 + seed
    theta_nd, graph = vectors(seed, n), parse_graph(REGULAR[seed])
    members, post, fate = members_of(theta_nd, spec), Post(), rough_fate(seed)
    mean_d, buffer_d = theta_nd.mean(0).numpy(), np.zeros(D)
    lr, mu = members[0].rule.lr, members[0].rule.momentum
    for tick in range(25):
        delta_nd = vectors(100 * seed + tick, n)
        for member, delta_d in zip(members, delta_nd, strict=True):
            assert member.update(delta_d)
        buffer_d = mu * buffer_d + delta_nd.mean(0).numpy()
        mean_d = mean_d - lr * (delta_nd.mean(0).numpy() + mu * buffer_d if spec[0] == "n" else buffer_d)
        if seed % 2:
            mix(members, some_digraph(dice.random(), n))
        else:
            post.carry(members, plan_tick(graph, n, tick, run_id=b"run"), fate=fate)
        masses = [*(member.mass for member in members), *post.under_way()]
        x_d = sum(mass.numerator_d.numpy() for mass in masses)
        assert abs(x_d / sum(mass.weight for mass in masses) - mean_d).max() <= 1e-12
    weights = [member.mass.weight for member in members]
    assert max(weights) - min(weights) > 0.01  # the weather, or the graph, was no calm


@pytest.mark.parametrize("seed", range(3))
def test_steps_on_numerators_end_at_the_uniform_mean_and_steps_on_ratios_do_not(seed):
    """I-10. Members want to be at b_i; on a static irregular graph weights settle at some w_i."""
    n, mixing, goal_nd = 5, some_digraph(seed, 5), vectors(seed, 5)
    values, vectors_nn = np.linalg.eig(matrix_of(mixing))
    w_n = vectors_nn[:, values.real.argmax()].real
    w_n = w_n / w_n.sum() * n
    ends = {}
    for form in ("numerator", "ratio"):
        members = members_of(torch.zeros_like(goal_nd), "sgd(lr=0.15)")
        for _ in range(320):
            for member, goal_d in zip(members, goal_nd, strict=True):
                delta_d = member.model() - goal_d
                member.update(delta_d if form == "numerator" else member.mass.weight * delta_d)
            mix(members, mixing)
        ends[form] = models(members)
        assert np.allclose([member.mass.weight for member in members], w_n, rtol=1e-9)
    plain_d, heavy_d = goal_nd.mean(0), torch.from_numpy(w_n) @ goal_nd / n
    # at rest Σ (z_i − b_i) = 0, or Σ w_i (z_i − b_i) = 0: the two means, exactly
    assert (ends["numerator"].mean(0) - plain_d).abs().max() < 1e-9
    assert (torch.from_numpy(w_n) @ ends["ratio"] / n - heavy_d).abs().max() < 1e-9
    assert (heavy_d - plain_d).norm() > 0.1
    assert (ends["ratio"].mean(0) - plain_d).norm() > 0.1


@pytest.mark.parametrize("spec", REGULAR)
def test_on_a_regular_graph_in_calm_weather_weights_stay_one_bit_for_bit(spec):
    n, theta_nd, graph = 6, vectors(1, 6), parse_graph(spec)
    members, post, expected_nd = members_of(theta_nd, "sgd(lr=1.0)"), Post(), theta_nd.numpy()
    for tick in range(12):
        delta_nd = vectors(50 + tick, n)
        for member, delta_d in zip(members, delta_nd, strict=True):
            member.update(delta_d)
        mixing = plan_tick(graph, n, tick, run_id=b"run")
        post.carry(members, mixing)
        expected_nd = matrix_of(mixing) @ (expected_nd - delta_nd.numpy())
        assert {member.mass.weight for member in members} == {1.0}
    assert np.allclose(models(members).numpy(), expected_nd, rtol=0, atol=1e-13)


def test_a_whole_period_of_an_exact_graph_between_steps_is_diloco():
    n, graph = 6, parse_graph("base(k=1)")
    theta_d, buffer_d, outer = torch.zeros(D), torch.zeros(D), parse_outer("nesterov(lr=0.7,momentum=0.9)")
    members, post = members_of(torch.zeros(n, D), outer.spec), Post()
    goal_nd = vectors(3, n, dtype=torch.float32)
    for trained in range(1, 15):
        outer.step(
            theta_d,
            (buffer_d,),
            0.3 * (theta_d - goal_nd.mean(0)),
            theta_out_d=theta_d,
            state_out=(buffer_d,),
            trained=trained,
        )
        for member, goal_d in zip(members, goal_nd, strict=True):
            member.update(0.3 * (member.model() - goal_d))
        for _ in range(graph.period(n)):
            post.carry(members, plan_tick(graph, n, post.tick, run_id=b"run"))
    assert (models(members) - theta_d).abs().max() < 2e-6
    assert theta_d.abs().max() > 0.1


def test_weighted_members_take_weighted_steps():
    weights = [1.0, 4.0, 2.0, 0.5]
    theta_nd, delta_nd = vectors(1, 4), vectors(2, 4)
    members = members_of(theta_nd, "sgd(lr=0.5)", weights=weights)
    for member, delta_d in zip(members, delta_nd, strict=True):
        member.update(delta_d)
    post = Post()
    for tick in range(2):
        post.carry(members, plan_tick(parse_graph("base(k=1)"), 4, tick, run_id=b"run"))
    mean_d = np.average((theta_nd - 0.5 * delta_nd).numpy(), axis=0, weights=weights)
    assert abs(models(members).numpy() - mean_d).max() < 1e-14


# I-1, I-2: nothing is lost


def storm(seed, ticks=14, d=5, dtype=torch.float64):
    """A schedule of loss, repeats, delay, joins, leaves and steps; what the sums should be and are after every tick."""
    dice = random.Random(seed)
    weights = [dice.choice([0.5, 1.0, 3.0]) for _ in range(dice.randint(2, 7))]
    theta_nd = vectors(seed, len(weights) + ticks, d, dtype)
    members = members_of(theta_nd[: len(weights)], "sgd(lr=0.5)", dice.choice([OPEN, FLOOR]), weights)
    post, fate = Post(), rough_fate(seed)
    total, x_d = sum(weights), sum(member.mass.numerator_d.double() for member in members)
    for tick in range(ticks):
        for member in members:
            delta_d = vectors(dice.randrange(10**6), 1, d, dtype)[0]
            if dice.random() < 0.5 and member.update(delta_d):
                x_d = x_d - 0.5 * member.claim * delta_d.double()
        if dice.random() < 0.1 and len(members) > 2:  # messages name positions, so a leaver waits for its own
            post.recall(members)
            leaver = members.pop(dice.randrange(len(members)))
            dice.choice(members).receive(leaver.leave())
        if dice.random() < 0.1:
            post.recall(members)
            members.append(begin(members[0].model(), members[0].rule, weight=2.0))
            total, x_d = total + 2.0, x_d + members[-1].mass.numerator_d.double()
        graph = parse_graph(dice.choice(REGULAR))
        post.carry(members, plan_tick(graph, len(members), tick, run_id=b"run"), fate=fate)
        yield members, post, total, x_d


def check_storm(seed, tolerance=1e-9, **settings):
    for members, post, total, x_d in storm(seed, **settings):
        masses = [*(member.mass for member in members), *post.under_way()]
        got_d = sum(mass.numerator_d.double() for mass in masses)
        size = sum(mass.numerator_d.double().abs().sum().item() for mass in masses)
        assert abs(sum(mass.weight for mass in masses) - total) <= 1e-12 * total
        assert (got_d - x_d).abs().max().item() <= tolerance * size
        sums = post.sums(members)
        assert mass_error(sums._replace(weight=total, total=x_d.sum().item()), sums) <= tolerance
        assert min(member.mass.weight for member in members) > 0
    return post


@pytest.mark.parametrize("first", range(0, 300, 50))
def test_mass_is_conserved_over_300_schedules(first):
    under_way = [len(check_storm(seed).under_way()) for seed in range(first, first + 50)]
    assert sum(count > 0 for count in under_way) > 25


@pytest.mark.parametrize("seed", range(6))
def test_mass_is_conserved_in_fp32(seed):
    check_storm(seed, tolerance=1e-6, dtype=torch.float32, d=300)


@pytest.mark.soak
@pytest.mark.parametrize("first", range(1000, 11_000, 500))
def test_mass_is_conserved_over_ten_thousand_schedules(first):
    assert all(check_storm(seed, ticks=20).tick == 20 for seed in range(first, first + 500))


def test_the_same_events_give_the_same_bytes():
    ends = []
    for _ in range(2):
        *_, (members, post, _, _) = storm(7, dtype=torch.float32)
        ends.append((models(members).numpy().tobytes(), post.sums(members)))
    assert ends[0] == ends[1]


def test_without_a_ledger_weights_starve_and_steps_explode():
    """Notes §9.1: 20 % loss. Steps on z are Δ / w, and w is nearly nothing."""
    n, graph, goal_nd, worst = 8, parse_graph("one-peer-exponential"), vectors(5, 8), {}
    for ledger in (True, False):
        members, post = members_of(torch.zeros_like(goal_nd), "sgd(lr=0.3)"), Post(ledger)
        for tick in range(80):
            for member, goal_d in zip(members, goal_nd, strict=True):
                member.update(0.1 * (member.model() - goal_d))
            fate = rough_fate(5, loss=0.2, asleep=0.0)
            post.carry(
                members,
                plan_tick(graph, n, tick, run_id=b"run"),
                fate=lambda tick, i, j, fate=fate: (0,) if fate(tick, i, j) else (),
            )
        weight = post.sums(members).weight
        worst[ledger] = (models(members) - goal_nd.mean(0)).norm(dim=1).max().item()
        assert weight == pytest.approx(8.0, rel=1e-13) if ledger else weight < 0.01
    assert worst[True] < 0.5
    assert worst[False] > 1e6


def test_duplicates_count_once_with_a_ledger_and_every_time_without():
    for ledger, expected in ((True, 6.0), (False, 6 * 1.5**8)):
        members, post = members_of(vectors(1, 6)), Post(ledger)
        for tick in range(8):
            mixing = plan_tick(parse_graph("one-peer-exponential"), 6, tick, run_id=b"run")
            post.carry(members, mixing, fate=lambda tick, i, j: (0, 0))
        assert sum(member.mass.weight for member in members) == pytest.approx(expected, rel=1e-13)


# The floor, and refusals


def test_below_the_floor_a_member_receives_only():
    members = members_of(vectors(1, 2), floor=0.3, weights=[2.0, 2.0])
    first, second = members
    before = []
    for _ in range(3):
        before.append(first.mass.weight)
        for mass in first.send([Share(1, 0.5)]).values():
            second.receive(mass)
    assert before == [2.0, 1.0, 0.5]  # 0.5 < 0.3 * 2: the third tick keeps everything
    assert first.mass.weight == 0.5
    assert first.low
    assert not second.low
    x = first.mass.numerator_d.clone()
    assert not first.update(vectors(2, 1)[0])
    assert torch.equal(first.mass.numerator_d, x)
    assert not first.buffers[0].any()
    first.receive(second.send([Share(0, 0.5)])[0])
    assert not first.low
    assert first.update(vectors(2, 1)[0])


def test_in_bad_weather_the_floor_holds_weights_up():
    lowest = {}
    for floor in (OPEN, FLOOR, 0.25):
        members, post, seen = members_of(vectors(1, 16, 1), floor=floor), Post(), []
        for tick in range(250):
            mixing = plan_tick(parse_graph("one-peer-exponential"), 16, tick, run_id=b"run")
            post.carry(members, mixing, fate=rough_fate(3))
            seen += [member.mass.weight for member in members]
        lowest[floor] = min(seen)
    assert lowest[OPEN] < 0.03
    assert lowest[FLOOR] >= 0.5 * FLOOR
    assert lowest[0.25] >= 0.125


def test_an_irregular_graph_is_refused_and_the_message_says_what_it_did():
    hub = tuple(column_of(i, [(0, Fraction(1, 2))] if i else [(1, Fraction(1, 2))]) for i in range(4))
    for mixing in (hub, some_digraph(1, 5)):
        with pytest.raises(ConfigError, match=r"\.26 and the loss rose from \.75 to 1\.03"):
            check_regular(mixing)
        members = members_of(vectors(1, len(mixing)))
        before = models(members)
        with pytest.raises(ConfigError, match="regular"):
            Post().carry(members, mixing)
        assert torch.equal(models(members), before)


@pytest.mark.parametrize("spec", ["base(k=1)", "base(k=3)", "exponential", "ou-equidyn", "od-equidyn", "complete"])
def test_every_graph_of_the_catalogue_is_regular(spec):
    for n in (1, 2, 3, 7, 16):
        for tick in range(5):
            check_regular(plan_tick(parse_graph(spec), n, tick, run_id=b"run"))
    check_regular((Column(1.0, ()),))


@pytest.mark.parametrize(
    ("spec", "floor"),
    [
        ("schedule-free(lr=1.0)", 0.1),
        ("delayed-nesterov(lr=0.7,momentum=0.5,delay=3)", 0.1),
        ("sgd", 0.1),
        ("nesterov(lr=0.7,momentum=1.0)", 0.1),
        ("sgd(lr=200)", 0.1),
        ("sgd(lr=1.0)", 0.0),
        ("sgd(lr=1.0)", 1.0),
        ("sgd(lr=1.0)", float("nan")),
    ],
)
def test_steps_and_floors_that_cannot_work_are_refused(spec, floor):
    with pytest.raises(ConfigError):
        parse_persistent(spec, floor)


def test_rules_that_contradict_themselves_are_refused():
    for form, lr, momentum in (("adam", 1.0, 0.0), ("sgd", 1.0, 0.5), ("nesterov", float("nan"), 0.5)):
        with pytest.raises(ConfigError):
            PersistentRule(form, lr, momentum)


def test_what_is_not_finite_or_of_another_kind_never_enters_the_mass():
    (member,) = members_of(vectors(1, 1))
    before = member.mass.numerator_d.clone()
    wrong = [torch.full((D,), float("nan")).double(), torch.ones(D), torch.ones(D + 1).double()]
    wrong.append(torch.tensor([float("inf"), *[0.0] * (D - 1)]).double())
    for delta_d in wrong:
        with pytest.raises(LocalError):
            member.update(delta_d)
    assert torch.equal(member.mass.numerator_d, before)
    for weight in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(LocalError):
            begin(torch.ones(D), member.rule, weight=weight)


def test_a_post_refuses_other_members_and_recalls_only_with_a_ledger():
    members = members_of(vectors(1, 4))
    with pytest.raises(LocalError):
        Post().carry(members[:3], plan_tick(parse_graph("ring"), 4, 0, run_id=b"run"))
    with pytest.raises(LocalError, match="without a ledger"):
        Post(ledger=False).recall(members)


# Joining and leaving


def test_who_leaves_hands_over_and_who_joins_brings_its_own_and_the_mean_stays():
    members = members_of(vectors(1, 5))
    mean_d, z_d = models(members).mean(0), members[1].model()
    members[3].receive(members[0].leave())
    assert members[0].mass.weight == 0
    with pytest.raises(LocalError, match="no ratio"):
        members[0].model()
    x_d = sum(member.mass.numerator_d for member in members)
    assert (x_d / 5 - mean_d).abs().max() < 1e-15
    newcomer = begin(z_d, members[0].rule, weight=3.0)
    assert torch.allclose(newcomer.model(), z_d, rtol=1e-15)
    x_d = x_d + newcomer.mass.numerator_d
    assert torch.allclose(x_d / 8, (5 * mean_d + 3 * z_d) / 8, rtol=0, atol=1e-15)


def test_rebalanced_claims_keep_the_mean_at_diloco_steps_after_a_leave():
    """Σ w stays 4 when one of 4 leaves; three updates of weight 1 would move the mean by 3/4 of their mean."""
    moved = {}
    for balanced in (False, True):
        members = members_of(vectors(1, 4), "sgd(lr=1.0)")
        members[0].receive(members[3].leave())
        trainers, delta_nd = members[:3], vectors(2, 3)
        if balanced:
            for member, claim in zip(trainers, rebalanced([1.0] * 3, 4.0), strict=True):
                member.claim = claim
        before_d = sum(member.mass.numerator_d for member in members) / 4
        for member, delta_d in zip(trainers, delta_nd, strict=True):
            member.update(delta_d)
        moved[balanced] = before_d - sum(member.mass.numerator_d for member in members) / 4
    assert torch.allclose(moved[True], delta_nd.mean(0), rtol=0, atol=1e-14)
    assert torch.allclose(moved[False], 0.75 * delta_nd.mean(0), rtol=0, atol=1e-14)
    assert rebalanced([1.0, 3.0], 8.0) == (2.0, 6.0)
    for claims, total in (([], 1.0), ([0.0, 1.0], 2.0), ([1.0], 0.0)):
        with pytest.raises(LocalError):
            rebalanced(claims, total)
