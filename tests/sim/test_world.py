"""Real nodes in virtual time: the same world every time, the same mathematics as without one, and errors come out."""

import os
import shutil
import subprocess
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from worlds import Free, by_hand, group, run_to_the_end, scenario, train

from farflung.protocol.errors import ConfigError, LocalError
from farflung.sim import training as training_module
from farflung.sim.draw import Draw
from farflung.sim.scenario import Attack, Fault, Network
from farflung.sim.training import run_training
from farflung.sim.workers import Disk

HERE = Path(__file__).parent


def eventful(**more):
    """A bit of everything that draws numbers: jitter, speeds, lost messages, a crash, a partition, noise, a codec."""
    return scenario(
        rounds=4,
        members=(group(3, jitter=0.3, speed_sigma=0.2), group(1, name="liar", up_mbit=Draw.fixed(5), jitter=0.1)),
        run={"codec": "ef(1)|q2", "outer": "nesterov(lr=0.7,momentum=0.6)"},
        network=Network(message_loss=0.02),
        faults=(Fault("crash", 2.2, members=(2,), for_s=1.0), Fault("partition", 4.0, members=(1,), for_s=1.5)),
        attacks=(Attack("noise", members=(3,), strength=0.5),),
        **more,
    )


TELL = """
import sys
sys.path.insert(0, sys.argv[1])
from test_world import eventful
from worlds import train
result = train(eventful(), seed=int(sys.argv[2])).result
print(result.events_digest, [(item.loss, item.validation, item.end_s) for item in result.rounds])
"""


def elsewhere(python, seed, hash_seed):
    """Start the same world in another process."""
    command = [python, "-c", TELL, str(HERE), str(seed)]
    environment = os.environ | {"PYTHONHASHSEED": hash_seed, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, cwd=HERE.parents[1], stdout=subprocess.PIPE, text=True)


def told(process):
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    return out.split(maxsplit=1)


def test_a_seed_makes_one_world_whatever_the_process_and_its_hash_seed():
    """The other process starts afresh; this one has its own hash seed and has run other worlds before."""
    process = elsewhere(sys.executable, 3, "77" if os.environ.get("PYTHONHASHSEED") == "1" else "1")
    here, other = train(eventful(), seed=3).result, train(eventful(), seed=4).result
    digest, rounds = told(process)
    assert digest == here.events_digest != other.events_digest
    assert rounds.strip() == str([(item.loss, item.validation, item.end_s) for item in here.rounds])


RUNNING = f"3.{sys.version_info.minor}"


@pytest.mark.parametrize("version", [known for known in ("3.11", "3.12", "3.13") if known != RUNNING])
def test_other_interpreters_make_the_same_world(version):
    python = shutil.which(f"python{version}")
    needs = "import torch, numba, grpc, google.protobuf, cryptography, blake3"
    if python is None or subprocess.run([python, "-c", needs], check=False, stderr=subprocess.DEVNULL).returncode:
        pytest.skip(f"no python{version} here with what farflung needs")
    assert told(elsewhere(python, 3, "random"))[0] == train(eventful(), seed=3).result.events_digest


# -- the same mathematics ---------------------------------------------------------------------------------------------


class Recorder:
    """A task that remembers which batches each member trained on, round by round."""

    def __init__(self, task):
        self._task, self.read = task, defaultdict(list)

    def __getattr__(self, name):
        return getattr(self._task, name)

    def batches(self, shard):
        for batch in self._task.batches(shard):
            view = shard.view()
            if view is not None:
                self.read[view.trained, view.me].append([part.double().numpy() for part in batch])
            yield batch


@pytest.mark.parametrize("n", [1, 2, 4])
def test_averaging_members_is_what_one_process_computes_from_the_same_batches(tmp_path, n):
    """Anchor and losses of every round against local SGD in fp64 numpy: w <- w - lr (x w - y) x; then the mean."""
    world, thetas, steps, lr = by_hand(tmp_path, n, wrap=Recorder), {}, 4, 0.1

    def keep(life, certificate, trial):
        if certificate.manifest.payloads:
            thetas.setdefault(certificate.manifest.trained, life.node.anchor.theta_d.double().numpy().copy())

    world.watchers.append(keep)
    assert run_to_the_end(world)
    assert sorted(thetas) == [1, 2, 3]
    theta = world.task.build_model().weight.detach().double().numpy()[0]
    by_trained = {item.manifest.trained: index for index, item in world.certificates.items() if item.manifest.payloads}
    for trained in range(3):
        ends = []
        for life in world.lives:
            batches = world.task.read[trained, life.peer_id][:steps]
            local = theta.copy()
            for x_nd, y_n in batches:
                error_n = x_nd @ local - y_n
                loss, local = (error_n**2).mean() / 2, local - lr * (error_n[:, None] * x_nd).mean(0)
            assert len(batches) == steps
            assert life.times(by_trained[trained + 1]).loss == pytest.approx(loss, abs=1e-6)
            ends.append(local)
        theta = np.mean(ends, axis=0)
        np.testing.assert_allclose(thetas[trained + 1], theta, rtol=0, atol=1e-6)
    assert np.abs(theta - world.task.build_model().weight.detach().double().numpy()[0]).max() > 0.01


def test_members_of_a_round_train_on_different_samples(tmp_path):
    world = by_hand(tmp_path, 3, wrap=Recorder)
    assert run_to_the_end(world)
    for trained in range(3):
        rows = [
            {row.tobytes() for x_nd, _ in world.task.read[trained, life.peer_id][:4] for row in x_nd}
            for life in world.lives
        ]
        assert len(frozenset.union(*map(frozenset, rows))) == sum(map(len, rows)) > 0


def test_what_is_learned_does_not_depend_on_the_network():
    """As long as everybody takes part. Rounds on the slow one take several times as long."""
    full = {"quorum_percent": 100, "grace_s": 30.0, "deadline_floor_s": 60.0, "deadline_ceiling_s": 600.0}
    quick = train(scenario(3, run=full)).result
    slow = train(
        scenario(3, run=full, members={"up_mbit": Draw.fixed(0.5)}, network=Network(latency_ms=((200.0,),)))
    ).result
    for one, other in zip(quick.rounds, slow.rounds, strict=True):
        assert (one.loss, one.validation, one.payloads) == (other.loss, other.validation, other.payloads)
        assert one.loss is not None
        assert one.validation is not None
    assert slow.duration_s > 3 * quick.duration_s


# -- time that is charged ---------------------------------------------------------------------------------------------


class Dear(Free):
    """Work that takes round numbers of seconds."""

    def encode_s(self):
        return 0.5

    def apply_s(self, rows):
        return 2.0 * rows


class Counting(Disk):
    """A disk that counts how often it was waited for."""

    waits = 0

    def cost_s(self, fresh_bytes):
        self.waits += 1
        return super().cost_s(fresh_bytes)


def alone(folder, *, costs=None, disk=None):
    """Lengths of the rounds of a single member, and how often each waited for the disk."""
    folder.mkdir()
    world, waited = by_hand(folder, 1, run={"rounds": 4, "snapshot_rounds": 100}), []
    (life,) = world.lives
    life._costs = costs if costs is not None else Free()
    life.disk = disk if disk is not None else Counting()
    world.watchers.append(lambda *_: waited.append(life.disk.waits))
    assert run_to_the_end(world)
    return np.diff([world.applied_s[index][0] for index in sorted(world.applied_s)]), np.diff(waited)


def test_encoding_and_applying_lengthen_a_round_by_exactly_what_they_cost(tmp_path):
    free_s, _ = alone(tmp_path / "free")
    dear_s, _ = alone(tmp_path / "dear", costs=Dear())
    assert free_s == pytest.approx([0.4] * len(free_s), abs=1e-5)
    assert dear_s - free_s == pytest.approx([2.5] * len(free_s), abs=1e-6)


def test_a_slow_disk_lengthens_a_round_by_exactly_its_waits(tmp_path):
    free_s, _ = alone(tmp_path / "free")
    slow_s, waits = alone(tmp_path / "slow", disk=Counting(fsync_s=0.01))
    slower_s, same = alone(tmp_path / "slower", disk=Counting(fsync_s=0.01, slower=5.0))
    assert (waits > 0).all()
    assert (waits == same).all()
    assert slow_s - free_s == pytest.approx(0.01 * waits, abs=1e-6)
    assert slower_s - free_s == pytest.approx(0.05 * waits, abs=1e-6)


def test_a_disk_is_charged_for_bytes_that_were_not_on_it_yet():
    disk = Disk(fsync_s=0.002, bytes_per_s=1e6, slower=3.0)
    assert disk.cost_s(0) == pytest.approx(0.006)
    assert disk.cost_s(500_000) == pytest.approx(3 * 0.502)
    assert Disk().cost_s(1 << 40) == 0


# -- errors and what is left ------------------------------------------------------------------------------------------


class Explosive:
    """A task whose batches or whose loss fails at some time."""

    def __init__(self, task):
        self._task, self.steps = task, 0

    def __getattr__(self, name):
        return getattr(self._task, name)

    def loss(self, model, batch):
        self.steps += 1
        if self.steps > 9:
            raise ZeroDivisionError("boom")
        return self._task.loss(model, batch)


@pytest.mark.parametrize("n", [1, 3])
def test_a_members_failure_ends_the_world_and_is_named(tmp_path, n):
    world = by_hand(tmp_path, n, wrap=Explosive)
    with pytest.raises(LocalError, match=r"member \d failed at \d+\.\d{3} s: ZeroDivisionError\('boom'\)"):
        run_to_the_end(world)
    assert world.loop.is_closed()
    assert not any(life.on for life in world.lives)


def test_two_certificates_for_a_round_would_end_the_world(tmp_path):
    """What `on_certified` compares: digests of the manifest and of the state. Here a member lies about its state."""
    world = by_hand(tmp_path, 2)
    real = world.on_certified

    def other(life, certificate, trial):
        real(life, replace(certificate, state_digest=bytes(32)) if life.index else certificate, trial)

    world.on_certified = other
    with pytest.raises(LocalError, match="two certificates for round"):
        run_to_the_end(world)


def test_a_script_that_fails_ends_the_world(tmp_path):
    world = by_hand(tmp_path, 1)

    async def fail():
        raise ConfigError("a fault that cannot be")

    world.script(fail())
    with pytest.raises(ConfigError, match="cannot be"):
        run_to_the_end(world)


def test_a_world_that_does_not_end_stops_at_its_limit():
    result = train(scenario(2, rounds=10_000, limit_h=0.002)).result
    assert not result.finished
    assert 0 < len(result.rounds) < 20
    assert any("not finished" in note for note in result.notes)


def test_no_folder_is_left_behind_after_a_run_nor_after_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(training_module, "memory_disk", lambda: str(tmp_path))
    assert run_training(scenario(2, rounds=2), 0).finished
    assert not [*tmp_path.iterdir()]
    with pytest.raises((ConfigError, LocalError), match="too few"):
        run_training(scenario(2, options={"features": 16, "samples": 1}), 0)
    assert not [*tmp_path.iterdir()]
