"""GASLoC: the outer step and the pull towards neighbours in one, accelerated (arXiv:2606.11081).

    y = θ − η Δ        θ⁺ = y − α Λ y + γ (y − y')

Δ is the member's own pseudo-gradient θ − φ after however many steps it did, y' the y of its last round (θ itself before
the first), and Λ the Laplacian of the round's exchange: Λ y = y − Σ_j A_ij y_j with a symmetric A is what mixing takes
away. So any exchange of `push_sum` or `pairs` gives it, on y in place of φ:

    y_d = proposed(theta_d, theta_d - phi_d, rule)
    ... begin(me, plan, y_d, theta_ref_d, [1.0]), and the ticks ...
    theta_d, before_d = landed(y_d, before_d, round.finish(y_d, theta_ref_d), rule), y_d

The paper's Λ counts edges, ours the shares on them: where every share is a, its α is ours times a. Two things follow
from Σ_i (Λ y)_i = 0, on any symmetric graph, static or not:

* The mean of members takes DiLoCo's step with Nesterov's momentum γ on the mean of the Δ, exactly.
* On the complete graph α = 1 makes everybody the mean; with γ = 0 that is DiLoCo with plain steps, at every member.

What γ buys is agreement: without it members agree at a rate of 1 - O(1/χ) per exchange, with it 1 - O(1/√χ), χ being
the ratio of Λ's largest eigenvalue and its smallest above zero (`fitted`). On a ring of 16, .93 becomes .67: a fifth of
the exchanges. All members weigh the same. Who has no partner in a tick is not pulled, and keeps its momentum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from farflung.aggregation.graphs import Graph, matrix_of, plan_round
from farflung.aggregation.mass import check_vectors, sweep
from farflung.aggregation.spec import parse_call, parse_decimal
from farflung.protocol.errors import ConfigError

LR_MAX = 100.0
ALPHA_MAX = 4.0
"""Heavy-ball gossip is stable for α < 2 (1 + γ) / λ, λ being Λ's largest eigenvalue: below 4 unless λ < 1, a graph on
which nearly everything is kept."""


@dataclass(frozen=True, slots=True)
class Gasloc:
    """A run's settings. Raises ConfigError unless 0 <= η, 0 < α <= 4 and 0 <= γ < 1."""

    lr: float = 0.7
    """η. Together with γ the mean moves by η / (1 − γ) of a steady Δ, as with any momentum."""

    alpha: float = 1.0
    """α: how much of the pull is followed; 1 takes the exchange's result."""

    gamma: float = 0.0
    """γ: acceleration of agreement, and the mean's Nesterov momentum."""

    def __post_init__(self) -> None:
        if not (0 <= self.lr <= LR_MAX and 0 < self.alpha <= ALPHA_MAX and 0 <= self.gamma < 1):
            raise ConfigError(
                f"gasloc needs 0 <= lr <= {LR_MAX:g}, 0 < alpha <= {ALPHA_MAX:g} and 0 <= gamma < 1, "
                f"got {self.lr}, {self.alpha} and {self.gamma}"
            )


def parse_gasloc(spec: str) -> Gasloc:
    """The settings of "gasloc(lr=0.7,alpha=1.0,gamma=0.5)"; alpha is 1 and gamma 0 by default. Raises ConfigError."""
    call = parse_call(spec, {"gasloc": ("lr", "alpha?", "gamma?")})
    alpha = parse_decimal(call, "alpha", 0.0, ALPHA_MAX, default=1.0)
    gamma = parse_decimal(call, "gamma", 0.0, 1.0, below=True, default=0.0)
    return Gasloc(parse_decimal(call, "lr", 0.0, LR_MAX), alpha, gamma)


def proposed(theta_d: Tensor, delta_d: Tensor, rule: Gasloc, *, threads: int = 1) -> Tensor:
    """y = θ − η Δ [d], in new memory: what goes into the exchange. Raises LocalError if the vectors are not alike."""
    from farflung.aggregation.kernels import persistent as kernels

    check_vectors(theta_d, delta_d)
    y_d = theta_d.detach().clone()
    y, delta = y_d.numpy(), delta_d.detach().numpy()
    sweep(len(y), threads, lambda at: kernels.plain(y[at], delta[at], rule.lr))
    return y_d


def landed(y_d: Tensor, before_d: Tensor, pull_d: Tensor, rule: Gasloc, *, threads: int = 1) -> Tensor:
    """θ⁺ = y − α pull + γ (y − before) [d], in fp64, rounded once, in new memory.

    `pull_d` is Λ y, what a round's `finish(y_d, theta_ref_d)` gives; `before_d` the last round's y, or θ before the
    first. Raises LocalError if the vectors are not alike.
    """
    from farflung.aggregation.kernels import persistent as kernels

    check_vectors(y_d, before_d, pull_d)
    out_d = torch.empty_like(y_d)
    out, y, before, pull = out_d.numpy(), y_d.numpy(), before_d.detach().numpy(), pull_d.numpy()

    def work(at: slice) -> None:
        kernels.accelerate(out[at], y[at], before[at], pull[at], rule.alpha, rule.gamma)

    sweep(len(out), threads, work)
    return out_d


class Fit(NamedTuple):
    """What is best for agreement alone on one graph, by its eigenvalues."""

    alpha: float
    gamma: float

    rate: float
    """By what factor members' disagreement shrinks per exchange, in the long run: √γ."""

    plain_rate: float
    """The best without γ, (χ − 1) / (χ + 1)."""


def fitted(graph: Graph, n: int) -> Fit:
    """α = 4 / (√L + √l)² and γ = ((√L − √l) / (√L + √l))² for n members, L and l being Λ's extreme eigenvalues.

    Polyak's optimum for heavy-ball iterations. As an outer momentum this γ may be more than training bears: take less
    then, and the same α. O(n³), a second for 1,000. Raises ConfigError unless the graph is the same in every tick,
    undirected and connected; on others give settings that were tried.
    """
    (mixing,), (later,) = (plan_round(graph, n, 1, run_id=b"", round_index=tick) for tick in (0, 1))
    matrix_nn = matrix_of(mixing)
    if mixing != later or (matrix_nn != matrix_nn.T).any() or n < 2:
        raise ConfigError(
            f"gasloc's settings follow from a static undirected graph: ring or complete, not {graph.spec}"
        )
    values = np.linalg.eigvalsh(np.eye(n) - matrix_nn)
    low, high = math.sqrt(max(0.0, values[1])), math.sqrt(values[-1])
    if low < 1e-6:
        raise ConfigError(f"gasloc needs a graph that connects all {n} members, got {graph.spec}")
    rate = (high - low) / (high + low)
    return Fit(4 / (high + low) ** 2, rate**2, rate, (high**2 - low**2) / (high**2 + low**2))
