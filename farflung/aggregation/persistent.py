"""Persistent push-sum: mass that lives on from tick to tick, so that no round has to begin or end (arXiv:1811.10792).

A member holds a numerator x and a weight w, at first (m θ, m). Its model is z = x / w. It trains from there, whenever
it likes and for as long as it likes, to φ, and then takes its own outer step, on the **numerator, unscaled**:

    Δ = z − φ        b ← μ b + Δ        x ← x − m η (Δ + μ b)

In every tick it splits (x, w) by its column and adds what arrives. As every share counts once or comes home, Σ x / Σ w
takes DiLoCo's step with the mean of the Δ, exactly, on any graph and however late messages are; where steps stop, it
is the uniform mean that has converged. A step on z instead, x ← x − w η Δ, converges to the mean weighted by w.

    rule = parse_persistent("nesterov(lr=0.7,momentum=0.5)")
    members = [begin(theta_d.clone(), rule) for _ in range(n)]
    post = Post()  # persistent_post: members in one memory; between machines, `persistent_member`
    for tick in range(ticks):
        for member in members:
            z_d = member.model()
            member.update(z_d - train(z_d))
        post.carry(members, plan_tick(graph, n, tick, run_id=run_id))

What a step does to z is Δ / w: where a weight gets small, models are thrown about. Three things keep weights up:

* **Regular graphs only** (`check_regular`), on which weights stay 1 as long as messages arrive in their tick. On an
  irregular one a weight fell to .26 and the loss rose from .75 to 1.03.
* **A ledger**: lost without one, weights went to zero and the loss rose to 11.4; with it, .751 (`persistent_member`).
* **A floor**: below it a member only receives. Loss and lateness alone bring weights down: on 16 members of a one-peer
  exponential graph, over 3,000 ticks, 20 % loss left one weight in a hundred below .18 and the least at .03. With a
  floor of .1 none was below .05, and one share in 500 was kept back.

Ticks are paced by the clock, alike for all: who trains slowly brings fewer updates, not fewer ticks. If members ticked
when they have trained, weights would follow 1 / speed: at a spread of 4, without a floor, they went down to 4e-5.

Members need not start alike, and x may as well hold offsets from a reference that all share. Fragments that are mixed
on their own are values of their own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from farflung.aggregation.graphs import Graph, Mixing, Share, plan_round
from farflung.aggregation.mass import Mass, Sums, check_vectors, sweep
from farflung.aggregation.spec import parse_call, parse_decimal
from farflung.protocol.errors import ConfigError, LocalError

LR_MAX = 100.0
FLOOR = 0.1
"""Of a member's own m: see above. At most ten times Δ is what a step then does to z."""


@dataclass(frozen=True, slots=True)
class PersistentRule:
    """A run's outer step and its floor. Raises ConfigError, with the reason, for what cannot work.

    Only steps that do not look at θ can be taken on a numerator: sgd, nesterov and heavy-ball, as in `outer`.
    """

    form: str = "nesterov"
    """"sgd", "nesterov" or "heavy-ball"."""

    lr: float = 0.7
    """η."""

    momentum: float = 0.5
    """μ: .5 was best where there is one inexact exchange per step; .9 drove members apart. 0 with sgd."""

    floor: float = FLOOR
    """Below this part of its own m, a member neither sends nor steps."""

    def __post_init__(self) -> None:
        if self.form not in ("sgd", "nesterov", "heavy-ball"):
            raise ConfigError(f"persistent mass takes steps of sgd, nesterov or heavy-ball, got {self.form!r}")
        if not (0 <= self.lr <= LR_MAX and 0 <= self.momentum < 1) or (self.form == "sgd" and self.momentum):
            raise ConfigError(f"a step has an lr and, but for sgd, a momentum below 1, got {self.lr}, {self.momentum}")
        if not 0 < self.floor < 1:
            raise ConfigError(f"the floor of persistent weights lies within 0 and 1, got {self.floor}")


def parse_persistent(spec: str, floor: float = FLOOR) -> PersistentRule:
    """The rule with the step that `spec` names, such as "nesterov(lr=0.7,momentum=0.5)". Raises ConfigError.

    Schedule-free and delayed steps are not among the allowed ones: the first is a function of θ, which a numerator is
    not; the second counts rounds, which there are none of.
    """
    call = parse_call(spec, {"sgd": ("lr",), "nesterov": ("lr", "momentum"), "heavy-ball": ("lr", "momentum")})
    momentum = 0.0 if call.name == "sgd" else parse_decimal(call, "momentum", 0.0, 1.0, below=True)
    return PersistentRule(call.name, parse_decimal(call, "lr", 0.0, LR_MAX), momentum, floor)


@dataclass(slots=True)
class PersistentSum:
    """One member's mass and outer state, sans-I/O; `update`, `send` and `receive` come in any order, at any time."""

    rule: PersistentRule
    mass: Mass
    """(x, w)."""

    buffers: tuple[Tensor, ...]
    """The momentum b [d], or nothing. It stays with its member: by linearity, the mean of b is DiLoCo's."""

    claim: float
    """m: what this member's updates count, a positive number. Its own weight at first. After others left or joined
    Σ m over those who train should again be Σ w, or the mean's steps are off by that factor (`rebalanced`)."""

    @property
    def low(self) -> bool:
        """Is the weight below the floor? Then this member only receives."""
        return self.mass.weight < self.rule.floor * self.claim

    def model(self) -> Tensor:
        """z = x / w [d], to train from. Raises LocalError if the weight is zero: after a leave."""
        return self.mass.ratio()

    def update(self, delta_d: Tensor) -> bool:
        """Take the outer step for Δ = z − φ. False, and nothing changes, below the floor.

        The caller may then train on from φ and offer all of z − φ later, or adopt z and let it go.

        Two passes; nothing is allocated. Raises LocalError, and changes nothing, unless Δ is finite and of x's kind:
        what is added to persistent mass stays in it for ever.
        """
        from farflung.aggregation.kernels import mass as mass_kernels
        from farflung.aggregation.kernels import persistent as kernels

        check_vectors(self.mass.numerator_d, delta_d)
        rule, delta = self.rule, delta_d.detach().numpy()
        sizes = sweep(len(delta), self.mass.threads, lambda at: mass_kernels.measure(delta[at])[1])
        if not math.isfinite(sum(sizes)):
            raise LocalError(f"an update that is not finite cannot be added, its size being {sum(sizes)}")
        if self.low:
            return False
        x, buffers = self.mass.numerator_d.numpy(), [buffer_d.numpy() for buffer_d in self.buffers]
        step, lr = kernels.nesterov if rule.form == "nesterov" else kernels.heavy_ball, self.claim * rule.lr

        def work(at: slice) -> None:
            if buffers:
                step(x[at], buffers[0][at], delta[at], lr, rule.momentum)
            else:
                kernels.plain(x[at], delta[at], lr)

        sweep(len(x), self.mass.threads, work)
        return True

    def send(self, sends: Sequence[Share]) -> dict[int, Mass]:
        """Receiver -> its share; the rest stays. Nothing below the floor. Cost and errors are those of `Mass.split`."""
        return {} if self.low else self.mass.split(sends)

    def receive(self, mass: Mass) -> None:
        """Add what a message carried, or what came home. Empties it. Raises LocalError if it is of another kind."""
        self.mass.absorb(mass)

    def leave(self) -> Mass:
        """Hand over everything, to be received by another member: Σ x and Σ w stay."""
        handed = self.mass
        self.mass = Mass(torch.zeros_like(handed.numerator_d), 0.0, threads=handed.threads)
        return handed

    def sums(self) -> Sums:
        """The audit's numbers."""
        return self.mass.sums()


def begin(theta_d: Tensor, rule: PersistentRule, *, weight: float = 1.0, threads: int = 1) -> PersistentSum:
    """Start, or join, with (m θ, m), θ being a model of now: a member's z, or a certified anchor.

    Holds two vectors of θ's kind, one without momentum. Raises LocalError unless m > 0 and θ is a contiguous fp32 or
    fp64 CPU vector.
    """
    if not 0 < weight < math.inf:
        raise LocalError(f"a member brings a positive mass, got {weight}")
    mass = Mass.started(theta_d, torch.zeros_like(theta_d), weight, threads=threads)
    buffers = (torch.zeros_like(theta_d),) if rule.momentum else ()
    return PersistentSum(rule, mass, buffers, weight)


def rebalanced(claims: Sequence[float], total: float) -> tuple[float, ...]:
    """The claims of those who train, scaled to sum to `total` = Σ w, what all members there ever were brought.

    Who leaves takes no mass along and trains no more; without this, steps would shrink with every leave. Raises
    LocalError unless all are positive.
    """
    if not claims or min(*claims, total) <= 0:
        raise LocalError(f"claims and their total are positive, got {list(claims)} and {total}")
    factor = total / math.fsum(claims)
    return tuple(claim * factor for claim in claims)


def check_regular(mixing: Mixing) -> None:
    """Raise ConfigError unless every receiver's shares, with what it keeps, sum to 1 exactly.

    Those of senders always do (`check_mixing`); both together keep equal weights equal.
    """
    got = [Fraction(column.keep) for column in mixing]
    for column in mixing:
        for share in column.sends:
            got[share.to] += Fraction(share.share)
    for member, total in enumerate(got):
        if total != 1:
            raise ConfigError(
                "persistent mass needs a regular graph, in which every member gets what it gives: on an irregular one "
                "weights fell to .26 and the loss rose from .75 to 1.03; use another graph, or fresh mass in every "
                f"round. With this one, member {member} gets {float(total):.4g}"
            )


def plan_tick(graph: Graph, n: int, tick: int, *, run_id: bytes) -> Mixing:
    """The mixing of one tick of n members, the same at each of them. Raises ConfigError if it is not regular."""
    (mixing,) = plan_round(graph, n, 1, run_id=run_id, round_index=tick)
    check_regular(mixing)
    return mixing
