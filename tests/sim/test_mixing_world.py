"""Real nodes that mix, in virtual time: push-sum and pairs against gather, and everything that can happen to members."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from worlds import by_hand, group, run_to_the_end, scenario, train

from farflung.node.data import RoundView
from farflung.node.mixing_check import default_mixing
from farflung.node.mixing_codec import ALIGN
from farflung.protocol.errors import ConfigError
from farflung.protocol.mixing.settings import Mixing
from farflung.sim.draw import Draw
from farflung.sim.report import write_report
from farflung.sim.scenario import Attack, Fault, Network

HERE = Path(__file__).parent
MIX = {"settle_ms": 1_500, "silence_ms": 3_000}
QUICK = {"silence_ms": 2_000, "settle_ms": 500}


class Seen:
    """What members' own parameters were when they trained on, and what every round log said."""

    def __init__(self, world):
        self.theta, self.logs, self.lives = {}, [], world.lives
        world.adopters.append(self._adopted)
        world.watchers.append(lambda life, certificate, trial: self.logs.append((life.index, certificate, trial)))

    def _adopted(self, life, view: RoundView):
        held = life.node.held
        self.theta[view.round_index - 1, life.index] = held.theta_d.numpy().copy()

    def after(self, round_index):
        """(member, θ) after a round."""
        return {member: theta for (index, member), theta in self.theta.items() if index == round_index}

    def numbers(self, name):
        return [trial.numbers[name] for _, _, trial in self.logs if name in trial.numbers]


def mixing_of(mode, **more):
    return Mixing(**(default_mixing(mode).to_json() | MIX | more))


def mixed(folder, n, *, mode="push-sum", codec="fp32", rounds=3, mixing=None, prepare=None, **more):
    """A world of n members who mix, run to its end; and what was seen."""
    folder.mkdir(exist_ok=True)
    run = {"mode": mode, "codec": codec, "rounds": rounds, "mixing": mixing_of(mode, **(mixing or {})), **more}
    world = by_hand(folder, n, run=run)
    seen = Seen(world)
    if prepare is not None:
        prepare(world)
    assert run_to_the_end(world)
    return world, seen


def conserved(seen, most=1e-5):
    """No round log says that mass was lost, and no member's books contradict another's."""
    assert seen.numbers("mass_error")
    assert max(seen.numbers("mass_error")) <= most
    for life in seen.lives:
        if life.node is not None:
            assert not life.node.anchor.audited.discrepancies


def trained(world):
    """Rounds that trained, in order."""
    return [index for index in sorted(world.certificates) if world.certificates[index].manifest.payloads]


# -- the mathematics --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3, 5])
def test_a_whole_period_of_an_exact_graph_is_what_gathering_gives(tmp_path, n):
    """Replicas after every round: equal among members, and to the anchor of a gather run on the same batches, to the
    rounding of a few fp32 sums."""
    outer = "nesterov(lr=0.7,momentum=0.6)"
    world, seen = mixed(tmp_path / "mixed", n, outer=outer, rounds=4)
    (tmp_path / "gathered").mkdir()
    plain = by_hand(tmp_path / "gathered", n, run={"rounds": 4, "outer": outer})
    gathered = {}
    plain.watchers.append(
        lambda life, item, _: gathered.setdefault(item.manifest.trained, life.node.anchor.theta_d.numpy().copy())
    )
    assert run_to_the_end(plain)
    conserved(seen)
    assert [len(world.certificates[index].manifest.payloads) for index in trained(world)] == [n] * 4
    start_d = world.task.build_model().weight.detach().numpy()[0]
    for index in trained(world):
        found, number = seen.after(index), world.certificates[index].manifest.trained
        assert sorted(found) == [*range(n)]
        moved = np.abs(gathered[number] - start_d).max()
        assert moved > 0.01
        for theta_d in found.values():
            np.testing.assert_allclose(theta_d, gathered[number], rtol=0, atol=4e-7 * max(1.0, moved))


@pytest.mark.parametrize(
    ("mode", "codec", "features"), [("push-sum", "int8", 16), ("pairs", "int8", 16), ("push-sum", "fp32", 2 * ALIGN)]
)
def test_every_kind_of_mixing_trains_to_the_end_with_all_mass_there(tmp_path, mode, codec, features):
    """int8 along edges with copies, pairs, and two fragments."""
    fragments = 2 if features > ALIGN else 1
    options = {"features": features, "samples": 64, "batch": 4}
    world, seen = mixed(tmp_path, 4, mode=mode, codec=codec, mixing={"fragments": fragments}, task_options=options)
    numbers = [manifest.trained for manifest in (item.manifest for item in world.certificates.values())]
    assert max(numbers) == 3
    if mode == "push-sum":
        conserved(seen)
    last = [*seen.after(trained(world)[-1]).values()]
    assert len(last) == 4
    spread = max(np.abs(one - other).max() for one in last for other in last)
    moved = np.abs(last[0] - world.task.build_model().weight.detach().numpy()[0]).max()
    assert spread < (0.03 if codec == "int8" and mode == "push-sum" else 1e-6 if mode == "push-sum" else 1.0) * moved


def test_weights_of_push_sum_are_exact_and_numerators_within_their_rounding(tmp_path):
    """Σw of what members held after every mixing, and of what they began with."""
    held = {}

    def prepare(world):
        def note(life, view):
            mixer = life.node.mixer
            if mixer.account.round_index == view.round_index - 1:
                held[life.index, view.round_index - 1] = float(mixer.account.books[0].weight)

        world.adopters.append(note)

    world, seen = mixed(tmp_path, 5, rounds=4, prepare=prepare)
    for index in trained(world):
        weights = [weight for (_, round_index), weight in held.items() if round_index == index]
        assert len(weights) == 5
        assert sum(weights) == pytest.approx(5.0, abs=5e-9)
        assert weights == pytest.approx([1.0] * 5, abs=1e-9)
    conserved(seen)


# -- one world per seed -----------------------------------------------------------------------------------------------


def eventful(codec="int8", mode="push-sum"):
    """Jitter, lost calls, a crash, a partition, a slow line."""
    return scenario(
        rounds=4,
        members=(group(3, jitter=0.3, speed_sigma=0.2), group(1, name="slow", up_mbit=Draw.fixed(0.2), jitter=0.1)),
        run={"codec": codec, "mode": mode, "mixing": QUICK, "outer": "nesterov(lr=0.7,momentum=0.6)"},
        network=Network(message_loss=0.02),
        faults=(Fault("crash", 2.2, members=(2,), for_s=1.0), Fault("partition", 4.0, members=(1,), for_s=1.5)),
    )


TELL = """
import sys
sys.path.insert(0, sys.argv[1])
from test_mixing_world import eventful
from worlds import train
result = train(eventful(), seed=int(sys.argv[2])).result
print(result.events_digest, [(item.loss, item.validation, item.end_s) for item in result.rounds])
"""


def test_a_seed_makes_one_world_of_mixing_members_whatever_the_process():
    environment = os.environ | {"PYTHONHASHSEED": "77", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", TELL, str(HERE), "3"]
    process = subprocess.Popen(command, env=environment, cwd=HERE.parents[1], stdout=subprocess.PIPE, text=True)
    here, other = train(eventful(), seed=3).result, train(eventful(), seed=4).result
    digest, rounds = process.communicate(timeout=120)[0].split(maxsplit=1)
    assert process.returncode == 0
    assert digest == here.events_digest != other.events_digest
    assert rounds.strip() == str([(item.loss, item.validation, item.end_s) for item in here.rounds])


# -- members that are slow, late, gone or back -------------------------------------------------------------------------


def ran(run):
    """It came to its end, and no member stopped because of its books."""
    assert run.result.finished
    return run


def mixing_run(rounds=6, n=4, *, mode="push-sum", codec="fp32", run=None, members=None, **more):
    inner = {"mode": mode, "codec": codec, "mixing": QUICK, **(run or {})}
    return scenario(n, rounds=rounds, run=inner, members=members, **more)


def watched(what, prepare=None, **more):
    """The run, and what was seen in it."""
    kept = []

    def look(world):
        kept.append(Seen(world))
        if prepare is not None:
            prepare(world)

    run = ran(train(what, prepare=look, **more))
    return run, kept[0]


def close(found, most):
    """Members' parameters differ by at most this."""
    values = [*found.values()]
    assert max(np.abs(one - values[0]).max() for one in values) <= most


def test_a_straggler_is_left_out_of_rounds_and_weighs_less_when_it_comes_back():
    groups = (group(3), group(1, name="slow", step_ms=Draw.fixed(900)))
    run, seen = watched(mixing_run(rounds=8, members=groups, run={"grace_s": 0.2, "inner_steps": 2}))
    slow = run.world.lives[3].peer_id
    listed = {index: [item.peer_id for item in run.world.certificates[index].manifest.payloads] for index in seen_rounds(run)}
    assert any(slow not in peers for peers in listed.values())
    back = [index for index, peers in listed.items() if slow in peers and len(peers) > 1]
    shares = {
        index: trial.verdicts[slow].share * len(listed[index])
        for _, certificate, trial in seen.logs
        if (index := certificate.manifest.round_index) in back
    }
    late = [index for index in back if any(slow not in listed[one] for one in listed if one == index - 1)]
    assert late
    assert all(shares[index] < 0.8 for index in late)
    conserved(seen)


def seen_rounds(run):
    return [index for index, item in sorted(run.world.certificates.items()) if item.manifest.payloads]


def test_members_who_have_not_trained_receive_without_mass():
    """A member whose update is wild takes part with weight 0 and ends where the others are."""

    def prepare(world):
        def change(life, result):
            result.delta_d.mul_(1e9)
            return result._replace(norm=result.norm * 1e9) if result.round_index == 4 else _back(result)

        world.lives[1].change = lambda life, result: change(life, result) if result.round_index == 4 else result

    run, seen = watched(mixing_run(rounds=6), prepare)
    wild = run.world.lives[1].peer_id
    certificate = run.world.certificates[4].manifest
    claims = {item.peer_id: item.steps for item in certificate.payloads}
    assert claims[wild] == 0
    assert all(steps == 4 for peer, steps in claims.items() if peer != wild)
    close(seen.after(4), 1e-6)
    conserved(seen)


def _back(result):
    return result
