"""Adaptive Weighting Push-SUM: give more to the members from whom one is further away (arXiv:2412.07252). An option.

A sender's share to j is its share in the graph, b_j, times a factor that grows with the distance of their ratios:

    a_j = b_j (1 − v) / (1 + v) (1 + v − exp(−k r_j²))         r_j = ‖z_i − z_j‖ / median_l ‖z_i − z_l‖

The rest stays with the sender, at least v of every share: columns sum to 1 like any other, and mass is conserved.
With b_j = 1 / (receivers + 1) this is the paper's rule but for r: the paper has the distance itself there. Its square
is beyond 30 for any large model, and every factor would be 1 − v for ever. Divided by the median, it depends neither on
the scale of the parameters nor on how long training went on. And whoever was not heard yet counts as usual (r = 1), not
as near: on a directed graph a member may never hear from those it gives to.

Distances are measured when a message arrives, from what it carries; only numbers are kept, no copies of neighbours.

What it gives up: receivers get unequal shares. Means are weighted unequally as long as mixing is not complete, exact
graphs are exact no longer, and persistent mass cannot be mixed so (`persistent.check_regular` refuses it). And it
listens most to those who are furthest away, which is the opposite of a robust rule: never among liars.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from statistics import median

from farflung.aggregation.graphs import Column, Mixing, column_of
from farflung.aggregation.mass import Mass, sweep
from farflung.aggregation.spec import parse_call, parse_decimal
from farflung.aggregation.weights import sum_in_order
from farflung.protocol.errors import ConfigError, LocalError
from farflung.protocol.identity import PeerId

K_MAX = 1e3
V_MIN = 1e-3
"""Below, a member that is at no distance would be given next to nothing: v (1 − v) / (1 + v) of its share."""


@dataclass(frozen=True, slots=True)
class AdaptiveWeighting:
    """A run's settings. Raises ConfigError unless .001 <= v < 1 and 0 < k <= 1,000."""

    v: float = 0.1
    """How much of a share is given whatever the distance, about; and what is kept back of every share at least."""

    k: float = 1.0
    """How fast a share grows with distance. At the usual distance the factor is (1 − v)(1 + v − e^−k) / (1 + v)."""

    def __post_init__(self) -> None:
        if not (V_MIN <= self.v < 1 and 0 < self.k <= K_MAX):
            raise ConfigError(
                f"adaptive weighting needs {V_MIN} <= v < 1 and 0 < k <= {K_MAX:g}, got {self.v}, {self.k}"
            )

    def factor(self, relative: float) -> float:
        """By what a share is multiplied at this many usual distances: rises from v (1 − v) / (1 + v) towards 1 − v."""
        return (1 - self.v) / (1 + self.v) * (1 + self.v - math.exp(-self.k * relative * relative))


def parse_adaptive(spec: str, *, liars: int) -> AdaptiveWeighting:
    """The settings of "adaptive(v=0.1,k=1.0)", both optional, for a run in which so many members may lie.

    Raises ConfigError for anything else, and if there may be liars.
    """
    call = parse_call(spec, {"adaptive": ("v?", "k?")})
    v = parse_decimal(call, "v", V_MIN, 1.0, below=True, default=0.1)
    rule = AdaptiveWeighting(v, parse_decimal(call, "k", 0.0, K_MAX, default=1.0))
    if liars:
        raise ConfigError(
            "adaptive weighting gives most to, and hears most of, the members that are furthest away, which is where a "
            f"liar puts itself: use it among trusted members, or leave it out, got liars = {liars}"
        )
    return rule


@dataclass(frozen=True, slots=True)
class Distances:
    """How far from others one member was when it last heard them. A value: `heard` gives the next one."""

    by_peer: Mapping[PeerId, float]
    """‖z_i − z_j‖ of those heard so far, of one fragment or of whole vectors: the same thing every time."""

    def heard(self, peer: PeerId, distance: float) -> Distances:
        """After a message of this peer. Raises LocalError unless the distance is a finite length."""
        if not 0 <= distance < math.inf:
            raise LocalError(f"a distance is a finite length, got {distance}")
        return Distances({**self.by_peer, peer: distance})

    def among(self, members: Sequence[PeerId]) -> Distances:
        """Without those who are not members any more."""
        return Distances({peer: self.by_peer[peer] for peer in members if peer in self.by_peer})

    def relative(self, peer: PeerId) -> float:
        """r: the distance in units of the median of all that are known. 1 for who was not heard yet, and for all if
        the median is zero and so is this one's.
        """
        if peer not in self.by_peer:
            return 1.0
        usual, distance = median(self.by_peer.values()), self.by_peer[peer]
        return distance / usual if usual else math.inf if distance else 1.0


def distance_between(mine: Mass, theirs: Mass) -> float | None:
    """‖s_i / w_i − s_j / w_j‖, before the one is added to the other; None if either says nothing.

    Five passes, two vectors in passing. Raises LocalError if the masses differ in kind.
    """
    from farflung.aggregation.kernels import mass as kernels

    if not (mine.weight and theirs.weight):
        return None
    own, other = mine.ratio(), theirs.ratio()
    if own.shape != other.shape or own.dtype != other.dtype:
        raise LocalError(f"ratios of one kind have a distance, got {own.dtype} {len(own)}, {other.dtype} {len(other)}")
    left, right = own.numpy(), other.numpy()
    return math.sqrt(sum_in_order(sweep(len(left), mine.threads, lambda at: kernels.distance2(left[at], right[at]))))


def adapted(
    mixing: Mixing, me: int, members: Sequence[PeerId], distances: Distances, rule: AdaptiveWeighting
) -> Mixing:
    """The mixing with this member's own column by distance; the others' columns are their own to know.

    Receivers are the same, so everybody still knows for whom to wait. Shares are multiples of 2**-53 and sum to 1 with
    what is kept. Raises LocalError unless `members` are those of the mixing, in its order.
    """
    if len(members) != len(mixing) or not 0 <= me < len(mixing):
        raise LocalError(f"a mixing of {len(mixing)} members cannot be adapted for member {me} of {len(members)}")
    known = distances.among(members)
    column = _column(mixing[me], me, {share.to: known.relative(members[share.to]) for share in mixing[me].sends}, rule)
    return (*mixing[:me], column, *mixing[me + 1 :])


def _column(column: Column, sender: int, relative: Mapping[int, float], rule: AdaptiveWeighting) -> Column:
    parts = [(to, Fraction(share) * Fraction(rule.factor(relative[to]))) for to, share in column.sends]
    return column_of(sender, parts)
