"""What a training loop may rely on: nothing it did is lost or counted twice, and `step` is free between rounds."""

from __future__ import annotations

import gc
import math
import statistics
import subprocess
import sys
import threading
import time
import tracemalloc
from types import SimpleNamespace

import pytest
import torch
from small_world import Player, SmallWorld, eventually
from torch import nn

from farflung.aggregation.outer import norm
from farflung.compression.codec import Link
from farflung.node.assembly import make_anchor
from farflung.node.audit import Audit
from farflung.node.data import RoundView
from farflung.node.entries import encode_entry
from farflung.node.flat import read_parameters, schema_of
from farflung.node.local_phase import SAVE_SHARE, LocalPhase
from farflung.node.mailbox import Adopt, Hurry, LocalResult, Mailbox, Stop
from farflung.node.runtime import SystemClock
from farflung.node.swarm import Swarm
from farflung.protocol.blob import BlobRef
from farflung.protocol.certificate import decode_certificate
from farflung.protocol.effects import Persist
from farflung.protocol.errors import ConfigError
from farflung.protocol.identity import PeerId
from farflung.protocol.phase import Self
from farflung.protocol.round import RoundMachine
from farflung.protocol.rows import Reason, Verdict
from farflung.protocol.statements import Announcement

pytestmark = pytest.mark.usefixtures("quick_peers")


def make_model(features: int = 12) -> nn.Module:
    model = nn.Linear(features, 5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view(parameter.shape))
    return model


def flat(model: nn.Module) -> torch.Tensor:
    values_d = torch.empty(schema_of(model).numel)
    read_parameters(model, values_d)
    return values_d


def nudge(model: nn.Module, amount: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.linspace(-1, 1, parameter.numel()).view(parameter.shape) ** 3, alpha=amount)


# -- the handle alone: a scripted node answers ------------------------------------------------------------------------


class Script:
    """A node without a thread: every local result is answered by the next function of a list."""

    def __init__(self, model: nn.Module, inner_steps: int) -> None:
        theta_d = flat(model)
        self.mailbox = Mailbox()
        self.genesis = SimpleNamespace(inner_steps=inner_steps, schema=schema_of(model))
        self.anchor = SimpleNamespace(theta_d=theta_d, lock=threading.Lock())
        self.answers: list = []
        self.results: list[tuple[int, torch.Tensor, int, int]] = []
        self.round_index = 0
        self.closed = False
        self.adopt(theta_d, keep=False)

    def adopt(self, theta_d: torch.Tensor, *, keep: bool) -> None:
        self.anchor.theta_d = theta_d.clone()
        self.round_index += 1
        me = PeerId(bytes(20))
        view = RoundView(b"run", self.round_index, b"", me, (me,), trained=self.round_index - 1)
        self.mailbox.post(Adopt(view, keep))

    def local_result(self, result: LocalResult) -> None:
        self.results.append((result.round_index, result.delta_d.clone(), result.steps, result.tokens))
        self.answers.pop(0)()

    def check(self) -> None:
        raise AssertionError("training waits for an answer that nobody gives")

    def close(self, *, polite_s: float) -> None:
        self.closed = True


def scripted(inner_steps: int = 2) -> tuple[Script, Swarm, nn.Module]:
    model = make_model()
    script = Script(model, inner_steps)
    return script, Swarm(script, model), model


def test_a_plain_adoption_gives_the_anchor_and_forgets_the_steps():
    script, swarm, model = scripted(2)
    new_d = flat(model) + 3
    script.answers = [lambda: script.adopt(new_d, keep=False)]
    start_d = flat(model)
    for _ in range(2):
        nudge(model, 0.1)
        moved_d = flat(model)
        swarm.step(tokens=5)
    assert torch.equal(flat(model), new_d)
    assert torch.equal(script.results[0][1], start_d - moved_d)
    assert script.results[0][2:] == (2, 10)
    assert (swarm.round_index, swarm.global_step) == (2, 2)


def test_what_was_sent_too_late_stays_in_the_parameters_and_is_sent_again():
    script, swarm, model = scripted(2)
    old_d, new_d = flat(model), flat(model) * 0.5 + 1
    done_d = torch.empty(0)
    script.answers = [lambda: script.adopt(new_d, keep=True), lambda: script.adopt(new_d, keep=False)]
    for _ in range(2):
        nudge(model, 0.25)
        done_d = flat(model)
        swarm.step(tokens=1)
    first, second = script.results
    assert torch.allclose(second[1], first[1], rtol=0, atol=1e-6), "the same progress, relative to the new anchor"
    assert torch.allclose(first[1], old_d - done_d, rtol=0, atol=1e-6)
    assert second[2:] == first[2:] == (2, 2)


def test_an_anchor_that_comes_in_the_middle_keeps_the_progress_and_the_count():
    script, swarm, model = scripted(3)
    old_d, new_d = flat(model), flat(model) * -0.5
    nudge(model, 0.25)
    progress_d = flat(model) - old_d
    script.adopt(new_d, keep=True)
    swarm.step(tokens=4)
    assert torch.allclose(flat(model), new_d + progress_d, rtol=0, atol=1e-6)
    script.answers = [lambda: script.adopt(new_d, keep=False)]
    swarm.step(tokens=4)
    swarm.step(tokens=4)
    round_index, delta_d, steps, tokens = script.results[0]
    assert (round_index, steps, tokens) == (2, 3, 12)
    assert torch.allclose(delta_d, -progress_d, rtol=0, atol=1e-6)


def test_hurry_sends_what_there_is_and_an_old_hurry_does_nothing():
    script, swarm, model = scripted(100)
    script.mailbox.post(Hurry(7))
    swarm.step()
    assert script.results == []
    script.answers = [lambda: script.adopt(flat(model), keep=False)]
    script.mailbox.post(Hurry(1))
    swarm.step()
    assert script.results[0][2] == 2


def test_the_end_of_the_run_and_the_end_of_the_node_reach_the_loop():
    script, swarm, model = scripted(1)
    script.answers = [lambda: (script.adopt(flat(model), keep=False), script.mailbox.post(Stop()))]
    swarm.step()
    assert swarm.finished
    assert swarm.view() is None
    script, swarm, model = scripted(1)
    script.answers = [lambda: script.mailbox.post(Stop(ConfigError("disk full")))]
    with pytest.raises(ConfigError, match="disk full"):
        swarm.step()
    assert script.closed


def test_a_half_precision_model_that_did_nothing_has_no_update():
    model = make_model().to(torch.bfloat16)
    script = Script(model, 1)
    script.adopt(flat(model) / 3, keep=False)
    swarm = Swarm(script, model)
    script.answers = [lambda: script.adopt(flat(model) / 7, keep=False)] * 2
    swarm.step()
    swarm.step()
    assert all(not result[1].any() for result in script.results), "rounding to bfloat16 is nobody's progress"


# -- what is kept of an update, and where -----------------------------------------------------------------------------


@pytest.fixture
def phase_of(tmp_path):
    """A local phase of the founder of a run of one, in round 1."""
    stores = []

    def make(codec: str) -> tuple[LocalPhase, RoundMachine, Mailbox]:
        world = SmallWorld(tmp_path / codec.replace("|", "_").replace("/", "_"), make_model, codec=codec)
        store = world.founder.run(world.genesis.run_id)
        stores.append(store)
        identity, clock, mailbox = world.founder.identity, SystemClock(), Mailbox()
        transport = SimpleNamespace(bytes_sent=0, bytes_received=0)
        audit = Audit(identity.peer_id, clock, transport, store.rounds.append)
        anchor = make_anchor(world.genesis, make_model())
        phase = LocalPhase(world.genesis, store, anchor, clock, mailbox, audit, identity.peer_id)
        first = store.certificate(0)
        assert first is not None
        me = Self(identity.peer_id, identity.public_key, identity.sign, 1 << 20)
        machine = RoundMachine(world.genesis, me, decode_certificate(first))
        machine.begin(0.0)
        return phase, machine, mailbox

    yield make
    for store in stores:
        store.close()


def delta_of(amount: float = 0.01) -> torch.Tensor:
    d = flat(make_model()).numel()
    return torch.linspace(-1, 1, d).sin() * amount


LINK = Link(0.0, 0.0, 0.1, 1)


def result_of(delta_d: torch.Tensor, round_index: int = 1) -> LocalResult:
    return LocalResult(round_index, delta_d, norm(delta_d), 3, 30, 1.0, 0.1)


def kept_by_training(phase: LocalPhase, machine: RoundMachine, mailbox: Mailbox) -> bool:
    phase.welcome(machine)
    notice = mailbox.take(0.0)
    assert isinstance(notice, Adopt)
    return notice.keep


def sent_part(phase: LocalPhase, source) -> torch.Tensor:
    anchor = phase._anchor
    payload = bytes(source.map())
    row = anchor.codec.decode(payload, anchor.schema, anchor.shared, 1, 0, anchor.schema.numel)
    return row.value_d


@pytest.mark.parametrize("codec", ["fp32", "ef(1)|q2"])
def test_an_update_that_was_never_encoded_stays_with_training(phase_of, codec):
    phase, machine, mailbox = phase_of(codec)
    assert not phase.accepts(result_of(delta_of(), round_index=0), machine)
    assert kept_by_training(phase, machine, mailbox)


@pytest.mark.parametrize("reason", [Reason.KEPT, Reason.CUT, Reason.LATE, Reason.ANOMALY])
def test_with_error_feedback_an_encoded_update_is_never_also_in_the_parameters(phase_of, reason):
    phase, machine, mailbox = phase_of("ef(1)|q2")
    delta_d = delta_of()
    assert phase.accepts(result_of(delta_d), machine)
    _, source, *_ = phase.encode(result_of(delta_d), LINK)
    left_d = delta_d - sent_part(phase, source)
    assert torch.allclose(phase.private.error_d, left_d, rtol=0, atol=1e-8)
    assert left_d.norm() > 0
    assert phase.hand_over(machine)
    phase._settle(Verdict(0.0, reason))
    expected_d = torch.zeros_like(left_d) if reason is Reason.ANOMALY else left_d
    assert torch.allclose(phase.private.error_d, expected_d, rtol=0, atol=1e-8), "the sent part is forfeited"
    assert not kept_by_training(phase, machine, mailbox)


@pytest.mark.parametrize(("codec", "kept"), [("fp32", True), ("ef(1)|q2", False)])
def test_a_payload_that_is_ready_too_late_is_kept_once(phase_of, codec, kept):
    phase, machine, mailbox = phase_of(codec)
    assert phase.accepts(result_of(delta_of()), machine)
    phase.encode(result_of(delta_of()), LINK)
    machine.phase = machine.phase.__class__.APPLYING  # the certificate came first
    assert not phase.hand_over(machine)
    machine.phase = machine.phase.__class__.TRAINING
    assert kept_by_training(phase, machine, mailbox) is kept


@pytest.mark.parametrize("codec", ["fp32", "ef(1)|q2", "ef(0.95)|topk(64/4096)|q2"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e7, 1e30])
def test_a_wild_update_is_an_abstention_that_keeps_the_error_feedback(phase_of, codec, bad):
    phase, machine, mailbox = phase_of(codec)
    phase.accepts(result_of(delta_of()), machine)
    phase.encode(result_of(delta_of()), LINK)
    before = {name: tensor.clone() for name, tensor in phase._anchor.codec.private_tensors(phase.private).items()}
    wild_d = delta_of()
    wild_d[3] = bad
    phase.accepts(result_of(wild_d), machine)
    assert phase.encode(result_of(wild_d), LINK) == (None, None, 0, 0)
    after = phase._anchor.codec.private_tensors(phase.private)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert phase.hand_over(machine)
    phase._settle(Verdict(0.0, Reason.ABSTAINED))
    assert not kept_by_training(phase, machine, mailbox), "what was refused does not stay in the model"


@pytest.mark.parametrize("codec", ["fp32", "ef(1)|q2"])
def test_a_wild_update_that_is_also_late_does_not_stay_in_the_model(phase_of, codec):
    phase, machine, mailbox = phase_of(codec)
    wild_d = delta_of()
    wild_d[0] = float("nan")
    phase.accepts(result_of(wild_d), machine)
    assert phase.encode(result_of(wild_d), LINK) == (None, None, 0, 0)
    machine.phase = machine.phase.__class__.APPLYING
    assert not phase.hand_over(machine)
    machine.phase = machine.phase.__class__.TRAINING
    assert not kept_by_training(phase, machine, mailbox)


def test_an_error_feedback_survives_a_restart(phase_of):
    phase, machine, _ = phase_of("ef(1)|q2")
    phase.accepts(result_of(delta_of()), machine)
    phase.encode(result_of(delta_of()), LINK)
    error_d = phase.private.error_d.clone()
    phase.save()
    again = LocalPhase(phase._genesis, phase._store, phase._anchor, phase._clock, Mailbox(), phase._audit, phase._me)
    assert not again.private.error_d.any()
    again.restore()
    assert torch.equal(again.private.error_d, error_d)


def again_of(phase: LocalPhase) -> LocalPhase:
    """The same member after a restart."""
    fresh = LocalPhase(phase._genesis, phase._store, phase._anchor, phase._clock, Mailbox(), phase._audit, phase._me)
    fresh.restore()
    return fresh


def announce(phase: LocalPhase, machine: RoundMachine, amount: float) -> None:
    """Encode and announce in the present round; its row is kept."""
    assert phase.accepts(result_of(delta_of(amount)), machine)
    phase.encode(result_of(delta_of(amount)), LINK)
    assert phase.hand_over(machine)
    phase._settle(Verdict(1.0, Reason.KEPT))


def test_an_error_feedback_older_than_the_last_announcement_is_dropped(phase_of):
    phase, machine, _ = phase_of("ef(1)|q2")
    phase._store.begin_round(1, phase.announced)
    announce(phase, machine, 0.01)
    assert phase.announced == 1
    phase.save()
    saved_d = phase.private.error_d.clone()
    assert torch.equal(again_of(phase).private.error_d, saved_d)
    phase._store.journal.reset(2, phase.announced)
    assert torch.equal(again_of(phase).private.error_d, saved_d), "the file is of the last announcement"
    phase._encoded = phase.announced = 2  # as after a second announcement, before its save
    phase._store.journal.reset(3, phase.announced)
    assert not again_of(phase).private.error_d.any(), "what it holds has been sent since"
    assert again_of(phase).announced == 2
    phase.save()
    assert torch.equal(again_of(phase).private.error_d, saved_d)


def test_an_announcement_of_this_very_round_counts_though_only_the_journal_of_it_knows(phase_of):
    phase, machine, _ = phase_of("ef(1)|q2")
    phase._store.begin_round(1, 0)
    announce(phase, machine, 0.01)
    phase.save()
    said = Announcement(machine.me.public_key, None, 0, 0).signed(machine.slot, machine.me.sign)
    phase._store.journal.record("own", encode_entry(Persist("own", said)))
    assert again_of(phase).announced == 0, "an abstention sends nothing"
    payload = BlobRef(bytes(32), 1000, 1 << 14)
    phase._saved = phase._encoded = 0
    said = Announcement(machine.me.public_key, payload, 3, 30).signed(machine.slot, machine.me.sign)
    phase._store.journal.record("own", encode_entry(Persist("own", said)))
    assert again_of(phase).announced == 1
    assert again_of(phase).private.error_d.any()


def test_error_feedback_is_saved_only_when_its_fate_is_known_and_in_a_part_of_the_time(phase_of):
    phase, machine, _ = phase_of("ef(1)|q2")
    assert not phase.wants_saving(0.0), "nothing was encoded"
    assert phase.accepts(result_of(delta_of()), machine)
    phase.encode(result_of(delta_of()), LINK)
    assert not phase.wants_saving(0.0), "it may still come too late"
    assert phase.hand_over(machine)
    assert not phase.wants_saving(0.0), "the rule may call it an anomaly"
    phase._settle(Verdict(1.0, Reason.KEPT))
    assert phase.wants_saving(0.0)
    assert not phase.wants_saving(0.0), "once"
    times = iter([10.0, 12.0])
    phase._clock = SimpleNamespace(now_s=lambda: next(times))
    phase.save()
    phase._encoded += 1
    assert not phase.wants_saving(12.0 + SAVE_SHARE * 2.0 - 0.1)
    assert phase.wants_saving(12.0 + SAVE_SHARE * 2.0)


def test_a_codec_without_error_feedback_is_never_saved(phase_of):
    phase, machine, _ = phase_of("fp32")
    announce(phase, machine, 0.01)
    assert not phase.wants_saving(math.inf)


def test_an_unlisted_announcement_counts_as_late(phase_of):
    phase, machine, mailbox = phase_of("fp32")
    phase.accepts(result_of(delta_of()), machine)
    ref, *_ = phase.encode(result_of(delta_of()), LINK)
    assert phase.hand_over(machine)
    draft = machine.attendance.draft(machine.me.peer_id)
    assert ref is not None
    assert not draft.payloads
    assert not phase.judge(draft, {})
    assert kept_by_training(phase, machine, mailbox)
    assert isinstance(Announcement(machine.me.public_key, ref, 3, 30), Announcement)


# -- cost -------------------------------------------------------------------------------------------------------------


def quiet(player: Player) -> None:
    nudge(player.model, 1e-3)


def test_a_step_between_rounds_costs_less_than_20_microseconds(tmp_path):
    with SmallWorld(tmp_path, make_model, inner_steps=100_000) as world:
        player = world.play(0, quiet, phases=0)
        player.rest()
        swarm = player.swarm
        assert swarm is not None
        costs_s = []
        for _ in range(5_000):
            start_s = time.perf_counter()
            swarm.step(128, 1.5)
            costs_s.append(time.perf_counter() - start_s)
    assert statistics.median(costs_s) < 20e-6


@pytest.mark.parametrize(
    ("codec", "outer", "vectors"),
    [
        ("q2", "sgd(lr=1.0)", 3),  # θ, the next θ, Δ
        ("q2", "nesterov(lr=0.7,momentum=0.6)", 5),  # and b, the next b
        ("ef(1)|q2", "nesterov(lr=0.7,momentum=0.6)", 6),  # and e
    ],
)
def test_a_member_keeps_exactly_the_documented_vectors(tmp_path, codec, outer, vectors):
    def make() -> nn.Module:
        return make_model(20_000)

    d = schema_of(make()).numel
    gc.collect()
    before = model_sized_storages(d)
    tracemalloc.start()
    try:
        settings = {"codec": codec, "outer": outer, "start_members": 2, "quorum_percent": 100, "snapshot_rounds": 2}
        with SmallWorld(tmp_path, make, **settings) as world:
            players = [world.play(index, quiet, phases=4) for index in range(2)]
            for player in players:
                player.rest()
                player.adopted.clear()
            eventually(lambda: all(not player.node._tasks.keys() - waiting(player) for player in players), "snapshots")
            gc.collect()
            own = {p.untyped_storage().data_ptr() for player in players for p in player.model.parameters()}
            found = model_sized_storages(d) - before - own
            heap = [trace.size for trace in tracemalloc.take_snapshot().traces if trace.size >= 3 * d]
            assert len(found) == 2 * vectors
            assert not heap, "numpy arrays or bytes as large as the model"
    finally:
        tracemalloc.stop()


def waiting(player: Player) -> set:
    return {task for task in list(player.node._tasks) if task.get_name() == "status"}


def model_sized_storages(d: int) -> set[int]:
    found = set()
    for thing in gc.get_objects():
        if (
            issubclass(type(thing), torch.Tensor)
            and thing.device.type == "cpu"
            and thing.untyped_storage().nbytes() >= 3 * d
        ):
            found.add(thing.untyped_storage().data_ptr())
    return found


def test_importing_farflung_brings_nothing_heavy():
    script = (
        "import sys, farflung; print([m for m in ('torch', 'grpc', 'hivemind', 'numpy', 'numba') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
