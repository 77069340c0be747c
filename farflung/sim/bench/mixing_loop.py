"""Training by members that mix, in one process: what an exchange that is not exact does to learning.

Every member has its own parameters θ_i, its own outer state and its own inner optimiser. In a round it trains from θ_i
to φ_i; all of them exchange (`mixing_exchange`), and each takes its outer step on its own pseudo-gradient
(`mixing_advance`). Members train side by side (`arena_fleet`). A swarm that never agrees has two losses, and both are
kept: that of the mean of the members' parameters, which nobody holds, and the mean of the members' own.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from farflung.aggregation.weights import Claim
from farflung.node.data import solo_view
from farflung.node.flat import read_parameters, schema_of, write_parameters
from farflung.node.trainer import Trainer
from farflung.protocol.errors import LocalError
from farflung.sim.bench.arena_fleet import Fleet
from farflung.sim.bench.closed_loop import HOPELESS_LOSS
from farflung.sim.bench.mixing_advance import make_advance
from farflung.sim.bench.mixing_liars import Round
from farflung.sim.bench.mixing_setting import MixSetting, Pace
from farflung.sim.bench.runs import on_one_thread


class MixOutcome(NamedTuple):
    """What a run gave. Losses are in nats per byte on the fixed validation windows, of honest members only."""

    curve: tuple[tuple[int, float], ...]
    """(round, mean of the members' losses); infinite from where training was lost."""

    mean_model: tuple[float, ...]
    """Loss of the mean of the members' parameters, at the rounds of `curve`."""

    worst: float
    """Loss of the worst member, at the end."""

    apart: float
    """Root mean square distance of members from their mean at the end, over that of a round's local movement."""

    mass_error_max: float
    """Over all rounds, of the mass that was made or lost in one; 0 if there was none to lose."""

    wall_s: float

    @property
    def loss(self) -> float:
        """Mean of the members' losses at the end."""
        return self.curve[-1][1]

    @property
    def mean_loss(self) -> float:
        """Of the mean of the members' parameters, at the end."""
        return self.mean_model[-1]


class Crew:
    """All members' training: one fleet for each pace."""

    def __init__(self, setting: MixSetting) -> None:
        self.setting = setting
        self.paces = list(dict.fromkeys(setting.pace_n))
        self.seats = [[i for i, pace in enumerate(setting.pace_n) if pace == own] for own in self.paces]
        self.fleets = [_fleet(setting, pace, members) for pace, members in zip(self.paces, self.seats, strict=True)]
        self.claims = [Claim(pace.steps, pace.steps * pace.batch * setting.task.context) for pace in setting.pace_n]

    def train(self, theta_nd: Tensor, index: int) -> Tensor:
        """φ [n, d] after round `index`, counted from 1. The learning rate follows the certified step count."""
        phi_nd = torch.empty_like(theta_nd)
        first = (index - 1) * self.setting.inner_steps
        for fleet, pace, members in zip(self.fleets, self.paces, self.seats, strict=True):
            start_kd = theta_nd[members]
            phi_nd[members] = start_kd - fleet.train(start_kd, pace.steps, global_step=first)
        return phi_nd


class MixLoop:
    """One run under way."""

    def __init__(self, setting: MixSetting) -> None:
        self.setting = setting
        self.probe = setting.task.build_model()
        schema = schema_of(self.probe)
        self.theta_ref_d = torch.empty(schema.numel)
        read_parameters(self.probe, self.theta_ref_d)
        self.theta_nd = self.theta_ref_d.repeat(setting.members, 1)
        self.phi_nd = self.theta_nd
        self.crew = Crew(setting)
        self.advance = make_advance(setting, schema, self.theta_nd)
        self.mass_error_max, self.movement = 0.0, 0.0

    def run(self) -> MixOutcome:
        """All rounds. A run whose numbers or losses are not finite ends there: that is a result, not an error."""
        began_s, curve, mean_model, members = time.perf_counter(), [], [], [math.inf]
        for index in range(1, self.setting.rounds + 1):
            try:
                self.round(index)
            except LocalError:  # a vector that is not finite
                curve.append((index, math.inf))
                break
            if index % self.setting.report_every == 0 or index == self.setting.rounds:
                members, mean = self.losses()
                curve.append((index, sum(members) / len(members)))
                mean_model.append(mean)
                if not curve[-1][1] < HOPELESS_LOSS:
                    break
        lost = not curve[-1][1] < HOPELESS_LOSS
        if lost:
            curve = [*curve[:-1], (self.setting.rounds, math.inf)]
            mean_model = [*mean_model[: len(curve) - 1], math.inf]
        return MixOutcome(
            tuple(curve),
            tuple(mean_model),
            math.inf if lost else max(members),
            math.inf if lost else self.apart(),
            self.mass_error_max,
            time.perf_counter() - began_s,
        )

    def round(self, index: int) -> None:
        """Train, exchange, step; then the reference, if it is time."""
        self.phi_nd = self.crew.train(self.theta_nd, index)
        self.movement = float((self.theta_nd - self.phi_nd).double().square().sum(1).mean().sqrt())
        advanced = self.advance(Round(index, self.theta_nd, self.phi_nd, self.theta_ref_d), self.crew.claims)
        self.theta_nd = advanced.theta_nd
        self.mass_error_max = max(self.mass_error_max, advanced.mass_error)
        if index % self.setting.reference_every == 0:
            publisher = index // self.setting.reference_every % self.setting.honest
            self.theta_ref_d = self.theta_nd[publisher].clone()

    def losses(self) -> tuple[list[float], float]:
        """Each honest member's, and that of the mean of their parameters."""
        honest_nd = self.theta_nd[: self.setting.honest]
        known: dict[bytes, float] = {}
        for theta_d in honest_nd:  # in gather all of them are one
            held = theta_d.numpy().tobytes()
            known[held] = known[held] if held in known else self.loss_of(theta_d)
        members = [known[theta_d.numpy().tobytes()] for theta_d in honest_nd]
        return members, self.loss_of(honest_nd.double().mean(0).float())

    def loss_of(self, theta_d: Tensor) -> float:
        """On the fixed validation windows."""
        write_parameters(self.probe, theta_d)
        return self.setting.task.evaluate(self.probe)

    def apart(self) -> float:
        """As in `MixOutcome`."""
        honest_nd = self.theta_nd[: self.setting.honest].double()
        return float((honest_nd - honest_nd.mean(0)).square().sum(1).mean().sqrt()) / self.movement


def mix(setting: MixSetting) -> MixOutcome:
    """All rounds of a run, on one thread of one core. The same curve, bit for bit, on one machine and version."""
    return on_one_thread(lambda: MixLoop(setting).run())


def _fleet(setting: MixSetting, pace: Pace, members: list[int]) -> Fleet:
    task = replace(setting.task, batch=pace.batch)
    views = [solo_view(setting.seed, me=i, of=setting.members) for i in members]
    return Fleet(task, [Trainer.of_task(task, view).batches for view in views])
