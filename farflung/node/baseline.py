"""What a swarm is compared with: one process on the same number of tokens, with all members' batches in one."""

from __future__ import annotations

import time
from dataclasses import is_dataclass, replace
from typing import Any, NamedTuple

from farflung.node.data import solo_view
from farflung.node.tasks import Task
from farflung.node.trainer import Trainer, TrainerSettings
from farflung.protocol.errors import ConfigError

POINTS = 64
"""Points on the loss curve."""


class Alone(NamedTuple):
    """The baseline's result."""

    validation_loss: float
    training: list[tuple[float, float]]
    """(tokens so far, mean loss since the last point)"""
    tokens: int
    wall_s: float


def train_alone(task: Task, *, members: int, steps: int, settings: TrainerSettings | None = None) -> Alone:
    """Train a dataclass task with `members` times its batch for `steps` steps: what data-parallel training computes.

    Its cosine, if it has one, ends with the last step. Raises ConfigError if the task has no batch or no evaluation.
    """
    if not is_dataclass(task) or not hasattr(task, "batch") or not hasattr(task, "evaluate"):
        raise ConfigError(f"a baseline needs a task with `batch` and `evaluate`, got {type(task).__name__}")
    changes: dict[str, Any] = {"batch": members * task.batch}
    if getattr(task, "decay_steps", 0):
        changes["decay_steps"] = steps
    big: Any = replace(task, **changes)
    trainer = Trainer.of_task(big, solo_view(), settings or TrainerSettings(device="cpu", seed=0))
    every, tokens, losses, curve = max(1, steps // POINTS), 0, [], []
    began_s = time.monotonic()
    for step in range(1, steps + 1):
        result = trainer.train_step()
        tokens += result.tokens
        losses.append(result.loss)
        if step % every == 0 or step == steps:
            curve.append((float(tokens), float(sum(losses)) / len(losses)))
            losses = []
    return Alone(float(big.evaluate(trainer.model)), curve, tokens, time.monotonic() - began_s)
