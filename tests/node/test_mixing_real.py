"""Push-sum between nodes with real gRPC and TLS whose messages get lost: nothing of anybody's update does."""

import json
import sys
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_world import eventually

from farflung.node import opening
from farflung.node.flat import read_parameters
from farflung.node.founding import found_run
from farflung.node.join import join
from farflung.node.mixer import Mixer
from farflung.node.mixing_round import MixingRound
from farflung.node.run_file import RunFile
from farflung.node.state_sync import StateSync
from farflung.node.store import open_home
from farflung.node.swarm import Swarm
from farflung.node.tasks.load import load_task
from farflung.protocol.genesis import Timing
from farflung.protocol.mixing.settings import Mixing

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from lossy_member import Faults, LossyTransport

pytestmark = pytest.mark.usefixtures("quick_peers")

MEMBERS, ROUNDS, D = 4, 7, 96
OPTIONS = {"features": D}
PATIENT = Timing(grace_ms=60_000, deadline_floor_ms=60_000, view_floor_ms=20_000, resend_ms=100)
"""Nobody is given up: whatever is lost must be said again, so the exact mean comes out however much is lost."""


def movement(member: int, trained: int) -> torch.Tensor:
    """What a member's local phase does to its parameters [D]: another vector for everybody in every round."""
    return torch.randn(D, generator=torch.Generator().manual_seed(100 * member + trained))


class Player(threading.Thread):
    """A member of the run: every local phase is one step by a known vector."""

    def __init__(self, index: int, invite: str, home: Path, listen: str) -> None:
        super().__init__(name=f"player {index}", daemon=True)
        self.index, self.invite, self.home, self.listen = index, invite, home, listen
        self.model = load_task("builtin:linear", OPTIONS).build_model()
        self.held: dict[int, torch.Tensor] = {}
        """Trained rounds -> this member's parameters then."""
        self.swarm: Swarm | None = None
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self._play()
        except BaseException as error:
            self.error = error

    def _play(self) -> None:
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        where = {"home": self.home, "listen": self.listen, "discovery": "rendezvous"}
        with join(self.invite, self.model, optimizer, **where, on_adopt=self._note) as self.swarm:
            swarm = self.swarm
            while not swarm.finished:
                with torch.no_grad():
                    self.model.weight.sub_(movement(self.index, swarm.view().trained))
                swarm.step(1)

    def _note(self, view) -> None:
        theta_d = torch.empty(D)
        read_parameters(self.model, theta_d)
        self.held[view.trained] = theta_d


def found(root: Path, codec: str, timing: Timing) -> list[Player]:
    """A new run and its members, who wait to be started."""
    run = RunFile(
        task="builtin:linear",
        task_options=OPTIONS,
        mode="push-sum",
        codec=codec,
        outer="sgd(lr=1.0)",
        inner_steps=1,
        rounds=ROUNDS,
        start_members=MEMBERS,
        snapshot_rounds=1,
        timing=timing,
        mixing=Mixing(reference_rounds=2, settle_ms=20_000, silence_ms=60_000),
    )
    founded = found_run(run, open_home(root / "0"), listen="127.0.0.1:0")
    listens = [founded.listen] + ["127.0.0.1:0"] * (MEMBERS - 1)
    return [Player(i, str(founded.invite), root / str(i), listen) for i, listen in enumerate(listens)]


def play(players: list[Player]) -> None:
    """From the start to the run's end. Raises what ended a member."""
    for player in players:
        player.start()
    for player in players:
        player.join(60.0)
    for player in players:
        if player.error is not None:
            raise player.error
        assert not player.is_alive()


def watch_pruning(monkeypatch) -> list[tuple[set[bytes], set[bytes], set[bytes]]]:
    """Of every pruning: what is served no longer, what was dropped from disk, and the states of snapshots kept."""
    seen, prune = [], StateSync.prune

    def watched(self, in_use):
        before = set(self.store.blobs.blobs())
        gone = prune(self, in_use)
        kept = {self.certificate(index).state_digest for index in self.store.snapshots.rounds()}
        seen.append((set(gone), before - set(self.store.blobs.blobs()), kept))
        return gone

    monkeypatch.setattr(StateSync, "prune", watched)
    return seen


def round_logs(root: Path) -> list[list[dict]]:
    paths = [next((root / str(index) / "runs").glob("*/rounds.jsonl")) for index in range(MEMBERS)]
    return [[json.loads(line) for line in path.read_text().splitlines()] for path in paths]


@pytest.mark.parametrize("codec", ["fp32", "int8"])
def test_what_is_lost_on_the_way_is_said_again_and_counts_once(codec, tmp_path, monkeypatch):
    faults = Faults(seed=3, bulk=0.2, notes=0.2, log=str(tmp_path / "faults"))
    monkeypatch.setattr(LossyTransport, "faults", faults)
    monkeypatch.setattr(opening, "GrpcTransport", LossyTransport)
    players = found(tmp_path, codec, PATIENT)
    pruned = watch_pruning(monkeypatch)
    play(players)
    assert not any(gone & kept for gone, _, kept in pruned)  # states that joiners ask for
    assert any(dropped & kept for _, dropped, kept in pruned)  # although the accounts that brought them are dropped
    fates = Counter(tuple(json.loads(line)[1:]) for line in (tmp_path / "faults").read_text().splitlines())
    assert min(fates["vector", "request lost"], fates["vector", "answer lost"], fates["note", "lost"]) > 0

    logs = round_logs(tmp_path)
    assert [log[-1]["trained"] for log in logs] == [ROUNDS] * MEMBERS
    entries = [entry for log in logs for entry in log]
    assert sum(entry["mix_given_up"] for entry in entries if "mix_given_up" in entry) == 0
    assert max(entry["mass_error"] for entry in entries) < 1e-6
    assert max(entry["mass_limbo"] for entry in entries) == 0.0
    assert max(entry["new_reference"] for entry in entries) == 1.0

    mean_d = players[0].held[0].double()
    for trained in range(ROUNDS):
        mean_d -= sum(movement(index, trained).double() for index in range(MEMBERS)) / MEMBERS
        held_nd = torch.stack([player.held[trained + 1] for player in players]).double()
        torch.testing.assert_close(held_nd.mean(0), mean_d, rtol=0, atol=2e-5)
        spread = (held_nd - mean_d).abs().max()
        assert spread < (2e-5 if codec == "fp32" else 0.1)


def test_others_go_on_without_a_member_that_still_mixes_and_it_follows(tmp_path, monkeypatch):
    slow_in, heard, finish = 3, [], MixingRound.finish
    players = found(tmp_path, "fp32", replace(PATIENT, grace_ms=4_000))
    slow, other = players[-1], players[0]

    def finish_late(self, trained):
        """Until the others have certified the next round; a note of this round comes in meanwhile."""
        mixer = slow.swarm._member.node.mixer if slow.swarm is not None else None
        if mixer is not None and self.me == mixer.ways.me and trained == slow_in:
            slow.swarm._member._call(lambda: mixer.hear(heard[-1]))
            eventually(lambda: max(other.held) > slow_in)
        return finish(self, trained)

    def hear(self, message):
        if slow.swarm is not None and self is slow.swarm._member.node.mixer and self.busy:
            heard.append(message)
        listen(self, message)

    listen = Mixer.hear
    monkeypatch.setattr(MixingRound, "finish", finish_late)
    monkeypatch.setattr(Mixer, "hear", hear)
    play(players)
    behind = [entry["mix_behind"] for entry in round_logs(tmp_path)[-1] if "mix_behind" in entry]
    assert max(behind) > 0
    held_nd = torch.stack([player.held[ROUNDS] for player in players])
    torch.testing.assert_close(held_nd, held_nd[:1].expand_as(held_nd), rtol=0, atol=2e-5)
