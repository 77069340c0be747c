"""Training by members that mix: exact where the mathematics says so, and as lossy, clipped and rounded as it must be.

Oracles: plain DiLoCo in numpy over the mean, means in fp64, partners read off the graph.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from farflung.aggregation.graphs import parse_graph, partners_of, plan_round
from farflung.aggregation.weights import Claim, fednova
from farflung.node.flat import schema_of
from farflung.node.tasks.stdlib_gpt import StdlibGpt
from farflung.protocol.errors import ConfigError
from farflung.sim.bench.mixing_advance import Outers, stepping
from farflung.sim.bench.mixing_exchange import lost_messages, make_exchange
from farflung.sim.bench.mixing_liars import Round
from farflung.sim.bench.mixing_loop import MixLoop, mix
from farflung.sim.bench.mixing_plots import draw_gaps
from farflung.sim.bench.mixing_setting import Accelerated, Gather, MixSetting, Pace, Pairs, Persistent, PushSum
from farflung.sim.bench.mixing_table import Entry, cells_of, lines_of, rows_of
from farflung.sim.bench.runs import FinishedRuns

TINY = StdlibGpt(layers=1, width=32, context=16, batch=2, validation_windows=8, warmup=2)
SCHEMA = schema_of(TINY.build_model())
NESTEROV = "nesterov(lr=0.7,momentum=0.6)"
ULP = 2.0**-24


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny(exchange, outer=NESTEROV, **changes):
    setting = MixSetting(exchange, outer, rounds=3, inner_steps=2, members=5, report_every=2, task=TINY)
    return replace(setting, **changes)


def found(n, d, *, seed=0, number=1, apart=1.0, dtype=torch.float64):
    """A round in which members start `apart` and move by about 1, with a reference 3 away."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    theta_nd = draw(d) + apart * draw(n, d)
    phi_nd = theta_nd - draw(d) - 0.3 * draw(n, d)
    return Round(number, theta_nd.to(dtype), phi_nd.to(dtype), (theta_nd[0] + 3 * draw(d)).to(dtype))


def claims_of(*steps):
    return [Claim(count, 16 * count) for count in steps]


def gradients(exchange, round_, claims=None, **changes):
    setting = tiny(exchange, members=len(round_.theta_nd), **changes)
    claims = claims_of(*[2] * setting.members) if claims is None else claims
    return make_exchange(setting, SCHEMA)(round_, claims)


# Whole runs


class Quadratics:
    """Member i minimises (φ - b_i)' A_i (φ - b_i) / 2 by H plain steps, in fp64: unlike objectives."""

    def __init__(self, n, d=12, steps=5):
        dice = np.random.default_rng(n)
        root_ndd = dice.standard_normal((n, d, d)) / math.sqrt(d)
        self.a_ndd = root_ndd @ root_ndd.transpose(0, 2, 1) + 0.1 * np.eye(d)
        self.b_nd = 5 + dice.standard_normal((n, d))
        self.n, self.d, self.steps = n, d, steps

    def train(self, theta_nd):
        phi_nd = theta_nd.copy()
        for _ in range(self.steps):
            phi_nd -= 0.1 * np.einsum("nij,nj->ni", self.a_ndd, phi_nd - self.b_nd)
        return phi_nd


@pytest.mark.parametrize("n", [2, 3, 5, 6, 7, 16])
def test_a_whole_run_of_exact_push_sum_is_diloco_with_the_mean(n):
    problem, lr, momentum = Quadratics(n), 0.7, 0.9
    setting = tiny(PushSum(), members=n)
    exchange = make_exchange(setting, SCHEMA)
    theta_d, buffer_d = np.zeros(problem.d), np.zeros(problem.d)
    theta_nd, buffer_nd = np.zeros((n, problem.d)), np.zeros((n, problem.d))
    reference_d, moved = torch.zeros(problem.d, dtype=torch.float64), 0.0
    for number in range(1, 21):
        delta_d = (theta_d - problem.train(np.tile(theta_d, (n, 1)))).mean(0)  # the oracle: one model, one momentum
        buffer_d = momentum * buffer_d + delta_d
        theta_d = theta_d - lr * (delta_d + momentum * buffer_d)
        phi_nd = torch.from_numpy(problem.train(theta_nd))
        round_ = Round(number, torch.from_numpy(theta_nd), phi_nd, reference_d)
        gradient_nd = exchange(round_, claims_of(*[5] * n)).gradient_nd.numpy()
        buffer_nd = momentum * buffer_nd + gradient_nd
        theta_nd = theta_nd - lr * (gradient_nd + momentum * buffer_nd)
        moved = max(moved, float(np.abs(theta_d).max()))
        assert np.abs(theta_nd - theta_d).max() <= 1e-12 * moved
        if number == 10:  # a new reference is a change of variables
            reference_d = torch.from_numpy(theta_nd[1 % n].copy())
    assert moved > 1


@pytest.mark.parametrize("n", [5, 16])
def test_every_exact_round_of_a_small_gpt_is_the_mean_to_a_few_ulps(n):
    setting = tiny(Gather(), members=n, reference_every=2)
    loop, seen = MixLoop(setting), []
    gather, exact = (make_exchange(replace(setting, exchange=exchange), SCHEMA) for exchange in (Gather(), PushSum()))

    def both(round_, claims):
        mean_nd = gather(round_, claims).gradient_nd
        mixed = exact(round_, claims)
        offset_nd = (round_.phi_nd - round_.theta_ref_d).abs()
        assert torch.equal(round_.theta_nd, round_.theta_nd[:1].expand(n, -1))
        size_d = offset_nd.amax(0) + round_.theta_nd[0].abs()
        seen.append(float(((mixed.gradient_nd - mean_nd).abs() / (ULP * size_d + 1e-38)).max()))
        assert mixed.mass_error < 1e-6
        return mixed._replace(gradient_nd=mean_nd)

    loop.advance = stepping(both, Outers(setting.outer, loop.theta_nd))
    loop.run()
    ticks = parse_graph("base(k=1)").period(n)
    assert len(seen) == 3
    assert 0 < max(seen) <= 2 * (ticks + 2)


@pytest.mark.parametrize(
    "exchange",
    [
        Gather("fednova(cap=99)"),
        PushSum(2, loss=0.2),
        PushSum(loss=0.2, ledger=False),
        PushSum(flow="int8", loss=0.2),
        Pairs(loss=0.2),
        Pairs(radius=1.0, attack="gaussian(scale=100)", liars=2),
        Persistent(loss=0.2),
        Accelerated(),
    ],
    ids=lambda exchange: exchange.kind,
)
def test_one_setting_has_one_outcome(exchange):
    outer = "gasloc(lr=0.7,gamma=0.6)" if isinstance(exchange, Accelerated) else NESTEROV
    setting = tiny(exchange, outer, paces=(Pace(2, 2), Pace(1, 1)))
    loops = [MixLoop(setting) for _ in range(2)]
    first, second = (loop.run() for loop in loops)
    assert first._replace(wall_s=0) == second._replace(wall_s=0)
    assert torch.equal(loops[0].theta_nd, loops[1].theta_nd)
    assert [index for index, _ in first.curve] == [2, 3]
    assert len(first.mean_model) == 2
    assert math.isfinite(first.loss)


def test_members_of_one_exact_run_learn_what_gather_learns():
    exact, gather = (mix(tiny(exchange, rounds=6)) for exchange in (PushSum(), Gather()))
    assert exact.loss == pytest.approx(gather.loss, rel=1e-4)
    assert exact.apart < 1e-3
    assert gather.apart == 0
    assert gather.worst == gather.loss == gather.mean_loss


def test_members_train_at_their_own_pace_on_their_own_samples():
    setting = tiny(Gather(), members=4, paces=(Pace(3, 2), Pace(1, 1)))
    loop = MixLoop(setting)
    phi_nd = loop.crew.train(loop.theta_nd, 1)
    assert loop.crew.claims == [Claim(3, 96), Claim(1, 16)] * 2
    whole = MixLoop(replace(setting, paces=(Pace(3, 2),)))
    alike_nd = whole.crew.train(whole.theta_nd, 1)
    movement_nd, whole_nd = phi_nd - loop.theta_nd, alike_nd - whole.theta_nd
    for i in (0, 2):
        assert float((movement_nd[i] - whole_nd[i]).norm()) < 1e-3 * float(whole_nd[i].norm())
    for i in (1, 3):
        assert 0 < float(movement_nd[i].norm()) < 0.9 * float(whole_nd[i].norm())


@pytest.mark.parametrize("ticks", [1, 2])
def test_the_mean_under_gasloc_takes_dilocos_steps_with_its_gamma_as_momentum(ticks):
    loop = MixLoop(tiny(Accelerated(ticks), "gasloc(lr=0.7,gamma=0.6)", rounds=5, members=8))
    mean_d, buffer_d, moved = loop.theta_ref_d.double(), 0.0, 0.0
    for number in range(1, 6):
        before_nd = loop.theta_nd
        loop.round(number)
        delta_d = (before_nd - loop.phi_nd).double().mean(0)
        buffer_d = 0.6 * buffer_d + delta_d
        mean_d = mean_d - 0.7 * (delta_d + 0.6 * buffer_d)
        moved = max(moved, float((mean_d - loop.theta_ref_d).norm()))
        assert float((loop.theta_nd.double().mean(0) - mean_d).norm()) < 1e-5 * moved
    assert loop.apart() > 0.05


def test_gasloc_on_a_complete_graph_is_everybodys_mean():
    loop = MixLoop(tiny(Accelerated(1, "complete"), "gasloc(lr=0.7)", members=5))
    loop.round(1)
    moved_d = (loop.theta_ref_d - loop.phi_nd).mean(0)
    assert torch.allclose(loop.theta_nd, (loop.theta_ref_d - 0.7 * moved_d).expand(5, -1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("loss", [0.0, 0.3])
def test_persistent_mass_has_a_mean_that_takes_dilocos_steps(loss):
    """I-10, over a run: with mass under way counted, on what the members really trained, whatever is lost."""
    setting = tiny(Persistent(loss=loss), rounds=6, members=8)
    loop = MixLoop(setting)
    mean_d, buffer_d, moved, weights = loop.theta_ref_d.double(), 0.0, 0.0, []
    for number in range(1, 7):
        before_nd = loop.theta_nd
        loop.round(number)
        delta_d = (before_nd - loop.phi_nd).double().mean(0)
        buffer_d = 0.6 * buffer_d + delta_d
        mean_d = mean_d - 0.7 * (delta_d + 0.6 * buffer_d)
        moved = max(moved, float((mean_d - loop.theta_ref_d).norm()))
        weights.append(float((loop.theta_nd.double().mean(0) - mean_d).norm()))
    assert loop.mass_error_max < 1e-6
    if not loss:  # weights stayed 1: the mean of models is the mean of mass
        assert max(weights) < 1e-5 * moved
        assert loop.apart() > 0.1
    else:
        assert 1e-4 * moved < max(weights) < 0.5 * moved


# Exchanges


@pytest.mark.parametrize(
    "exchange",
    [
        PushSum(),
        PushSum(1),
        PushSum(2, graph="od-equidyn"),
        PushSum(3, graph="ring"),
        Pairs(),
        Pairs(2, graph="base(k=1)"),
        Pairs(radius=0.1),
    ],
)
@pytest.mark.parametrize("n", [2, 5, 8])
def test_the_mean_of_gradients_is_the_mean_movement_however_inexact_the_exchange(exchange, n):
    """So the mean model follows DiLoCo's recursion exactly (I-10); members differ around it."""
    for number in (1, 2):
        round_ = found(n, 9, number=number)
        gradient_nd = gradients(exchange, round_).gradient_nd
        moved_d = (round_.theta_nd - round_.phi_nd).mean(0)
        assert torch.allclose(gradient_nd.mean(0), moved_d, rtol=0, atol=1e-13)


def test_one_inexact_tick_leaves_members_apart_and_a_whole_period_does_not():
    round_ = found(8, 9)
    mean_d = round_.phi_nd.mean(0)
    distance = [
        float((round_.theta_nd - gradients(PushSum(ticks), round_).gradient_nd - mean_d).norm()) for ticks in (1, 2, 3)
    ]
    assert distance[0] > distance[1] > 0.1
    assert distance[2] < 1e-13


def test_pairs_move_to_the_plain_mean_of_the_pair_or_less_far_when_clipped():
    setting, round_ = tiny(Pairs(), members=5), found(5, 9)
    (mixing,) = plan_round(parse_graph("random-matching"), 5, 1, run_id=setting.run_id, round_index=1)
    plain_nd = gradients(Pairs(), round_).gradient_nd
    clipped_nd = gradients(Pairs(radius=0.01), round_).gradient_nd
    for i, partner in enumerate(partners_of(mixing)):
        moved_d = round_.theta_nd[i] - round_.phi_nd[i]
        if partner is None:
            assert torch.allclose(plain_nd[i], moved_d, rtol=0, atol=1e-13)
            continue
        half_d = (round_.phi_nd[i] + round_.phi_nd[partner]) / 2
        assert torch.allclose(round_.theta_nd[i] - plain_nd[i], half_d, rtol=0, atol=1e-13)
        assert 0 < float((clipped_nd[i] - moved_d).norm()) < 0.1 * float((plain_nd[i] - moved_d).norm())


def test_who_hears_nothing_stays_where_it_is():
    setting = tiny(Pairs(loss=0.5), members=8, seed=4)
    round_ = found(8, 9, number=3)
    lost = lost_messages(setting, 0.5, 3)[0]
    (mixing,) = plan_round(parse_graph("random-matching"), 8, 1, run_id=setting.run_id, round_index=3)
    gradient_nd = gradients(Pairs(loss=0.5), round_, seed=4).gradient_nd
    stayed = [
        torch.allclose(gradient_nd[i], round_.theta_nd[i] - round_.phi_nd[i], rtol=0, atol=1e-13) for i in range(8)
    ]
    assert stayed == [bool(lost[partner, i]) for i, partner in enumerate(partners_of(mixing))]
    assert 0 < sum(stayed) < 8


def test_the_ledger_brings_lost_mass_home_and_the_naive_form_forgets_it():
    round_ = found(16, 9, number=2)
    kept, naive = (gradients(PushSum(loss=0.2, ledger=ledger), round_) for ledger in (True, False))
    assert kept.mass_error < 1e-13
    assert naive.mass_error > 0.1
    assert not torch.equal(kept.gradient_nd, naive.gradient_nd)


def test_weights_make_exact_push_sum_the_weighted_mean():
    round_, steps = found(6, 9), [4, 1, 2, 8, 3, 2]
    gradient_nd = gradients(PushSum(weights="steps(cap=99)"), round_, claims_of(*steps)).gradient_nd
    share_n1 = torch.tensor(steps, dtype=torch.float64)[:, None] / sum(steps)
    assert torch.allclose(gradient_nd, round_.theta_nd - (share_n1 * round_.phi_nd).sum(0), rtol=0, atol=1e-13)


def test_fednova_scales_progress_and_not_the_pull_towards_the_others():
    round_, claims = found(6, 9), claims_of(4, 1, 2, 8, 3, 2)
    scale_n = fednova(cap=99).scale(claims)
    assert max(scale_n) > 2 * min(scale_n)
    gradient_nd = gradients(PushSum(weights="fednova(cap=99)"), round_, claims).gradient_nd
    scaled_nd = torch.tensor(scale_n, dtype=torch.float64)[:, None] * (round_.theta_nd - round_.phi_nd)
    expected_nd = round_.theta_nd - round_.theta_nd.mean(0) + scaled_nd.mean(0)
    assert torch.allclose(gradient_nd, expected_nd, rtol=0, atol=1e-13)


@pytest.mark.parametrize("weights", ["uniform", "steps(cap=99)", "tokens(cap=999)", "fednova(cap=99)"])
def test_from_one_anchor_exact_push_sum_and_gather_agree_under_every_policy(weights):
    round_, claims = found(6, 999, apart=0.0, dtype=torch.float32), claims_of(4, 1, 2, 8, 3, 2)
    gathered_nd, mixed_nd = (
        gradients(e, round_, claims).gradient_nd for e in (Gather(weights), PushSum(weights=weights))
    )
    assert float((gathered_nd - mixed_nd).abs().max()) < 64 * ULP * 10


@pytest.mark.parametrize(("spec", "levels"), [("int8", 127), ("int4", 7)])
def test_flows_conserve_the_mean_and_miss_it_by_what_the_codec_rounds(spec, levels):
    round_ = found(8, SCHEMA.numel, dtype=torch.float32)
    fp32_nd, mixed = gradients(PushSum(), round_).gradient_nd, gradients(PushSum(flow=spec), round_)
    off = float((mixed.gradient_nd - fp32_nd).double().square().mean().sqrt())
    step = float((round_.phi_nd - round_.theta_ref_d).abs().max()) / levels
    assert step / 20 < off < step
    assert float((mixed.gradient_nd - fp32_nd).mean(0).abs().max()) < 1e-5
    assert mixed.mass_error < 1e-6


def test_lost_flows_come_home():
    round_ = found(8, SCHEMA.numel, dtype=torch.float32)
    mixed = gradients(PushSum(flow="int8", loss=0.3), round_)
    moved_d = (round_.theta_nd - round_.phi_nd).mean(0)
    ratio_error_d = mixed.gradient_nd.mean(0) - moved_d  # weights are unequal now: no more than the spread
    assert mixed.mass_error < 1e-6
    assert 0 < float(ratio_error_d.abs().mean()) < 0.5


# Liars


@pytest.mark.parametrize("attack", ["sign-flip(scale=10)", "gaussian(scale=100)", "scale-poisoning", "dissensus"])
def test_clipped_pairs_move_no_honest_member_further_than_its_radius(attack):
    round_ = found(6, SCHEMA.numel, dtype=torch.float32, apart=0.1)
    plain_nd, clipped_nd = (
        gradients(Pairs(radius=radius, attack=attack, liars=2), round_).gradient_nd for radius in (None, 1.0)
    )
    own_nd = round_.theta_nd - round_.phi_nd
    radius_n = (round_.phi_nd - round_.theta_ref_d).norm(dim=1)  # nothing was seen yet: the own movement
    moved_n = (clipped_nd - own_nd).norm(dim=1)
    assert (moved_n[:4] <= 0.5001 * radius_n[:4]).all()
    if attack != "dissensus":  # which is no larger than the members' distances, and worse for it
        assert float((plain_nd - own_nd)[:4].norm(dim=1).max()) > 2 * float(moved_n.max())


def test_entries_beyond_the_limit_are_refused_and_their_victim_stays():
    setting, round_ = tiny(Pairs(), members=4), found(4, 9, dtype=torch.float32)
    (mixing,) = plan_round(parse_graph("random-matching"), 4, 1, run_id=setting.run_id, round_index=1)
    gradient_nd = gradients(Pairs(attack="huge(coordinates=all)", liars=1), round_).gradient_nd
    victim = partners_of(mixing)[3]
    own_d = round_.theta_nd[victim] - round_.phi_nd[victim]
    assert torch.allclose(gradient_nd[victim], own_d, rtol=0, atol=1e-5)


def test_dissensus_turns_its_victim_away_from_the_honest_mean():
    setting, round_ = tiny(Pairs(), members=4), found(4, 9)
    (mixing,) = plan_round(parse_graph("random-matching"), 4, 1, run_id=setting.run_id, round_index=1)
    gradient_nd = gradients(Pairs(attack="dissensus", liars=1), round_).gradient_nd
    victim = partners_of(mixing)[3]
    mean_d = round_.phi_nd[:3].mean(0)
    after_d = round_.theta_nd[victim] - gradient_nd[victim]
    assert float((after_d - mean_d).norm()) == pytest.approx(1.5 * float((round_.phi_nd[victim] - mean_d).norm()))


def test_liars_count_in_nobodys_loss():
    loop = MixLoop(tiny(Pairs(attack="zero", liars=2)))
    loop.theta_nd[3:] += 100.0
    members, mean = loop.losses()
    assert len(members) == 3
    assert max(members) < 7
    assert mean == pytest.approx(members[0])


def test_a_run_that_liars_destroy_ends_with_an_infinite_loss():
    outcome = mix(tiny(Pairs(attack="scale-poisoning", liars=2), rounds=8))
    assert outcome.loss == outcome.mean_loss == outcome.worst == math.inf
    assert outcome.curve[-1][0] == 8


# Settings and tables


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PushSum(-1), "not negative"),
        (lambda: PushSum(loss=1.0), "loss of messages"),
        (lambda: PushSum(ledger=False), "without a ledger"),
        (lambda: PushSum(flow="int8", loss=0.1, ledger=False), "without a ledger"),
        (lambda: Persistent(ledger=False), "without a ledger"),
        (lambda: Accelerated(0), "at least one tick"),
        (lambda: tiny(Accelerated()), "nesterov"),
        (lambda: tiny(Persistent(), "delayed-nesterov(lr=1.0,momentum=0.5,delay=2)"), "delayed"),
        (lambda: PushSum(graph="torus"), "torus"),
        (lambda: Gather("by-luck"), "by-luck"),
        (lambda: Pairs(attack="sign-flip"), "an attack has liars"),
        (lambda: Pairs(liars=2), "an attack has liars"),
        (lambda: Pairs(attack="label-flip", liars=2), "layers"),
        (lambda: Pairs(attack="dissensus(size=2)", liars=2), "size"),
        (lambda: Pairs(radius=0.0), "radius"),
        (lambda: tiny(Gather(), rounds=0), "at least one"),
        (lambda: tiny(Gather(), paces=(Pace(0, 1),)), "at least one"),
        (lambda: tiny(Gather(), paces=(Pace(1, 1),) * 6), "a member for each pace"),
        (lambda: tiny(Gather(), "schedule-free(lr=1.0)"), "judged by their parameters"),
        (lambda: tiny(Pairs(attack="zero", liars=5)), "must be honest"),
    ],
)
def test_settings_that_mean_nothing_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_pairs_need_matchings():
    with pytest.raises(Exception, match="matchings"):
        Pairs(graph="ring")


def test_a_table_compares_seed_by_seed_and_says_what_was_lost(tmp_path):
    runs = FinishedRuns(tmp_path / "runs.jsonl", type(OUTCOME), lambda setting: OUTCOME)
    entries = [
        Entry("g", "gather", tiny(Gather()), "gather"),
        Entry("g", "push-sum", tiny(PushSum()), "gather"),
        Entry("g", "pairs", tiny(Pairs()), "gather"),
    ]

    def seeded(entry, seed):
        return replace(entry.setting, seed=seed)

    for seed, losses in {0: (2.0, 2.2, 2.1), 1: (4.0, 4.2, math.inf)}.items():
        for entry, loss in zip(entries, losses, strict=True):
            runs.add(seeded(entry, seed), OUTCOME._replace(curve=((3, loss),), mean_model=(loss / 2,)))
    again = FinishedRuns(tmp_path / "runs.jsonl", type(OUTCOME), lambda setting: OUTCOME)
    for known in (runs, again):
        gather, push_sum, pairs = lines_of(known, entries, (0, 1, 2), seeded)
        assert gather.members.mean == 0
        assert push_sum.members.mean == pytest.approx(0.075)
        assert push_sum.members.spread == pytest.approx(0.05 / math.sqrt(2))
        assert push_sum.mean_loss == pytest.approx(1.6)
        assert push_sum.members_by_seed == pytest.approx((0.1, 0.05))
        assert pairs.members.mean == math.inf
        assert [row["members %"] for row in rows_of([gather, push_sum, pairs])] == [0, pytest.approx(7.5), None]
        assert push_sum.seeds == 2
        assert cells_of([push_sum])[0]["mean_model_loss"] == push_sum.mean_loss
    drawing = draw_gaps([gather, push_sum, pairs], name="gaps", title="Gaps", caption="In percent.")
    (axes,) = drawing.figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["gather", "push-sum", "pairs"]
    assert [text.get_text() for text in axes.texts] == ["lost", "lost"]
    shown = [float(points.get_xdata()[0]) for points in axes.lines if points.get_marker() == "o"]
    assert shown == pytest.approx([0, 0, 7.5, 7.5])


OUTCOME = mix(tiny(Gather(), rounds=1))
