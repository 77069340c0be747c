"""The training loop of `farflung join`: one task's steps around a `Swarm`, evaluation, and the inner state on disk."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from farflung.node.data import RoundView, Shard, Sharder
from farflung.node.flat import refuse_master_copies, trainable
from farflung.node.local_state import LocalStates
from farflung.node.member import Member
from farflung.node.progress import Progress
from farflung.node.signals import Signals
from farflung.node.swarm import Swarm
from farflung.node.tasks import Task, count_tokens, load_described
from farflung.node.trainer import REWARM_STEPS, Trainer, TrainerSettings
from farflung.protocol.errors import ConfigError, LocalError
from farflung.protocol.genesis import Genesis

log = logging.getLogger(__name__)


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


class TrainingLoop:
    """The training thread's side: trainer, evaluation, and the inner state on disk."""

    def __init__(
        self,
        member: Member,
        task: Task,
        model: nn.Module,
        settings: LoopSettings,
        progress: Progress,
        signals: Signals,
        directory: Path,
    ) -> None:
        self.task, self.model, self.settings, self.signals = task, model, settings, signals
        self.genesis, self.anchor, self.progress = member.genesis, member.anchor, progress
        self.trainer: Trainer | None = None
        self.swarm: Swarm | None = None
        self._inner = LocalStates(directory / "inner")

    def begin(self, swarm: Swarm) -> None:
        """Make the trainer, with the inner state of last time if there is one."""
        optimizer = self.task.build_optimizer(self.model)
        refuse_master_copies(optimizer, self.model)
        self.trainer = trainer = Trainer(
            self.model,
            optimizer,
            self.task.loss,
            iter(self.task.batches(Sharder(swarm.view))),
            settings=self.settings.trainer,
            lr_at=getattr(self.task, "lr_at", None),
            tokens=getattr(self.task, "tokens", count_tokens),
        )
        if not self._restore(trainer) and swarm.global_step > 0:
            trainer.rewarm(REWARM_STEPS)
        trainer.global_step = swarm.global_step

    def run(self, swarm: Swarm) -> None:
        """Steps until the run is over or somebody asks to leave. Raises Leave while waiting."""
        trainer, signals, checked = self.trainer, self.signals, False
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

    def on_adopt(self, view: RoundView) -> None:
        """A new anchor is in the model: the swarm calls this before the first local step of the view's round."""
        finished = view.round_index - 1
        steps = self.swarm.global_step if self.swarm is not None else view.trained * self.genesis.inner_steps
        if self.trainer is not None:
            self.trainer.global_step = steps
        self.progress.note_adoption(view.round_index, steps)
        every = self.settings.eval_rounds
        over = 0 < self.genesis.rounds <= view.trained
        if every and finished % every == 0 and not over:
            self.evaluate(finished)
        if finished % self.genesis.snapshot_rounds == 0:
            self.save_inner()
        if self.trainer is not None and not over:
            self._say(finished)

    def evaluate(self, round_index: int) -> None:
        """Measure θ after a round, if the task can and the model stands there; the inner state is left as it is."""
        evaluate = getattr(self.task, "evaluate", None)
        if not callable(evaluate):
            return
        if self._holds_anchor():
            self.progress.note_validation(round_index, float(evaluate(self.model)))
        elif self.swarm is not None:  # perhaps the codec looks ahead
            with self.swarm.at_anchor() as there:
                if there:
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
