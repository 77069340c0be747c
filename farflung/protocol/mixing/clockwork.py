"""A round's ticks: to whom a member speaks, whom it waits for, and how long.

A tick ends when everybody awaited has brought what it has, at the tick's deadline, which is learnt from how long the
slowest ticks of earlier rounds took, or when those who are still awaited have not been heard of for a while. What comes
later still counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from farflung.protocol.deadline import AdaptiveDeadline
from farflung.protocol.genesis import Genesis
from farflung.protocol.identity import PeerId

Heard = Callable[[PeerId], float | None]
"""Peer -> when it was heard last, by whatever message; None: not yet."""


class TickPlan(NamedTuple):
    """One tick as one member sees it; peers in the members' order."""

    sends: tuple[PeerId, ...]
    awaits: tuple[PeerId, ...]


@dataclass(slots=True)
class Patience:
    """How long this member waits; one per node, kept over rounds."""

    tick: AdaptiveDeadline
    """How long a share may take, theirs to this member or its own to them, from when this member has sent: of every
    round the longest is remembered. Partners change from tick to tick, and a median of all would not see the slow."""
    silence_s: float
    settle_s: float
    resend_s: float

    @staticmethod
    def of(genesis: Genesis) -> Patience:
        """Without history a tick may take `tick_ms`, but not longer than a round may."""
        timing, mixing = genesis.timing, genesis.mixing
        most_s = min(mixing.tick_ms, timing.deadline_ceiling_ms) / 1e3
        tick = AdaptiveDeadline(min(timing.view_floor_ms / 1e3, most_s), most_s, timing.deadline_mads)
        return Patience(tick, mixing.silence_ms / 1e3, mixing.settle_ms / 1e3, timing.resend_ms / 1e3)


@dataclass(slots=True)
class Clockwork:
    """Which tick it is and for whom it waits. `fragments`: how many parts each awaited peer brings."""

    plan: tuple[TickPlan, ...]
    fragments: int
    patience: Patience
    tick: int = -1
    """The tick that was begun last; -1: none yet."""
    began_s: float = -math.inf
    brought: set[tuple[int, PeerId, int]] = field(default_factory=set)
    """(tick, peer, fragment) that need not be waited for any more."""
    given_up: int = 0
    """How often a peer was waited for in vain."""
    slowest_s: float = -math.inf
    """How long the longest tick took so far, or the longest way of a share to its receiver."""
    absent: set[PeerId] = field(default_factory=set)
    """Peers that take no part in the round, or not any more."""
    hurried: bool = False
    """Others have gone on without this member: it waits for nobody any more."""

    def begin(self, tick: int, now_s: float) -> None:
        """The tick's shares have been sent."""
        self.tick, self.began_s = tick, now_s

    def waits_for(self) -> tuple[PeerId, ...]:
        """Who has not brought everything of the present tick yet."""
        if self.tick < 0:
            return ()
        parts = range(self.fragments)
        awaits = [peer for peer in self.plan[self.tick].awaits if peer not in self.absent]
        return tuple(peer for peer in awaits if any((self.tick, peer, part) not in self.brought for part in parts))

    def is_over(self, now_s: float, heard: Heard, since_s: float) -> bool:
        """Whether the tick need not be waited for any longer. `since_s`: when the round began: nobody is silent yet."""
        missing = self.waits_for()
        late = bool(missing) and now_s >= self.began_s + self.patience.tick.value_s
        if missing and not late and not self.hurried and now_s < self.silent_s(missing, heard, since_s):
            return False
        self.given_up += len(missing)
        if self.plan[self.tick].awaits and (late or not missing):  # of silence there is nothing to be learnt
            self.note(now_s - self.began_s)
        return True

    def note(self, duration_s: float) -> None:
        """Something of this round took so long."""
        self.slowest_s = max(self.slowest_s, duration_s)

    def learn(self) -> None:
        """The round is over here: remember how long its slowest part took."""
        if self.slowest_s >= 0:
            self.patience.tick.observe(self.slowest_s)

    def silent_s(self, peers: Iterable[PeerId], heard: Heard, since_s: float) -> float:
        """When all of these will have been silent for `silence_s`, if nothing is heard of them; -inf for nobody."""
        return max((_last_s(peer, heard, since_s) for peer in peers), default=-math.inf) + self.patience.silence_s

    def wake_s(self, heard: Heard, since_s: float) -> float:
        """When `is_over` may change its mind without any news."""
        missing = self.waits_for()
        if not missing:
            return -math.inf
        return min(self.began_s + self.patience.tick.value_s, self.silent_s(missing, heard, since_s))


def _last_s(peer: PeerId, heard: Heard, since_s: float) -> float:
    heard_s = heard(peer)
    return since_s if heard_s is None else max(since_s, heard_s)


def plans_of(
    me: PeerId, members: tuple[PeerId, ...], receivers: Iterable[Iterable[Iterable[int]]]
) -> tuple[TickPlan, ...]:
    """One member's ticks. `receivers`: tick -> sender -> positions it gives to, all in the members' order."""
    at = members.index(me)
    plans = []
    for tick in receivers:
        given = [tuple(positions) for positions in tick]
        sends = tuple(members[position] for position in given[at])
        awaits = tuple(members[sender] for sender, positions in enumerate(given) if at in positions)
        plans.append(TickPlan(sends, awaits))
    return tuple(plans)
