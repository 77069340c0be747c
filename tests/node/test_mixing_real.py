"""Push-sum between nodes with real gRPC and TLS whose messages get lost: nothing of anybody's update does."""

import json
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest
import torch

from farflung.node import opening
from farflung.node.flat import read_parameters
from farflung.node.founding import found_run
from farflung.node.join import join
from farflung.node.run_file import RunFile
from farflung.node.store import open_home
from farflung.node.tasks import load_described
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
        self.model = load_described({"name": "builtin:linear", "options": OPTIONS}).build_model()
        self.held: dict[int, torch.Tensor] = {}
        """Trained rounds -> this member's parameters then."""
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self._play()
        except BaseException as error:
            self.error = error

    def _play(self) -> None:
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        where = {"home": self.home, "listen": self.listen, "discovery": "rendezvous"}
        with join(self.invite, self.model, optimizer, **where, on_adopt=self._note) as swarm:
            while not swarm.finished:
                with torch.no_grad():
                    self.model.weight.sub_(movement(self.index, swarm.view.trained))
                swarm.step(1)

    def _note(self, view) -> None:
        theta_d = torch.empty(D)
        read_parameters(self.model, theta_d)
        self.held[view.trained] = theta_d


def play(root: Path, codec: str, faults: Faults, monkeypatch) -> list[Player]:
    """A whole run, from founding it to its end."""
    monkeypatch.setattr(LossyTransport, "faults", faults)
    monkeypatch.setattr(opening, "GrpcTransport", LossyTransport)
    run = RunFile(
        task="builtin:linear",
        task_options=OPTIONS,
        mode="push-sum",
        codec=codec,
        outer="sgd(lr=1.0)",
        inner_steps=1,
        rounds=ROUNDS,
        start_members=MEMBERS,
        timing=PATIENT,
        mixing=Mixing(reference_rounds=2, settle_ms=20_000, silence_ms=60_000),
    )
    founded = found_run(run, open_home(root / "0"), listen="127.0.0.1:0")
    listens = [founded.listen] + ["127.0.0.1:0"] * (MEMBERS - 1)
    players = [Player(i, str(founded.invite), root / str(i), listen) for i, listen in enumerate(listens)]
    for player in players:
        player.start()
    for player in players:
        player.join(60.0)
    for player in players:
        if player.error is not None:
            raise player.error
        assert not player.is_alive()
    return players


def round_logs(root: Path) -> list[list[dict]]:
    paths = [next((root / str(index) / "runs").glob("*/rounds.jsonl")) for index in range(MEMBERS)]
    return [[json.loads(line) for line in path.read_text().splitlines()] for path in paths]


@pytest.mark.parametrize("codec", ["fp32", "int8"])
def test_what_is_lost_on_the_way_is_said_again_and_counts_once(codec, tmp_path, monkeypatch):
    faults = Faults(seed=3, bulk=0.2, notes=0.2, log=str(tmp_path / "faults"))
    players = play(tmp_path, codec, faults, monkeypatch)
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
