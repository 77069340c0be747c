"""One member's round of pairs as a machine without I/O: in each tick it meets at most one partner.

Both tell each other an offer and where their offset of before the meeting is. Whoever has the other's moves; nobody
waits for an acknowledgement. A member repeats its note while it lacks its partner's, and answers a repeated one: so a
lost note costs time, and only silence makes a meeting one-sided, which moves the mean by at most one radius over n.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from farflung.protocol.blob import BlobRef
from farflung.protocol.errors import LocalError, PeerError
from farflung.protocol.identity import PeerId
from farflung.protocol.mixing.clockwork import Clockwork, Heard, Patience, TickPlan
from farflung.protocol.mixing.notes import Absent, Note, Offer
from farflung.protocol.mixing.push_sum import Close, Get, Split, Stage, Tell


@dataclass(frozen=True, slots=True)
class Meet:
    """The partner's vector is here: move towards it, by the offer that this member made in that tick.

    It may come with a later event than the vector did: keep that until the round is over here.
    """

    peer: PeerId
    note: Note


Effect: TypeAlias = Split | Tell | Get | Meet | Close


@dataclass(slots=True)
class PairMachine:
    """Effects are those of `push_sum`, with `Meet` instead of mass that moves; `Split` asks for this tick's offers.

    A member whose claims are empty idles: it has nothing that anybody should move towards, and is moved all the same.
    """

    me: PeerId
    round_index: int
    plan: tuple[TickPlan, ...]
    fragments: int
    patience: Patience
    heard: Heard
    started_s: float
    stage: Stage = Stage.SPLITTING
    clock: Clockwork = field(init=False)
    _mine: dict[tuple[PeerId, int, int], Note] = field(default_factory=dict)
    """(partner, fragment, tick) -> what I told it."""
    _asked: set[tuple[PeerId, int, int]] = field(default_factory=set)
    _early: dict[tuple[PeerId, int, int], Note] = field(default_factory=dict)
    """Notes whose vectors are here before this member's own offer was made."""
    _met: set[tuple[PeerId, int, int]] = field(default_factory=set)
    _splitting: int = -1
    _said_s: float = -math.inf
    _out: list[Effect] = field(default_factory=list)

    def __post_init__(self) -> None:
        if any(len(tick.sends) > 1 or tick.sends != tick.awaits for tick in self.plan):
            raise LocalError("pairs need a graph whose ticks are matchings")
        self.clock = Clockwork(self.plan, self.fragments, self.patience)

    def begin(self, now_s: float) -> list[Effect]:
        """The round begins."""
        return self._step(now_s)

    def post(
        self, tick: int, offers: Mapping[tuple[PeerId, int], tuple[Offer, BlobRef] | None], now_s: float
    ) -> list[Effect]:
        """The tick's offers by (partner, fragment); None: this member has none. Raises LocalError out of turn."""
        wanted = {(peer, part) for peer in self.plan[tick].sends for part in range(self.fragments)}
        if self.stage is not Stage.SPLITTING or tick != self.clock.tick + 1 or offers.keys() != wanted:
            raise LocalError(f"offers of tick {tick} while {self.stage} after tick {self.clock.tick}")
        self.stage = Stage.WAITING
        self.clock.begin(tick, now_s)
        self._said_s = now_s
        for peer, part in sorted(offers):
            offer = offers[peer, part]
            note = Note(part, tick, None) if offer is None else Note(part, tick, *offer)
            self._mine[peer, part, tick] = note
            self._out.append(Tell(peer, note))
        for key in [key for key in self._early if key[2] == tick]:
            self._meet(key, self._early.pop(key))
        return self._step(now_s)

    def hear(self, peer: PeerId, note: Note, now_s: float) -> list[Effect]:
        """A partner's note. Raises PeerError, having changed nothing, if it is not its turn."""
        if isinstance(note.content, Absent):
            self.clock.absent.add(peer)
            return self._step(now_s)
        right = note.fragment < self.fragments and note.tick < len(self.plan)
        if not right or peer not in self.plan[note.tick].awaits or not isinstance(note.content, Offer | None):
            raise PeerError(peer.short, "a note that does not belong to this round's pairs")
        key = (peer, note.fragment, note.tick)
        if key in self._met:
            if key in self._mine and not note.again:  # it repeats itself: mine was lost
                self._out.append(Tell(peer, replace(self._mine[key], again=True)))
        elif note.content is None:
            self._note_met(key)
        elif key not in self._asked and key not in self._early and self._may_meet(note.tick):
            self._asked.add(key)
            self._out.append(Get(peer, note))
        return self._step(now_s)

    def arrived(self, peer: PeerId, note: Note, now_s: float) -> list[Effect]:
        """The partner's vector is here. If this member's own offer of that tick was not made yet, the meeting waits."""
        key = (peer, note.fragment, note.tick)
        self._asked.discard(key)
        if key not in self._met and self._may_meet(note.tick):
            if note.tick > self.clock.tick:
                self._early[key] = note
            else:
                self._meet(key, note)
        return self._step(now_s)

    def missed(self, peer: PeerId, note: Note, now_s: float) -> list[Effect]:
        """It did not come, or cannot be read or believed."""
        self._asked.discard((peer, note.fragment, note.tick))
        return self._step(now_s)

    def tick(self, now_s: float) -> list[Effect]:
        """Time has passed; due at `wake_s`."""
        return self._step(now_s)

    def hurry(self, now_s: float) -> list[Effect]:
        """Others are in a later round already: go through what is left without waiting for anybody."""
        self.clock.hurried = True
        return self._step(now_s)

    def closed(self, now_s: float) -> list[Effect]:
        """The round is over here; partners who are not so far are still answered."""
        return self._take()

    @property
    def wake_s(self) -> float:
        """When `tick` is due next."""
        if self.stage is not Stage.WAITING:
            return math.inf
        return min(self.clock.wake_s(self.heard, self.started_s), self._said_s + self.patience.resend_s)

    def waits_for(self) -> tuple[PeerId, ...]:
        """For whom this member waits now."""
        return self.clock.waits_for() if self.stage is Stage.WAITING else ()

    def _may_meet(self, tick: int) -> bool:
        """Whether a tick is not over here."""
        return tick > self.clock.tick or (tick == self.clock.tick and self.stage is Stage.WAITING)

    def _meet(self, key: tuple[PeerId, int, int], note: Note) -> None:
        self._note_met(key)
        self._out.append(Meet(key[0], note))

    def _note_met(self, key: tuple[PeerId, int, int]) -> None:
        self._met.add(key)
        self.clock.brought.add((key[2], key[0], key[1]))

    def _step(self, now_s: float) -> list[Effect]:
        if self.stage is Stage.WAITING and self.clock.is_over(now_s, self.heard, self.started_s):
            self.stage = Stage.SPLITTING
        if self.stage is Stage.SPLITTING:
            following = self.clock.tick + 1
            if following == len(self.plan):
                self.stage = Stage.OVER
                self.clock.learn()
                self._out.append(Close())
            elif following > self._splitting:
                self._splitting = following
                self._out.append(Split(following))
        elif self.stage is Stage.WAITING and now_s >= self._said_s + self.patience.resend_s:
            self._said_s = now_s
            missing = self.clock.waits_for()
            self._out += [
                Tell(key[0], note)
                for key, note in self._mine.items()
                if key[2] == self.clock.tick and key[0] in missing
            ]
        return self._take()

    def _take(self) -> list[Effect]:
        out, self._out = self._out, []
        return out
