"""Real nodes that mix, in virtual time: push-sum and pairs against gather, and what can happen to members."""

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from worlds import Free, by_hand, group, run_to_the_end, scenario, train

from farflung.node.data import RoundView
from farflung.node.mixing_check import default_mixing
from farflung.node.mixing_codec import ALIGN
from farflung.protocol.errors import ConfigError
from farflung.protocol.mixing.settings import Mixing
from farflung.sim.draw import Draw
from farflung.sim.report import write_html
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


def listings(run):
    """Round -> members whose accounts its certificate lists, of rounds that trained."""
    found = {index: item.manifest for index, item in sorted(run.world.certificates.items())}
    return {index: [item.peer_id for item in one.payloads] for index, one in found.items() if one.payloads}


def test_a_straggler_is_left_out_of_rounds_and_weighs_less_when_it_comes_back():
    """Its share is m / (1 + s) of the others' after s missed rounds; then it is where they are."""
    groups = (group(3), group(1, name="slow", step_ms=Draw.fixed(900)))
    run, seen = watched(mixing_run(rounds=8, members=groups, run={"grace_s": 0.2, "inner_steps": 2}))
    slow, listed = run.world.lives[3].peer_id, listings(run)
    missed, judged = 0, 0
    for index, peers in listed.items():
        shares = next(trial.verdicts for _, item, trial in seen.logs if item.manifest.round_index == index)
        if slow in peers and len(peers) > 1:
            others = max(shares[peer].share for peer in peers if peer != slow)
            assert shares[slow].share == pytest.approx(others / (1 + missed), rel=1e-9)
            judged += missed > 0
            close(seen.after(index), 2e-6)
        missed = 0 if slow in peers else missed + 1
    assert judged
    conserved(seen)


def test_a_member_whose_update_is_wild_receives_without_mass():
    def prepare(world):
        world.lives[1].change = lambda life, result: (
            replace(result, norm=math.nan) if result.round_index == 4 else result
        )

    run, seen = watched(mixing_run(rounds=6), prepare)
    claims = {item.peer_id: item.steps for item in run.world.certificates[4].manifest.payloads}
    assert claims.pop(run.world.lives[1].peer_id) == 0
    assert set(claims.values()) == {4}
    close(seen.after(4), 1e-6)
    conserved(seen)


def test_a_crash_loses_one_update_and_the_member_is_back_among_the_others():
    run, seen = watched(mixing_run(rounds=8, faults=(Fault("crash", 2.5, members=(2,), for_s=1.5),)))
    back = run.world.lives[2].peer_id
    assert run.world.lives[2].lives == 2
    assert back in listings(run)[seen_last(run)]
    close(seen.after(seen_last(run)), 2e-6)
    conserved(seen)


def seen_last(run):
    return max(listings(run))


def test_a_restart_between_announcement_and_certificate_brings_no_mass_from_nowhere():
    """The account on disk is announced again, but φ went with the process: it is listed, and sits out."""
    felled, afterwards = [], []

    def prepare(world):
        life = world.lives[2]

        def watch(node):
            record = node.store.journal.record

            def recorded(kind, data):
                record(kind, data)
                if kind == "own" and world.certified >= 3 and not felled:
                    felled.append(world.certified + 1)
                    world.channels.machines[2].die()
                    world.later(fell())

            node.store.journal.record = recorded
            if life.lives > 1:
                begin = node.mixer.begin
                node.mixer.begin = lambda manifest: (
                    begin(manifest),
                    afterwards.append((manifest.round_index, node.mixer.busy, node.mixer.account.books)),
                )

        async def fell():
            await life.crash()
            life.start()

        life.on_open = watch

    full = {"quorum_percent": 100, "grace_s": 30.0, "deadline_floor_s": 60.0, "deadline_ceiling_s": 600.0}
    run, seen = watched(mixing_run(rounds=7, run=full), prepare)
    (index,) = felled
    assert run.world.lives[2].peer_id in listings(run)[index]
    assert afterwards[0] == (index, False, ())
    assert afterwards[1][1]
    close(seen.after(seen_last(run)), 2e-6)
    conserved(seen)


def test_a_member_that_leaves_is_released_and_nobody_waits_for_it():
    run, seen = watched(mixing_run(rounds=6, faults=(Fault("leave", 2.5, members=(2,)),)))
    last = run.world.certificates[max(run.world.certificates)].manifest
    assert run.world.lives[2].peer_id not in last.member_of
    assert [len(peers) for peers in listings(run).values()][-2:] == [3, 3]
    conserved(seen)


def test_everybody_restarts_at_once_and_replicas_come_back_from_disk():
    """What they train on from is what they had saved, not an old reference."""
    saved, found = {}, {}

    def prepare(world):
        for life in world.lives:
            life.on_open = lambda node, life=life: watch(life, node)

        def watch(life, node):
            write, reached = node.store.write_local, node.local.reached

            def written(tensors, meta):
                saved[life.index] = {name: tensor.clone() for name, tensor in tensors.items()}
                write(tensors, meta)

            def arrived(tip):
                reached(tip)
                if life.lives > 1:
                    same = {name: tensor.clone() for name, tensor in node.held.tensors().items()}
                    found[life.index] = (same, node.held.trained, node.anchor.reference_trained, saved.get(life.index))

            node.store.write_local, node.local.reached = written, arrived

    fault = Fault("crash", 4.0, members=(0, 1, 2, 3), for_s=1.0)
    run = {"snapshot_rounds": 1, "outer": "nesterov(lr=0.7,momentum=0.6)"}
    run, seen = watched(mixing_run(rounds=8, faults=(fault,), run=run), prepare)
    assert sorted(found) == [0, 1, 2, 3]
    for tensors, trained_rounds, reference, before in found.values():
        assert trained_rounds >= 2 > reference
        assert tensors.keys() == before.keys() > {"theta"}
        assert all(bool((tensors[name] == before[name]).all()) for name in tensors)
    close(seen.after(seen_last(run)), 5e-3)  # some lost a round of momentum
    conserved(seen)


def test_a_late_joiner_starts_from_a_reference_that_was_published_and_ends_where_the_others_are():
    groups = (group(3), group(1, name="late", join_after_s=Draw.fixed(6.0)))
    first = {}

    def prepare(world):
        world.adopters.append(
            lambda life, view: first.setdefault(life.index, (view.trained, life.node.anchor.reference_trained))
        )

    mixing = {**QUICK, "reference_rounds": 3}
    run, seen = watched(mixing_run(rounds=14, members=groups, run={"mixing": mixing}), prepare)
    references = [item.manifest.trained for _, item, trial in seen.logs if trial.numbers["new_reference"]]
    assert len({*references}) >= 3
    trained_s, reference = first[3]
    assert trained_s > reference >= 3
    assert trained_s - reference <= 3 + 2
    close(seen.after(seen_last(run)), 4e-6)
    conserved(seen)


@pytest.mark.parametrize("mode", ["push-sum", "pairs"])
def test_lost_calls_and_a_slow_line_cost_time_and_no_mass(mode):
    groups = (group(3), group(1, name="narrow", up_mbit=Draw.fixed(0.05)))
    run, seen = watched(
        mixing_run(rounds=4, mode=mode, codec="int8", members=groups, network=Network(message_loss=0.1), limit_h=1.0)
    )
    if mode == "push-sum":
        conserved(seen)
    assert len(run.result.rounds) == 4


def test_what_members_keep_does_not_grow_with_the_rounds():
    """Accounts and references that no snapshot needs are dropped, and no vector stays on offer."""
    disks, offers = [], []

    def prepare(world):
        def look(life, view):
            blobs = [*life.node.store.blobs.blobs()]
            disks.append((view.round_index, len(blobs), len([*life.node.store.snapshots.rounds()])))
            offers.append(len(life.node.mixer._lent))

        world.adopters.append(look)

    mixing = {**QUICK, "reference_rounds": 2}
    run, _ = watched(mixing_run(rounds=24, n=3, run={"mixing": mixing, "snapshot_rounds": 2}), prepare)
    half = max(listings(run)) // 2
    early = max(count for index, count, _ in disks if index <= half)
    late = max(count for index, count, _ in disks if index > half)
    assert late <= early <= 3 * 9 + 6
    assert max(count for _, _, count in disks) <= 3
    assert max(offers) <= 2 * 2


def test_the_last_mixing_is_done_when_a_run_ends():
    run, seen = watched(mixing_run(rounds=5))
    last = seen_last(run)
    assert sorted(seen.after(last)) == [0, 1, 2, 3]
    close(seen.after(last), 1e-6)


# -- scenarios --------------------------------------------------------------------------------------------------------


def test_a_scenario_reports_losses_of_members_own_parameters_and_time_spent_mixing(tmp_path):
    what = mixing_run(rounds=5, codec="int8")
    run, _ = watched(what)
    result = run.result
    assert [item.payload_bytes for item in result.rounds] == [result.rounds[0].payload_bytes] * 5
    assert 16 <= result.rounds[0].payload_bytes <= 16 * 4
    losses = [item.validation for item in result.rounds]
    assert losses[-1] < 0.9 * losses[0]
    for item in result.rounds:
        assert sum(blame.seconds for blame in item.blame) == pytest.approx(item.end_s - item.start_s)
    mixing_s = sum(blame.seconds for item in result.rounds for blame in item.blame if blame.cause == "mixing")
    assert 0.05 * result.duration_s < mixing_s < 0.6 * result.duration_s
    page = write_html([result], what, tmp_path)
    assert "mixing" in page.read_text(encoding="utf-8")


def test_mixing_members_are_charged_for_encoding_checking_and_stepping(tmp_path):
    class Dear(Free):
        def encode_s(self):
            return 0.5

        def check_s(self):
            return 0.25

        def apply_s(self, rows):
            return 1.0 + 2.0 * rows

    lengths = {}
    for name, costs in (("free", Free()), ("dear", Dear())):

        def charge(world, costs=costs):
            for life in world.lives:
                life._costs = costs

        world, _ = mixed(tmp_path / name, 2, rounds=4, prepare=charge)
        lengths[name] = np.diff([world.applied_s[index][0] for index in trained(world)])
    # Two members meet once: each encodes one parcel, then checks and adds one, then steps: 0.5 + 2.25 + 1.
    assert lengths["dear"] - lengths["free"] == pytest.approx([3.75] * 3, abs=0.12)


def test_a_small_model_that_stands_in_for_a_big_one_is_not_charged_for_bigger_accounts():
    small = ran(train(mixing_run(rounds=3, n=3))).result
    big = ran(train(mixing_run(rounds=3, n=3, model={"params": 16e3}))).result
    sent = [sum(member.bytes_sent for member in result.members) for result in (small, big)]
    parcels = 3 * 3 * 2 * 64  # rounds x members x ticks x bytes of a whole vector
    assert sent[0] - sent[0] % 100 < sent[1] < sent[0] + 1.7 * 1000 * parcels


@pytest.mark.parametrize(
    ("run", "why"),
    [
        ({"mode": "gossip"}, "run.mode is one of"),
        ({"mixing": {"ticks": 2}}, "run.mixing is for mode"),
        ({"mode": "push-sum", "codec": "ef(1)|q2"}, "keeps state"),
        ({"mode": "push-sum", "rule": "geometric-median(f=1)"}, "liars"),
        ({"mode": "push-sum", "mixing": {"tics": 2}}, "has the keys"),
        ({"mode": "push-sum", "mixing": {"ticks": "two"}}, "must be of type int"),
        ({"mode": "push-sum", "mixing": {"graph": "star"}}, "star"),
        ({"mode": "pairs", "mixing": {"graph": "complete", "ticks": 0}}, "mixing"),
    ],
)
def test_a_scenario_that_cannot_mix_is_refused_with_the_reason(run, why):
    with pytest.raises(ConfigError, match=why):
        scenario(4, run={"codec": "fp32", **run})


def test_an_attack_on_what_nobody_sends_there_is_refused():
    with pytest.raises(ConfigError, match="nobody gets others' updates"):
        mixing_run(attacks=(Attack("garbage", members=(1,)),))
    assert mixing_run(attacks=(Attack("sign_flip", members=(1,)),)).run.mode == "push-sum"
