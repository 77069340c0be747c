"""From everybody's parameters before a round's exchange to everybody's after it: gradients and outer steps, or both in
one where mass lives on from round to round."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from farflung.aggregation import persistent
from farflung.aggregation.gasloc import Gasloc, landed, parse_gasloc, proposed
from farflung.aggregation.graphs import parse_graph
from farflung.aggregation.mass import mass_error
from farflung.aggregation.outer import OuterOptimizer, State, parse_outer
from farflung.aggregation.persistent_post import Post
from farflung.aggregation.weights import Claim
from farflung.protocol.schema import Schema
from farflung.sim.bench.mixing_exchange import Step, lost_messages, make_exchange
from farflung.sim.bench.mixing_liars import Round
from farflung.sim.bench.mixing_setting import Accelerated, MixSetting, Persistent


class Advanced(NamedTuple):
    """What a round made of the members."""

    theta_nd: Tensor
    mass_error: float


Advance = Callable[[Round, Sequence[Claim]], Advanced]
"""The end of a round. What it remembers from round to round is its own."""


def make_advance(setting: MixSetting, schema: Schema, theta_nd: Tensor) -> Advance:
    """The ends of a run's rounds, for members that start at these parameters."""
    if isinstance(setting.exchange, Persistent):
        return _persistent(setting, setting.exchange, theta_nd)
    if isinstance(setting.exchange, Accelerated):
        return _accelerated(make_exchange(setting, schema), parse_gasloc(setting.outer), theta_nd)
    return stepping(make_exchange(setting, schema), Outers(setting.outer, theta_nd))


class Outers:
    """Everybody's outer optimiser: one rule, and a state each."""

    def __init__(self, spec: str, theta_nd: Tensor) -> None:
        self.rule: OuterOptimizer = parse_outer(spec)
        self.state_n: list[State] = [
            tuple(torch.zeros_like(theta_d) for _ in self.rule.state_names) for theta_d in theta_nd
        ]

    def step(self, theta_nd: Tensor, gradient_nd: Tensor, trained: int) -> Tensor:
        """Everybody's step [n, d]."""
        next_nd = torch.empty_like(theta_nd)
        for i, state in enumerate(self.state_n):
            self.rule.step(theta_nd[i], state, gradient_nd[i], theta_out_d=next_nd[i], state_out=state, trained=trained)
        return next_nd


def stepping(exchange: Step, outers: Outers) -> Advance:
    """Gradients by the exchange, then everybody's own outer step on them."""

    def advance(found: Round, claims: Sequence[Claim]) -> Advanced:
        mixed = exchange(found, claims)
        return Advanced(outers.step(found.theta_nd, mixed.gradient_nd, found.number), mixed.mass_error)

    return advance


def _persistent(setting: MixSetting, exchange: Persistent, theta_nd: Tensor) -> Advance:
    """Everybody's own step, on the numerator, then the round's ticks: who mixes less exactly is not pulled less."""
    graph, rule = parse_graph(exchange.graph), persistent.parse_persistent(setting.outer)
    members = [persistent.begin(theta_d.clone(), rule) for theta_d in theta_nd]
    post = Post(ledger=exchange.ledger)

    def advance(found: Round, claims: Sequence[Claim]) -> Advanced:
        for member, theta_d, phi_d in zip(members, found.theta_nd, found.phi_nd, strict=True):
            member.update(theta_d - phi_d)
        lost, before = lost_messages(setting, exchange.loss, found.number), post.sums(members)
        for tick in range(exchange.ticks):
            mixing = persistent.plan_tick(graph, len(members), post.tick, run_id=setting.run_id)
            post.carry(members, mixing, fate=partial(_fate, lost[tick]))
        next_nd = torch.stack([member.model() for member in members])
        return Advanced(next_nd, mass_error(before, post.sums(members)))

    return advance


def _accelerated(exchange: Step, rule: Gasloc, theta_nd: Tensor) -> Advance:
    """Everybody's own step, the pull towards the others by the exchange, and the acceleration of both."""
    before_nd = theta_nd.clone()

    def advance(found: Round, claims: Sequence[Claim]) -> Advanced:
        nonlocal before_nd
        moved = zip(found.theta_nd, found.phi_nd, strict=True)
        y_nd = torch.stack([proposed(theta_d, theta_d - phi_d, rule) for theta_d, phi_d in moved])
        mixed = exchange(found._replace(theta_nd=y_nd, phi_nd=y_nd), claims)
        ends = zip(y_nd, before_nd, mixed.gradient_nd, strict=True)
        next_nd = torch.stack([landed(y_d, before_d, pull_d, rule) for y_d, before_d, pull_d in ends])
        before_nd = y_nd
        return Advanced(next_nd, mixed.mass_error)

    return advance


def _fate(lost_nn: Any, tick: int, sender: int, receiver: int) -> tuple[int, ...]:
    return () if lost_nn[sender, receiver] else (0,)
