"""Pairs: members meet two by two and each moves towards the other by the same clipped step. For untrusted members.

A member holds its offset z = φ − θ_ref, and a weight that never moves. Two who meet tell each other their radius τ and
their weight first, then z. Both move along the *difference of ratios*, shortened to τ = min(τ_i, τ_j) if it is longer:

    z_i += w_j / (w_i + w_j) · clip(z_j − z_i, τ)          z_j += w_i / (w_i + w_j) · clip(z_i − z_j, τ)

so w_i z_i + w_j z_j does not change: an honest pair conserves its mean, clipped or not, up to one rounding each. With
radii of their own the two would conserve nothing (the mean drifts by percents of the spread). ClippedGossip
(arXiv:2202.01545) over random matchings; no member's lie moves another by more than the other's τ per meeting.

Weights are claims: above the cap they count as the cap, below the floor the meeting is refused. Numerators are never
exchanged, so no weight can be small enough to make a ratio large. An exchange that only one side completes - the other
never heard - moves the mean of n by at most τ / n once; nothing can be kept in escrow between two who do not trust.

The pseudo-gradient θ_i − (θ_ref + z_i) is both consensus pull and movement. With the outer step `heavy-ball(lr=α,
momentum=μ)` and b = −m / α it is NoLoCo's (arXiv:2506.10911, as coded: m ← μ m + α mean_pair(φ_end) − α θ_i, θ_i += m).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from farflung.aggregation.graphs import Mixing, partners_of
from farflung.aggregation.mass import Mass, check_vectors, sweep
from farflung.aggregation.weights import sum_in_order
from farflung.aggregation.windows import WINDOW
from farflung.protocol.errors import ConfigError, LocalError, PeerError
from farflung.protocol.limits import PAYLOAD_ABS_MAX

HISTORY_MAX = 15
"""Distances a radius is worked out from: odd, so that one of them is the median; few, because training changes them."""


class Offer(NamedTuple):
    """What each of two members tells the other before they exchange."""

    radius: float
    """τ: how far this member lets itself be moved in one meeting, before weights."""

    weight: float


class Claims(NamedTuple):
    """Within what a run's members' weights lie: its genesis says. 0 < floor <= cap."""

    floor: float = 1.0
    cap: float = 1.0


@dataclass(frozen=True, slots=True)
class Radius:
    """How far a member lets itself be moved, from what it has seen: nobody has to know the spread beforehand.

    τ = scale × the median of the last distances to partners, before clipping. As long as fewer than half of the
    partners lie, the median lies between distances to honest ones. Until HISTORY_MAX distances were seen, the missing
    ones count as the member's own movement of this round.
    """

    scale: float = 1.0
    distances: tuple[float, ...] = ()
    """The newest last."""

    def __post_init__(self) -> None:
        if not 0 < self.scale < math.inf:
            raise ConfigError(f"a radius is a positive multiple of the usual distance, got scale {self.scale}")

    def value(self, movement: float) -> float:
        """τ for a member that moved this far by itself, ‖φ − θ_ref‖. Raises LocalError unless that is a length."""
        if not 0 <= movement < math.inf:
            raise LocalError(f"a movement is a finite length, got {movement}")
        seen = sorted([*self.distances, *[movement] * (HISTORY_MAX - len(self.distances))])
        return self.scale * seen[len(seen) // 2]

    def seen(self, distance: float) -> Radius:
        """The radius after a meeting at this distance."""
        return replace(self, distances=(*self.distances, distance)[-HISTORY_MAX:])


class Meeting(NamedTuple):
    """What one exchange did at one end."""

    distance: float
    """‖z_j − z_i‖ before it."""

    clip: float
    """By what the difference was multiplied, 0 to 1; 1: not clipped."""

    moved: float
    """‖change of z_i‖."""


@dataclass(slots=True)
class PairRound:
    """One member's round: it makes offers, meets partners, and finishes with a pseudo-gradient. Sans-I/O."""

    z_d: Tensor
    """The ratio: this member's offset from θ_ref, fp32 or fp64. Changed in place by `meet`."""

    weight: float
    """Its mass; it does not change."""

    movement: float
    """How far it moved by itself, ‖φ − θ_ref‖."""

    radius: Radius
    claims: Claims
    threads: int = 1

    def offer(self) -> Offer:
        """What to tell the partner. The same until the next meeting."""
        return Offer(self.radius.value(self.movement), self.weight)

    def meet(self, theirs: Offer, theirs_d: Tensor, *, peer: str, mine: Offer | None = None) -> Meeting:
        """Move towards the partner. `mine` is the offer that was made, if it is not the present one.

        Reads both vectors twice and writes one. Raises PeerError, and changes nothing, unless the partner's offer and
        vector can be believed: `check_offer`, and entries finite and within PAYLOAD_ABS_MAX.
        """
        from farflung.aggregation.kernels import mass as kernels

        mine = self.offer() if mine is None else mine
        check_offer(theirs, self.claims, peer)
        check_vectors(self.z_d, theirs_d)
        own, other = self.z_d.numpy(), theirs_d.numpy()
        pieces = sweep(len(own), self.threads, lambda at: kernels.measure(other[at]))
        largest, size = max((piece[2] for piece in pieces), default=0.0), sum(piece[1] for piece in pieces)
        if not (math.isfinite(size) and largest <= PAYLOAD_ABS_MAX):
            raise PeerError(peer, f"sent an offset with entries as large as {largest}, {size} together")
        squares = sweep(len(own), self.threads, lambda at: kernels.distance2(own[at], other[at]))
        distance = math.sqrt(sum_in_order(squares))
        clip, factor = pull_of(mine, theirs, distance, self.claims)
        sweep(len(own), self.threads, lambda at: kernels.pull(own[at], own[at], other[at], factor))
        self.radius = self.radius.seen(distance)
        return Meeting(distance, clip, factor * distance)

    def finish(self, theta_d: Tensor, theta_ref_d: Tensor) -> Tensor:
        """The pseudo-gradient θ_i − (θ_ref + z) [d], for the outer step on this member's own θ_i."""
        return Mass(self.z_d, 1.0, threads=self.threads).gradient(theta_d, theta_ref_d)


def begin(
    phi_d: Tensor, theta_ref_d: Tensor, weight: float, radius: Radius, claims: Claims | None = None, *, threads: int = 1
) -> PairRound:
    """Start a round. Raises LocalError unless this member's own weight is one it would believe."""
    claims = Claims() if claims is None else claims
    if not 0 < claims.floor <= weight <= claims.cap < math.inf:
        raise LocalError(
            f"weights lie within {claims.floor} and {claims.cap}; a member without steps idles, got {weight}"
        )
    z_d = Mass.started(phi_d, theta_ref_d, 1.0, threads=threads).numerator_d
    return PairRound(z_d, weight, _norm(z_d, threads), radius, claims, threads)


def check_offer(offer: Offer, claims: Claims, peer: str) -> None:
    """Raise PeerError unless the radius is finite and not negative and the weight a number not below the floor."""
    if not 0 <= offer.radius < math.inf:
        raise PeerError(peer, f"offers to be moved by {offer.radius}")
    if not claims.floor <= offer.weight < math.inf:
        raise PeerError(peer, f"claims a weight of {offer.weight}, below the run's floor of {claims.floor}")


def pull_of(mine: Offer, theirs: Offer, distance: float, claims: Claims) -> tuple[float, float]:
    """(clip, factor): the difference is multiplied by clip at both ends, and by factor in all at mine.

    Both ends come to the same clip from the same two offers, and their factors times their weights are the same number
    up to rounding.
    """
    radius = min(mine.radius, theirs.radius)
    clip = 1.0 if distance <= radius else radius / distance
    own, other = min(mine.weight, claims.cap), min(theirs.weight, claims.cap)
    return clip, clip * (other / (own + other))


Lie = Callable[[int, int, int], tuple[Offer, Tensor] | None]
"""(tick, who, to whom) -> what this member says instead of the truth; None: the truth."""


def honest(tick: int, who: int, whom: int) -> tuple[Offer, Tensor] | None:
    """Everybody tells the truth."""
    return None


Arrives = Callable[[int, int, int], bool]
"""(tick, sender, receiver) -> does the sender's vector arrive? Who hears nothing stays where it is."""


def always(tick: int, sender: int, receiver: int) -> bool:
    """Nothing is lost."""
    return True


def mix_pairs(
    rounds: Sequence[PairRound], plan: Sequence[Mixing], *, lie: Lie = honest, arrives: Arrives = always
) -> None:
    """Run the rounds of all members in memory, in place: the reference for tests and training tables.

    A meeting that either side refuses does not take place; a vector that is lost leaves its receiver where it is, the
    other one moves. Raises LocalError unless every tick is a matching of them.
    """
    for tick, mixing in enumerate(plan):
        partners = partners_of(mixing)
        if len(partners) != len(rounds):
            raise LocalError(f"{len(rounds)} members meet in a plan for {len(partners)}")
        for i, j in ((i, j) for i, j in enumerate(partners) if j is not None and i < j):
            said_i = lie(tick, i, j) or (rounds[i].offer(), rounds[i].z_d.clone())
            said_j = lie(tick, j, i) or (rounds[j].offer(), rounds[j].z_d.clone())
            try:
                check_offer(said_i[0], rounds[j].claims, str(i))
                check_offer(said_j[0], rounds[i].claims, str(j))
            except PeerError:
                continue
            if arrives(tick, j, i):
                _meet(rounds[i], said_j, str(j))
            if arrives(tick, i, j):
                _meet(rounds[j], said_i, str(i))


def _meet(member: PairRound, said: tuple[Offer, Tensor], peer: str) -> None:
    try:
        member.meet(*said, peer=peer)
    except PeerError:
        return


def _norm(z_d: Tensor, threads: int) -> float:
    from farflung.aggregation.kernels import mass as kernels

    own, zero = z_d.numpy(), torch.zeros_like(z_d[:WINDOW]).numpy()
    squares = sweep(len(own), threads, lambda at: kernels.distance2(own[at], zero[: at.stop - at.start]))
    return math.sqrt(sum_in_order(squares))
