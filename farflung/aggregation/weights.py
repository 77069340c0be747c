"""From claims to weights: how much of the round's mass each member gets. Claims come from peers and are capped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from farflung.aggregation.spec import parse_call, parse_integer
from farflung.protocol.errors import ConfigError, LocalError, TooFewPeers

WEIGHT_MAX = 1 << 53
"""The largest weight or cap: fp64 counts integers exactly up to here."""


class Claim(NamedTuple):
    """What a member says it did since the last round. Two integers >= 0, checked where the message was read."""

    steps: int
    tokens: int


class WeightPolicy(NamedTuple):
    """How claims become weights."""

    spec: str
    """Canonical text: "uniform", "steps(cap=500)" or "tokens(cap=1000000)"."""

    weigh: Callable[[Sequence[Claim]], Tensor]
    """n claims -> fp64 weights [n], integers >= 0. A weight of zero is no mass: the row does not count.
    Raises TooFewPeers if all are zero, LocalError if a claim is negative."""


def uniform() -> WeightPolicy:
    """Every member counts the same: the mean of members' objectives. Nothing a member claims changes it."""
    return WeightPolicy("uniform", lambda claims: _weights([1 for _ in claims]))


def steps(cap: int) -> WeightPolicy:
    """By inner steps, each claim at most `cap`: the mean over steps done. Raises ConfigError unless 1 <= cap."""
    _check_cap(cap)
    return WeightPolicy(f"steps(cap={cap})", lambda claims: _weights([min(claim.steps, cap) for claim in claims]))


def tokens(cap: int) -> WeightPolicy:
    """By tokens seen, each claim at most `cap`: the mean over data. Raises ConfigError unless 1 <= cap."""
    _check_cap(cap)
    return WeightPolicy(f"tokens(cap={cap})", lambda claims: _weights([min(claim.tokens, cap) for claim in claims]))


def parse_weights(spec: str) -> WeightPolicy:
    """The policy that `spec` names. Raises ConfigError with the position and what is allowed."""
    call = parse_call(spec, {"uniform": (), "steps": ("cap",), "tokens": ("cap",)})
    if call.name == "uniform":
        return uniform()
    cap = parse_integer(call, "cap", 1, WEIGHT_MAX)
    return steps(cap) if call.name == "steps" else tokens(cap)


def sum_in_order(weights: Sequence[float]) -> float:
    """Plain fp64 additions from first to last. (`sum` is compensated since Python 3.12, torch's is not in order.)"""
    total = 0.0
    for weight in weights:
        total += weight
    return total


def checked_weights(weight_n: Tensor, n: int, f: int) -> list[float]:
    """The weights as numbers, for a rule over n rows of which f may be arbitrary.

    Raises LocalError unless they are n fp64 numbers within [0, WEIGHT_MAX] and f >= 0; TooFewPeers if fewer than
    2 f + 1 of them, or none, are positive.
    """
    if weight_n.dtype != torch.float64 or weight_n.shape != (n,):
        raise LocalError(f"expected {n} fp64 weights, got {weight_n.dtype} {tuple(weight_n.shape)}")
    weights: list[float] = weight_n.tolist()
    wrong = [weight for weight in weights if not 0 <= weight <= WEIGHT_MAX]
    if wrong or f < 0:
        raise LocalError(f"weights lie within 0 and 2**53 and f is not negative, got {wrong[:4]} and f = {f}")
    counted = sum(weight > 0 for weight in weights)
    if counted < 2 * f + 1:
        raise TooFewPeers(f"{f} arbitrary rows need at least {2 * f + 1} rows with weight, got {counted}")
    return weights


def _weights(claims: list[int]) -> Tensor:
    if any(claim < 0 for claim in claims):
        raise LocalError(f"a claim cannot be negative, got {min(claims)}")
    if not any(claims):
        raise TooFewPeers(f"none of {len(claims)} members brings any weight")
    return torch.tensor(claims, dtype=torch.float64)


def _check_cap(cap: int) -> None:
    if not 1 <= cap <= WEIGHT_MAX:
        raise ConfigError(f"a cap on weights lies within 1 and 2**53, got {cap}")
