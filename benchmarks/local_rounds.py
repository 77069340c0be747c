"""The algorithm without the network: member models in one process, rounds by the node's own codec, rule and outer step.

What is measured here is learning. Members are trained one after the other, then encoded, aggregated and stepped by
the very functions a node calls (`Anchor.try_out`), on payloads that never leave memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from farflung.aggregation.outer import parse_outer
from farflung.aggregation.registry import parse_rule
from farflung.aggregation.weights import parse_weights
from farflung.compression import parse_codec
from farflung.node.anchor import Anchor
from farflung.node.data import solo_view
from farflung.node.flat import difference_into, read_parameters, schema_of, write_parameters
from farflung.node.tasks.stdlib_gpt import StdlibGpt
from farflung.node.trainer import Trainer
from farflung.protocol.blob import describe
from farflung.protocol.identity import Identity
from farflung.protocol.manifest import Manifest
from farflung.protocol.rows import Reason, Verdict
from farflung.protocol.statements import Announcement


@dataclass(frozen=True)
class Setting:
    """One run of the algorithm."""

    task: StdlibGpt
    members: int = 4
    inner_steps: int = 30
    rounds: int = 14
    codec: str = "ef(1)|q2"
    rule: str = "mean"
    outer: str = "nesterov(lr=0.7,momentum=0.6)"
    weights: str = "uniform"

    @property
    def steps(self) -> int:
        """Optimiser steps of one member."""
        return self.inner_steps * self.rounds

    @property
    def alone(self) -> StdlibGpt:
        """The same tokens in one process with the same total batch."""
        return replace(self.task, batch=self.task.batch * self.members)


def build_anchor(model: nn.Module, setting: Setting) -> Anchor:
    """The anchor that every member would hold."""
    schema = schema_of(model)
    theta_d = torch.empty(schema.numel)
    read_parameters(model, theta_d)
    codec = parse_codec(setting.codec)
    return Anchor(
        schema=schema,
        codec=codec,
        rule=parse_rule(setting.rule),
        outer=parse_outer(setting.outer),
        weights=parse_weights(setting.weights),
        theta_d=theta_d,
        shared=codec.init(schema)[1],
    )


def train_together(
    setting: Setting,
    start_d: torch.Tensor | None = None,
    on_round: Callable[[int, Anchor, nn.Module], None] | None = None,
) -> dict[str, Any]:
    """All rounds; returns the anchor, the validation loss of θ, and the mean payload size."""
    keys = sorted(
        (Identity(hashlib.sha256(bytes([i])).digest()) for i in range(setting.members)), key=lambda k: k.peer_id
    )
    trainers = [Trainer.of_task(setting.task, solo_view(me=i, of=setting.members)) for i in range(setting.members)]
    probe = setting.task.build_model()
    if start_d is not None:
        write_parameters(probe, start_d)
    anchor = build_anchor(probe, setting)
    private = [anchor.codec.init(anchor.schema)[0] for _ in keys]
    parent, delta_d, sent = bytes(32), torch.empty(anchor.schema.numel), 0
    for round_index in range(1, setting.rounds + 1):
        payloads, announcements = [], []
        for i, trainer in enumerate(trainers):
            write_parameters(trainer.model, anchor.theta_d)
            trainer.global_step = (round_index - 1) * setting.inner_steps
            for _ in range(setting.inner_steps):
                trainer.train_step()
            difference_into(delta_d, anchor.theta_d, trainer.model)
            payload, private[i] = anchor.codec.encode(delta_d, private[i], anchor.shared, round_index)
            payloads.append(payload)
            announcements.append(Announcement(keys[i].public_key, describe(payload)[0], setting.inner_steps, 1))
        sent += sum(map(len, payloads))
        manifest = Manifest(b"", round_index, parent, keys[0].peer_id, tuple(announcements), (), (), (), True)
        trial = anchor.try_out(manifest, payloads)
        anchor.commit(manifest.digest)
        parent = manifest.digest
        for i, key in enumerate(keys):
            private[i] = anchor.codec.observe(private[i], trial.verdicts.get(key.peer_id, Verdict(0.0, Reason.LATE)))
        if on_round is not None:
            write_parameters(probe, anchor.theta_d)
            on_round(round_index, anchor, probe)
    write_parameters(probe, anchor.theta_d)
    return {
        "anchor": anchor,
        "model": probe,
        "loss": setting.task.evaluate(probe),
        "payload_bytes": sent / setting.rounds / setting.members,
    }


def train_alone(task: StdlibGpt, steps: int, start_d: torch.Tensor | None = None, seed: int = 0) -> Trainer:
    """One process, `steps` optimiser steps."""
    trainer = Trainer.of_task(task, solo_view(seed))
    if start_d is not None:
        write_parameters(trainer.model, start_d)
    for _ in range(steps):
        trainer.train_step()
    return trainer
