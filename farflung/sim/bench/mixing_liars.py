"""What liars tell their partners in pairs mode. They train like everybody else, and move like everybody else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from farflung.aggregation.pairs import Lie, Offer, PairRound
from farflung.aggregation.spec import parse_call, parse_decimal
from farflung.node.data import generator_of
from farflung.protocol.errors import ConfigError
from farflung.sim.attacks import Attack, View, parse_attack
from farflung.sim.attacks.view import legal

LAYERS = ("vector", "raw")
"""Of attacks that fit: those that say what a liar tells its partner. Nobody counts bytes or claims here."""

DISSENSUS = "dissensus"
"""The attack that knows its victim, which those of `sim.attacks` do not."""

RADIUS_CLAIMED = 1e300
"""What a liar says it would let itself be moved by: more than anybody's, so that its victim's own radius counts."""


class Round(NamedTuple):
    """What liars know of a round: everything."""

    number: int
    """1 for the first."""
    theta_nd: Tensor
    """Where members started."""
    phi_nd: Tensor
    """Where they are."""
    theta_ref_d: Tensor


Lies = Callable[[Round, Sequence[PairRound], int, dict[str, Any]], Lie]
"""(round, the pairs' rounds, liars, what they remember) -> what each tells whom, when."""


class Lying(NamedTuple):
    """An attack on pairs."""

    spec: str
    """Canonical text."""
    lies: Lies


def parse_lying(spec: str) -> Lying:
    """`dissensus(scale=1.0)`, or an attack of `sim.attacks`. Raises ConfigError for one that says nothing to a partner.

    Dissensus tells every victim to go away from the honest mean (arXiv:2202.01545, §4.3, for a pair): z_j less `scale`
    times the mean less z_j. The others make an update u each round, and tell everybody φ = θ_i − u.
    """
    if spec.split("(", maxsplit=1)[0].strip() == DISSENSUS:
        scale = parse_decimal(parse_call(spec, {DISSENSUS: ("scale?",)}), "scale", 0.0, 1e6, default=1.0)
        return Lying(f"{DISSENSUS}(scale={scale!r})", _dissensus(scale))
    attack = parse_attack(spec)
    if attack.layer not in LAYERS:
        raise ConfigError(f"pairs take {DISSENSUS} and attacks of the layers {', '.join(LAYERS)}, got {attack.spec}")
    return Lying(attack.spec, _everybody_alike(attack))


def _dissensus(scale: float) -> Lies:
    def lies(found: Round, rounds: Sequence[PairRound], liars: int, memory: dict[str, Any]) -> Lie:
        honest = len(rounds) - liars

        def lie(tick: int, who: int, whom: int) -> tuple[Offer, Tensor] | None:
            if who < honest:
                return None
            mean_d = torch.stack([member.z_d for member in rounds[:honest]]).mean(0)
            victim_d = rounds[whom].z_d
            return Offer(RADIUS_CLAIMED, rounds[who].weight), legal(victim_d - scale * (mean_d - victim_d))

        return lie

    return lies


def _everybody_alike(attack: Attack) -> Lies:
    def lies(found: Round, rounds: Sequence[PairRound], liars: int, memory: dict[str, Any]) -> Lie:
        honest = len(rounds) - liars
        delta_nd = found.theta_nd - found.phi_nd
        rng = generator_of("mixing liars", found.number, liars)
        view = View(delta_nd[:honest], delta_nd[honest:], len(rounds), liars, rng, found.number, memory)
        said = [
            theta_d - update_d - found.theta_ref_d
            for theta_d, update_d in zip(found.theta_nd[honest:], attack.make(view), strict=True)
        ]
        bounded = [said_d if attack.layer == "raw" else legal(said_d) for said_d in said]

        def lie(tick: int, who: int, whom: int) -> tuple[Offer, Tensor] | None:
            return None if who < honest else (Offer(RADIUS_CLAIMED, rounds[who].weight), bounded[who - honest])

        return lie

    return lies
