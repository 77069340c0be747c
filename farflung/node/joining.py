"""`farflung join`: from an invite to a trained model, with one task's training loop around a `Swarm`.

Training owns the main thread. Whatever ends it, the node is closed, the inner optimiser's state is on the disk, and
the last `status.json` and `train.json` say how it ended.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from farflung.node.mailbox import Mailbox
from farflung.node.member import Member
from farflung.node.opening import JoinSettings, open_node
from farflung.node.progress import Progress
from farflung.node.shell import Node
from farflung.node.signals import INTERRUPTED, Leave, Signals, StopNow
from farflung.node.store import Home, RunStore
from farflung.node.swarm import Swarm
from farflung.node.tasks import Task
from farflung.node.trainer import pick_device
from farflung.node.training_loop import LoopSettings, TrainingLoop, load_run_task
from farflung.protocol.errors import FarflungError
from farflung.protocol.genesis import Genesis
from farflung.protocol.invite import Invite

log = logging.getLogger(__name__)

LEAVE_S = 8.0
"""For a polite goodbye after a signal: `docker stop` kills after 10 s."""

LEAVE_MIN_S = 2.0
"""Of which so much is left for the goodbye itself, however long saving took."""

SERVE_S = 60.0
"""How long a member stays after the run's last round for those who have not got it yet."""


@dataclass
class Joining:
    """One `farflung join`, from opening to end. `train` returns the exit status; the display reads the rest."""

    home: Home
    store: RunStore
    invite: Invite
    settings: JoinSettings
    loop: LoopSettings
    progress: Progress
    signals: Signals
    member: Member | None = None
    task: Task = field(init=False)
    model: nn.Module = field(init=False)
    summary: dict[str, Any] = field(default_factory=dict)

    def status(self) -> dict[str, Any]:
        """What the node is doing; before there is one, that it is being opened."""
        if self.member is not None:
            return self.member.status()
        return {"phase": "starting", "why": "looking for the swarm", "peer": str(self.home.identity.peer_id)}

    def train(self) -> int:
        """Join and train until the run ends, the first signal (exit status 0) or the second (130)."""
        ended = "crashed"
        try:
            ended = self._train()
        except Leave:
            ended = self._leave_early()
        except StopNow:
            ended = "stopped at once"
        except FarflungError as error:
            ended = f"failed: {error}"
            raise
        finally:
            self._close(ended)
        return INTERRUPTED if self.signals.stopping else 0

    # -- the loop -----------------------------------------------------------------------------------------------------

    def _train(self) -> str:
        with self.signals.waiting():
            self.member = Member(self._open)
            loop = self._make_loop(self.member)
            swarm = loop.swarm = Swarm(self.member, self.model, loop.on_adopt)
        try:
            loop.begin(swarm)
            loop.run(swarm)
        except Leave:
            log.info("leaving politely")
        began_s = time.monotonic()
        loop.save_inner()
        finished = swarm.finished
        if finished and self.loop.eval_rounds:
            loop.evaluate(swarm.round_index - 1)
        left_s = SERVE_S if finished else max(LEAVE_MIN_S, LEAVE_S - (time.monotonic() - began_s))
        swarm.leave(left_s)
        return "finished" if finished else "left"

    def _make_loop(self, member: Member) -> TrainingLoop:
        directory = self.store.directory
        return TrainingLoop(member, self.task, self.model, self.loop, self.progress, self.signals, directory)

    async def _open(self, stack: AsyncExitStack, mailbox: Mailbox) -> Node:
        return await open_node(
            stack,
            mailbox,
            home=self.home,
            store=self.store,
            invite=self.invite,
            model_of=self._model_of,
            settings=self.settings,
        )

    def _model_of(self, genesis: Genesis) -> nn.Module:
        """Called in the node's thread, when genesis is known."""
        self.task = load_run_task(genesis, self.loop.task)
        self.model = self.task.build_model().to(pick_device(self.loop.trainer.device))
        self.progress.inner_steps, self.progress.rounds = genesis.inner_steps, genesis.rounds
        self.progress.device = str(next(self.model.parameters()).device)
        self.progress.parameters = genesis.schema.numel
        return self.model

    def _leave_early(self) -> str:
        """Before there was anything to train: whoever has admitted this member should still hear of it."""
        try:
            if self.member is not None:
                self.member.close(polite_s=LEAVE_S if "members" in self.member.status() else 0.0)
        except StopNow:
            return "stopped at once"
        return "left"

    def _close(self, ended: str) -> None:
        """Nothing of this survives but files."""
        member = self.member
        if member is not None:
            member.close(polite_s=0.0)
            status = member.status() | {"phase": "ended", "why": ended}
            self.store.write_status(status)
            self.summary = status
        self.progress.ended = ended
        self.progress.write()
        self.summary |= {"train": self.progress.view()}


@contextmanager
def joining(
    home: Home, invite: Invite, settings: JoinSettings, loop: LoopSettings, signals: Signals
) -> Iterator[Joining]:
    """Open the run's store for one `Joining`. Raises ConfigError while another process has it."""
    with home.run(invite.run_id) as store:
        yield Joining(home, store, invite, settings, loop, Progress.resume(store.directory), signals)


def write_summary(path: Path, summary: dict[str, Any]) -> None:
    """For `--json`."""
    path.write_text(json.dumps(summary, indent=2, sort_keys=True) + "\n")
