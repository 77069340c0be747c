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

import torch
from torch import nn

from farflung.node.data import Shard, Sharder
from farflung.node.flat import refuse_master_copies, trainable
from farflung.node.local_state import LocalStates
from farflung.node.mailbox import Mailbox
from farflung.node.member import Member
from farflung.node.opening import JoinSettings, open_node
from farflung.node.progress import Progress
from farflung.node.shell import Node
from farflung.node.signals import INTERRUPTED, Leave, Signals, StopNow
from farflung.node.store import Home, RunStore
from farflung.node.swarm import Swarm
from farflung.node.tasks import Task, count_tokens, load_described
from farflung.node.trainer import Trainer, TrainerSettings, pick_device
from farflung.protocol.errors import ConfigError, FarflungError, LocalError
from farflung.protocol.genesis import Genesis
from farflung.protocol.invite import Invite

log = logging.getLogger(__name__)

LEAVE_S = 8.0
"""For a polite goodbye after a signal: `docker stop` kills after 10 s."""

LEAVE_MIN_S = 2.0
"""Of which so much is left for the goodbye itself, however long saving took."""

SERVE_S = 60.0
"""How long a member stays after the run's last round for those who have not got it yet."""

REWARM_STEPS = 10
"""Over which a late joiner without inner moments raises its learning rate: Adam's second moment needs about 10."""


@dataclass(frozen=True)
class LoopSettings:
    """What this member's training loop does; nothing here changes what the run agrees on."""

    trainer: TrainerSettings = field(default_factory=TrainerSettings)
    eval_rounds: int = 5
    """θ is evaluated after every so many rounds, and at the end; 0: never."""
    task: str = ""
    """A task outside farflung that may be imported and run here, "module:object"."""

    def __post_init__(self) -> None:
        if self.eval_rounds < 0:
            raise ConfigError(f"eval rounds must be at least 0, got {self.eval_rounds}")


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
            loop = _Loop(self)
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


class _Loop:
    """The training thread's side: trainer, evaluation, and the inner state on disk."""

    def __init__(self, joining: Joining) -> None:
        self.joining, self.task, self.model = joining, joining.task, joining.model
        assert joining.member is not None
        self.genesis, self.anchor = joining.member.genesis, joining.member.anchor
        self.progress = joining.progress
        self.trainer: Trainer | None = None
        self.swarm: Swarm | None = None
        self._inner = LocalStates(joining.store.directory / "inner")

    def begin(self, swarm: Swarm) -> None:
        """Make the trainer, with the inner state of last time if there is one."""
        optimizer = self.task.build_optimizer(self.model)
        refuse_master_copies(optimizer, self.model)
        self.trainer = trainer = Trainer(
            self.model,
            optimizer,
            self.task.loss,
            iter(self.task.batches(Sharder(swarm.view))),
            settings=self.joining.loop.trainer,
            lr_at=getattr(self.task, "lr_at", None),
            tokens=getattr(self.task, "tokens", count_tokens),
        )
        if not self._restore(trainer) and swarm.global_step > 0:
            trainer.rewarm(REWARM_STEPS)
        trainer.global_step = swarm.global_step

    def run(self, swarm: Swarm) -> None:
        """Steps until the run is over or somebody asks to leave. Raises Leave while waiting."""
        trainer, signals, checked = self.trainer, self.joining.signals, False
        assert trainer is not None
        self.progress.note_return()
        while not swarm.finished and not signals.leaving:
            try:
                result = trainer.train_step()
            except StopIteration:
                return
            if not result.counted:
                continue
            if not checked:
                refuse_master_copies(trainer.optimizer, self.model)
                checked = True
            self.progress.note_step(result.loss, result.tokens)
            before = swarm.round_index
            with signals.waiting():
                swarm.step(tokens=result.tokens, loss=result.loss)
            if swarm.round_index != before:
                self.progress.note_return()

    def on_adopt(self, round_index: int) -> None:
        """A new anchor is in the model: the swarm calls this before the first local step of `round_index`."""
        finished = round_index - 1
        steps = self.swarm.global_step if self.swarm is not None else finished * self.genesis.inner_steps
        if self.trainer is not None:
            self.trainer.global_step = steps
        self.progress.note_adoption(round_index, steps)
        every = self.joining.loop.eval_rounds
        over = 0 < self.genesis.rounds <= finished
        if every and finished % every == 0 and not over:
            self.evaluate(finished)
        if finished % self.genesis.snapshot_rounds == 0:
            self.save_inner()
        if self.trainer is not None and not over:
            self._say(finished)

    def evaluate(self, round_index: int) -> None:
        """Measure θ after a round, if the task can and the model holds θ; the inner state is left as it is."""
        evaluate = getattr(self.task, "evaluate", None)
        if callable(evaluate) and self._holds_anchor():
            self.progress.note_validation(round_index, float(evaluate(self.model)))

    def _holds_anchor(self) -> bool:
        """Not after a round that came without this member's update: then the model is ahead of θ by that update."""
        with self.anchor.lock:
            theta_d = self.anchor.theta_d
            return all(
                torch.equal(
                    part.tensor.cpu(), theta_d[part.start : part.stop].view(part.tensor.shape).to(part.tensor.dtype)
                )
                for part in trainable(self.model)
            )

    def _say(self, round_index: int) -> None:
        progress = self.progress
        loss = f"{progress.losses[-1][1]:.3f}" if progress.losses else "-"
        fresh = progress.validation[-1:] and progress.validation[-1][0] == round_index
        validation = f", validation {progress.validation[-1][1]:.3f}" if fresh else ""
        text = f"round {round_index}: loss {loss}{validation}, {progress.tokens_per_s:.0f} tok/s"
        log.info(text, extra={"round": round_index})

    # -- the inner state ----------------------------------------------------------------------------------------------

    def save_inner(self) -> None:
        """Optimiser moments, randomness, and where we are in the data. θ and error feedback are the node's."""
        if self.trainer is None:
            return
        tensors, value = self.trainer.state()
        meta = {"trainer": value, "task": self.genesis.task}
        if isinstance(self.trainer.batches, Shard):
            meta["shard"] = self.trainer.batches.state()
        self._inner.write(tensors, meta)

    def _restore(self, trainer: Trainer) -> bool:
        saved, problem = self._inner.read()
        if problem:
            log.warning("inner state: %s", problem)
        if saved is None:
            return False
        try:
            trainer.restore(saved.tensors, saved.meta["trainer"])
            if isinstance(trainer.batches, Shard) and "shard" in saved.meta:
                trainer.batches.restore(saved.meta["shard"])
        except (LocalError, KeyError, TypeError) as error:
            log.warning("inner state: starts fresh, what was saved does not fit: %s", error)
            trainer.start_fresh(rewarm_steps=REWARM_STEPS)
        return True


def load_run_task(genesis: Genesis, allowed: str) -> Task:
    """The task that genesis names. Code outside farflung runs only if the person at this machine named it."""
    builtin = genesis.task.startswith("builtin:")
    if not builtin and not allowed:
        raise ConfigError(
            f"this run trains {genesis.task!r}, which is not part of farflung. If you have that code here and trust "
            f"it, join with --task {genesis.task}"
        )
    if allowed and allowed != genesis.task:
        raise ConfigError(f"you allowed the task {allowed!r}, but this run trains {genesis.task!r}")
    task = load_described({"name": genesis.task, "options": genesis.task_options}, builtin_only=builtin)
    digest = getattr(task, "data_digest", None)
    if callable(digest) and genesis.validation_digest and digest() != genesis.validation_digest:
        log.warning("this machine has other data than the founder: validation losses cannot be compared")
    return task


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
