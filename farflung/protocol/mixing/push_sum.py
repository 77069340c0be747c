"""One member's push-sum round as a machine without I/O: notes and the time go in, effects come out in their order.

    begin -> Split(0) ── post ──> tick 0 ── everybody awaited, or late ──> Split(1) ── ... ──> settling ──> Over

After the last tick a member waits for word of what it sent; what nobody confirms in time is fenced, and comes home if
the receiver says in time that it never counted it. Then its books are closed: parcels that come later are void, and
their senders are told so. What is then still in limbo lapses with the round.

Nothing is kept on disk: mass is of one round. A member that restarts takes no further part in the mixing of the round
it was in: it answers its partners with `Absent`, and parcels and fences with receipts that void them. What it held is
gone with it, and its next account says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from fractions import Fraction
from typing import TypeAlias

from farflung.protocol.blob import BlobRef
from farflung.protocol.errors import LocalError, PeerError
from farflung.protocol.identity import PeerId
from farflung.protocol.ledger.amounts import Amount
from farflung.protocol.ledger.books import Ledger, Terms
from farflung.protocol.ledger.effects import Credit, Lapsed, LedgerEffect, Returned, Send, Settled
from farflung.protocol.ledger.effects import Refused as Unheard
from farflung.protocol.ledger.leases import Leases
from farflung.protocol.ledger.messages import Parcel, Receipt
from farflung.protocol.mixing.clockwork import Clockwork, Heard, Patience, TickPlan
from farflung.protocol.mixing.notes import Absent, Note, Offer

MISSES_MAX = 3
"""A tick does not wait for a vector that did not come so often, each time tried several times over."""


class Stage(StrEnum):
    """Where a member is in its mixing."""

    SPLITTING = "splitting"
    WAITING = "waiting"
    SETTLING = "settling"
    OVER = "over"


@dataclass(frozen=True, slots=True)
class Split:
    """Divide what is held now among the tick's receivers, then `post` the shares."""

    tick: int


@dataclass(frozen=True, slots=True)
class Tell:
    """Say this to a peer. Nothing breaks if it is lost, late or repeated."""

    peer: PeerId
    note: Note


@dataclass(frozen=True, slots=True)
class Get:
    """Fetch and decode the vector of this parcel, then say `arrived`, or `missed` if it does not come or decode.

    Keep the vector until its Move or the end of the round: a partner may be ticks ahead, and what it gives in a tick
    is counted into the member's mass only after the member's own shares of that tick have left.
    """

    peer: PeerId
    note: Note


@dataclass(frozen=True, slots=True)
class Move:
    """Mass of a fragment moves: counted here, settled there, back home, or lapsed (`ledger.effects`)."""

    fragment: int
    effect: Credit | Settled | Returned | Lapsed
    note: Note | None = None
    """Of a Credit: the parcel's note."""


@dataclass(frozen=True, slots=True)
class Close:
    """The books are as they will be in the account: take them, then call `closed`. Until then nothing is heard."""


Effect: TypeAlias = Split | Tell | Get | Move | Close


@dataclass(frozen=True, slots=True)
class Posted:
    """A share that is on offer: its exact weight, and where its vector is."""

    mass: Fraction
    payload: BlobRef
    copy_hash: bytes = b""


@dataclass(slots=True)
class PushSumMachine:
    """`opened`: this member's mass by fragment. `heard`: when peers were heard last. Raises what `Ledger` raises."""

    me: PeerId
    round_index: int
    plan: tuple[TickPlan, ...]
    opened: tuple[Fraction, ...]
    terms: Terms
    patience: Patience
    heard: Heard
    started_s: float
    stage: Stage = Stage.SPLITTING
    clock: Clockwork = field(init=False)
    ledgers: tuple[Ledger, ...] = field(init=False)
    _leases: tuple[Leases, ...] = field(init=False)
    _asked: dict[tuple[PeerId, int, int], Note] = field(default_factory=dict)
    """Parcels whose vector is being fetched: (peer, fragment, seq) -> note."""
    _ticks: dict[tuple[PeerId, int, int], tuple[int, Posted]] = field(default_factory=dict)
    """What was said of each unresolved parcel of mine: tick and posting, to say it again."""
    _early: list[Move] = field(default_factory=list)
    """Credits of ticks whose own shares have not left yet: no part of these, or the mean would not be exact."""
    _begun_s: list[float] = field(default_factory=list)
    """When each tick's shares left."""
    _took: list[int] = field(default_factory=list)
    """Ticks of parcels that were resolved in the present step."""
    _misses: dict[tuple[PeerId, int, int], int] = field(default_factory=dict)
    """How often each parcel's vector did not come."""
    _splitting: int = -1
    """The tick whose split was asked for last."""
    _said_s: float = -math.inf
    _settle_s: float = math.inf
    _out: list[Effect] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.clock = Clockwork(self.plan, len(self.opened), self.patience)
        partners = sorted({peer for tick in self.plan for peer in (*tick.sends, *tick.awaits)})
        self.ledgers = tuple(Ledger(self.me, self.terms, self.round_index - 1, Fraction(0)) for _ in self.opened)
        for ledger, mass in zip(self.ledgers, self.opened, strict=True):
            ledger.open_round(self.round_index, mass, admit=dict.fromkeys(partners, self.round_index))
        lease_s = max(self.patience.resend_s, self.patience.tick.value_s)
        self._leases = tuple(Leases(self.patience.resend_s, lease_s) for _ in self.opened)

    # -- events -------------------------------------------------------------------------------------------------------

    def begin(self, now_s: float) -> list[Effect]:
        """The round begins: with the first split, or with nothing to do at all."""
        return self._step(now_s)

    def post(self, tick: int, shares: Mapping[tuple[PeerId, int], Posted | None], now_s: float) -> list[Effect]:
        """The tick's shares by (peer, fragment); None: nothing for this one. Raises LocalError out of turn."""
        wanted = {(peer, part) for peer in self.plan[tick].sends for part in range(len(self.opened))}
        if self.stage is not Stage.SPLITTING or tick != self.clock.tick + 1 or shares.keys() != wanted:
            raise LocalError(f"shares of tick {tick} while {self.stage} after tick {self.clock.tick}")
        self.stage = Stage.WAITING
        self.clock.begin(tick, now_s)
        self._begun_s.append(now_s)
        self._said_s = now_s
        for peer, part in sorted(shares):
            share = shares[peer, part]
            if share is None:
                self._out.append(Tell(peer, Note(part, tick, None)))
                continue
            ledger = self.ledgers[part]
            self._ticks[peer, part, ledger.out[peer].next_seq] = tick, share
            self._carry_out(part, ledger.send(peer, Amount(share.mass, share.payload.digest)))
        self._out += [move for move in self._early if move.note is not None and move.note.tick <= tick]
        self._early = [move for move in self._early if move.note is not None and move.note.tick > tick]
        return self._step(now_s)

    def room(self, peer: PeerId, fragment: int) -> int:
        """How many parcels may be sent to a peer now: none to who takes no part."""
        return 0 if peer in self.clock.absent else self.ledgers[fragment].room(peer)

    def hear(self, peer: PeerId, note: Note, now_s: float) -> list[Effect]:
        """A partner's note. Raises PeerError, having changed nothing, if an honest member would not have sent it."""
        if note.fragment >= len(self.opened) or note.tick >= len(self.plan) or isinstance(note.content, Offer):
            raise PeerError(peer.short, "a note that does not belong to this run's mixing")
        content, ledger = note.content, self.ledgers[note.fragment]
        if self._is_sealed:
            return []
        if content is None:
            if peer in self.plan[note.tick].awaits:
                self.clock.brought.add((note.tick, peer, note.fragment))
        elif isinstance(content, Absent):
            self.clock.absent.add(peer)
        elif isinstance(content, Parcel) and _would_count(ledger, peer, content):
            if peer not in self.plan[note.tick].awaits:
                raise PeerError(peer.short, f"gives something in tick {note.tick}, which is not its turn")
            key = (peer, note.fragment, content.seq)
            if key not in self._asked and not self._must_wait(peer, note.fragment):
                self._asked[key] = note
                self._out.append(Get(peer, note))
        else:
            effects = ledger.hear(peer, content)
            self._carry_out(note.fragment, effects, note)
            if isinstance(content, Receipt) and not effects:
                self._answer(peer, note)
        return self._step(now_s)

    def arrived(self, peer: PeerId, note: Note, now_s: float) -> list[Effect]:
        """The vector of a parcel is here and sound: it counts, unless it was fenced meanwhile or the books are closed.

        Its Move may come with a later event (see `Get`).
        """
        assert isinstance(note.content, Parcel)
        self._asked.pop((peer, note.fragment, note.content.seq), None)
        if self._is_sealed:
            return []
        self.clock.brought.add((note.tick, peer, note.fragment))
        try:
            self._carry_out(note.fragment, self.ledgers[note.fragment].hear(peer, note.content), note)
        except PeerError:  # of an epoch that was fenced while the vector was on its way: its mass is at home
            pass
        return self._step(now_s)

    def missed(self, peer: PeerId, note: Note, now_s: float) -> list[Effect]:
        """The vector of a parcel did not come, or cannot be read. It is asked for again when its sender repeats itself;
        until then it counts for nothing."""
        assert isinstance(note.content, Parcel)
        key = (peer, note.fragment, note.content.seq)
        self._asked.pop(key, None)
        self._misses[key] = self._misses.get(key, 0) + 1
        if (
            self._misses[key] >= MISSES_MAX
        ):  # its sender is there, its vector is not: it may come, but is not waited for
            self.clock.brought.add((note.tick, peer, note.fragment))
        return self._step(now_s)

    def tick(self, now_s: float) -> list[Effect]:
        """Time has passed; due at `wake_s`."""
        return self._step(now_s)

    def hurry(self, now_s: float) -> list[Effect]:
        """Others are in a later round already: go through what is left without waiting for anybody."""
        self.clock.hurried, self._settle_s = True, now_s
        return self._step(now_s)

    def closed(self, now_s: float) -> list[Effect]:
        """The books were taken for the account: from now on nothing counts, and whoever asks is told so."""
        if self.stage is not Stage.OVER:
            raise LocalError(f"books taken while {self.stage}")
        if self._is_sealed:  # what was taken stays as it is: the machine goes on with copies
            self.ledgers = tuple(replace(item, out=dict(item.out), into=dict(item.into)) for item in self.ledgers)
            for part, ledger in enumerate(self.ledgers):
                self._carry_out(part, ledger.open_round(self.round_index + 1, Fraction(0)))
        return self._take()

    # -- what others may ask ------------------------------------------------------------------------------------------

    @property
    def wake_s(self) -> float:
        """When `tick` is due next."""
        if self.stage is Stage.OVER or self.stage is Stage.SPLITTING:
            return math.inf
        leases_s = min(leases.wake_s for leases in self._leases)
        if self.stage is Stage.SETTLING:
            silent_s = self.clock.silent_s(self.waits_for(), self.heard, self.started_s)
            return min(self._settle_s, silent_s, leases_s)
        ask_s = self._said_s + self.patience.resend_s
        return min(self.clock.wake_s(self.heard, self.started_s), leases_s, ask_s)

    @property
    def unresolved(self) -> Fraction:
        """Mass that left and is not known to have been counted, over all fragments."""
        return sum((ledger.unresolved for ledger in self.ledgers), Fraction(0))

    def waits_for(self) -> tuple[PeerId, ...]:
        """For whom this member waits now."""
        if self.stage is Stage.WAITING:
            return self.clock.waits_for()
        if self.stage is Stage.SETTLING:
            owing = {peer for ledger in self.ledgers for peer, edge in ledger.out.items() if edge.escrow}
            return tuple(sorted(owing - self.clock.absent))
        return ()

    # -- advancing ----------------------------------------------------------------------------------------------------

    def _step(self, now_s: float) -> list[Effect]:
        while self._took:
            self.clock.note(now_s - self._begun_s[self._took.pop()])
        if self.stage is Stage.WAITING and self.clock.is_over(now_s, self.heard, self.started_s):
            self.stage = Stage.SPLITTING
        if self.stage is Stage.SPLITTING:
            self._next_tick(now_s)
        if self.stage in (Stage.WAITING, Stage.SETTLING):
            self._remind(now_s)
        if self.stage is Stage.SETTLING and self._is_settled(now_s):
            self.stage = Stage.OVER
            self.clock.learn()
            self._out.append(Close())
        return self._take()

    def _next_tick(self, now_s: float) -> None:
        following = self.clock.tick + 1
        if following < len(self.plan):
            if following > self._splitting:
                self._splitting = following
                self._out.append(Split(following))
            return
        self.stage = Stage.SETTLING
        # What is under way may still arrive in its own time; after that it is asked back.
        longest_s = self.patience.tick.value_s + self.patience.settle_s
        self._settle_s = now_s if self.clock.hurried else now_s + longest_s

    def _is_settled(self, now_s: float) -> bool:
        return now_s >= min(self._settle_s, self.clock.silent_s(self.waits_for(), self.heard, self.started_s))

    def _remind(self, now_s: float) -> None:
        for part, (ledger, leases) in enumerate(zip(self.ledgers, self._leases, strict=True)):
            self._carry_out(part, leases.tick(ledger, now_s))
        if self.stage is Stage.WAITING and now_s >= self._said_s + self.patience.resend_s:
            self._said_s = now_s
            self._ask(self.clock.tick)

    def _ask(self, tick: int) -> None:
        """Whoever is waited for is told what is known of its edge: if that is no news, it says "nothing" again."""
        fetched = {(peer, part, note.tick) for (peer, part, _), note in self._asked.items()}
        for peer in self.clock.waits_for():
            for part, ledger in enumerate(self.ledgers):
                if (tick, peer, part) not in self.clock.brought and (peer, part, tick) not in fetched:
                    self._out.append(Tell(peer, Note(part, tick, ledger.into[peer].receipt)))

    def _answer(self, peer: PeerId, note: Note) -> None:
        """A receipt without news: its sender may wait for what was lost, or came home, or never was. Tell it so."""
        posted = note.tick <= self.clock.tick and peer in self.plan[note.tick].sends
        under_way = {(to, part, tick) for (to, part, _), (tick, _) in self._ticks.items()}
        if posted and (peer, note.fragment, note.tick) not in under_way:
            self._out.append(Tell(peer, Note(note.fragment, note.tick, None)))

    # -- small things -------------------------------------------------------------------------------------------------

    def _must_wait(self, peer: PeerId, part: int) -> bool:
        """With one parcel at a time, a change is to the edge's copy as the last one leaves it: that must move first.

        The sender repeats itself.
        """
        one_by_one = self.terms.window == 1
        return one_by_one and any(move.fragment == part and move.effect.peer == peer for move in self._early)

    @property
    def _is_sealed(self) -> bool:
        """Whether the books are being taken for the account."""
        return self.stage is Stage.OVER and self.ledgers[0].round_index == self.round_index

    def _carry_out(self, part: int, effects: list[LedgerEffect], note: Note | None = None) -> None:
        for effect in effects:
            match effect:
                case Send(peer, message):
                    tick, share = 0 if note is None else note.tick, None
                    if isinstance(message, Parcel):
                        tick, share = self._ticks[peer, part, message.seq]
                    ref, copy_hash = (share.payload, share.copy_hash) if share is not None else (None, b"")
                    self._out.append(Tell(peer, Note(part, tick, message, ref, copy_hash)))
                case Credit():
                    early = note is not None and note.tick > self.clock.tick
                    (self._early if early else self._out).append(Move(part, effect, note))
                case Settled(peer, seq) | Returned(peer, seq) | Lapsed(peer, seq):
                    tick, _ = self._ticks.pop((peer, part, seq))
                    if not isinstance(effect, Lapsed):
                        self._took.append(tick)
                    self._out.append(Move(part, effect))
                case Unheard(peer, why):
                    raise PeerError(peer.short, why)
                case _:
                    pass  # Persist: mass is of one round, nothing of it is kept on disk

    def _take(self) -> list[Effect]:
        out, self._out = self._out, []
        return out


def _would_count(ledger: Ledger, peer: PeerId, parcel: Parcel) -> bool:
    """Whether a parcel's vector is needed. Raises PeerError as `Ledger.hear` would: a vector that cannot count is never
    fetched."""
    trial = replace(ledger, into=dict(ledger.into))
    return any(isinstance(effect, Credit) for effect in trial.hear(peer, parcel))
