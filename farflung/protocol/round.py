"""One member's rounds as a machine without I/O: events and the time go in, effects come out, in the order in which
they must be carried out. A `Persist` must be durable before any effect after it is carried out.

    TRAINING ── Own ──> WAITING ── certificate ──> APPLYING ── state applied ──> the next round
    FOLLOWING: not a member of this round; hears, fetches and applies like everybody else
    DONE: the run has had its rounds; only answers those who are behind

Who has spoken is in `attendance.py`, how voters agree in `ballot.py`, when a round closes in `deadline.py`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from farflung.protocol.attendance import Attendance
from farflung.protocol.ballot import Ballot
from farflung.protocol.certificate import Certificate, check_certificate
from farflung.protocol.deadline import Pace
from farflung.protocol.effects import (
    Apply,
    Broadcast,
    CatchUp,
    Effect,
    Event,
    Fetch,
    Heal,
    Heard,
    Held,
    Leave,
    Note,
    Own,
    Persist,
    Refused,
    Send,
    Stage,
    Staged,
    Tick,
)
from farflung.protocol.errors import LocalError, PeerError
from farflung.protocol.genesis import Genesis
from farflung.protocol.identity import PeerId
from farflung.protocol.manifest import Manifest, check_manifest
from farflung.protocol.phase import ALLOWED, Phase, Self
from farflung.protocol.statements import Announcement, JoinRequest, LeaveNotice, Slot
from farflung.protocol.wire import Certified, Message, Promise, Proposal, Status, Vote

RECENT_TIPS = 8
"""A join request names one of this many latest manifests: old ones cannot be replayed, slow joiners are not refused."""


@dataclass(slots=True)
class RoundMachine:
    """The rounds of one member, from the certificate `tip` on.

    Call `begin` once, then `handle` for every event; `wake_s` says when the next `Tick` is due.
    """

    genesis: Genesis
    me: Self
    tip: Certificate
    phase: Phase = Phase.FOLLOWING
    attendance: Attendance = field(init=False)
    ballot: Ballot = field(init=False)
    staging: bytes | None = None
    """The manifest being applied on trial."""
    staged: tuple[bytes, bytes] | None = None
    """The manifest applied on trial last, and the state it gave."""
    asked: set[bytes] = field(default_factory=set)
    """Payloads whose fetch has been asked for."""
    certificate: Certificate | None = None
    leaving: bool = False
    view_ends_s: float = math.inf
    proposed_s: float | None = None
    resend_s: float = 0.0
    answered: set[PeerId] = field(default_factory=set)
    rounds_of: dict[PeerId, int] = field(default_factory=dict)
    """The latest round each member was heard to be in."""
    heard_s: dict[PeerId, float] = field(default_factory=dict)
    """When each member was last heard."""
    recent_tips: deque[bytes] = field(default_factory=lambda: deque(maxlen=RECENT_TIPS))
    pace: Pace = field(init=False)
    _out: list[Effect] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.pace = Pace.of(self.genesis.timing)
        self._open(0.0, {})

    # -- what others may ask ------------------------------------------------------------------------------------------

    @property
    def parent(self) -> Manifest:
        """The manifest this round starts from."""
        return self.tip.manifest

    @property
    def round_index(self) -> int:
        """The round this member is in."""
        return self.parent.round_index + 1

    @property
    def slot(self) -> Slot:
        """What statements of this round are bound to."""
        return self.attendance.slot

    @property
    def is_member(self) -> bool:
        """Whether this member is in this round."""
        return self.me.peer_id in self.parent.member_of

    @property
    def behind(self) -> tuple[PeerId, ...]:
        """Other members who have not been heard in this round yet."""
        others = [peer for peer in self.parent.member_of if peer != self.me.peer_id]
        return tuple(peer for peer in others if self.rounds_of.get(peer, 0) < self.round_index)

    @property
    def wants_steps(self) -> bool:
        """Whether local steps of this round are wanted."""
        return self.phase is Phase.TRAINING and self.parent.started

    @property
    def wake_s(self) -> float:
        """When the next Tick is due."""
        waits = self.certificate is None and self.attendance.closed_s is None and self.phase is not Phase.DONE
        closing_s = self.attendance.closing_s(math.inf, self.pace.speak.value_s) if waits else math.inf
        return min(self.resend_s, self.view_ends_s, closing_s)

    # -- events -------------------------------------------------------------------------------------------------------

    def begin(self, now_s: float, journal: Iterable[tuple[str, object]] = ()) -> list[Effect]:
        """Enter the round after `tip`. `journal`: what was persisted in this round before a restart, oldest first."""
        self._open(now_s, self.attendance.joins)
        self._restore(journal)
        self._out = []
        self._advance(now_s)
        return self._out

    def handle(self, event: Event, now_s: float) -> list[Effect]:
        """Advance by one event.

        Raises PeerError if a peer's statement may not be believed (it has changed nothing then), and LocalError if
        our own code broke the order of a round.
        """
        if not isinstance(event, ALLOWED[self.phase]):
            raise LocalError(f"{type(event).__name__} while {self.phase}")
        self._out = []
        match event:
            case Heard(message):
                self._hear(message, now_s)
            case Own(announcement):
                self._speak(announcement)
            case Held(digest):
                self.attendance.held.add(digest)
            case Refused(digest, why):
                self.attendance.refused[digest] = why
            case Staged(manifest_digest, state_digest):
                if self.staging == manifest_digest:
                    self.staging, self.staged = None, (manifest_digest, state_digest)
            case Leave():
                self.leaving, self.resend_s = True, now_s
            case Tick():
                pass
        self._advance(now_s)
        return self._out

    # -- hearing ------------------------------------------------------------------------------------------------------

    def _hear(self, message: Message, now_s: float) -> None:
        statement, sender = message.statement, message.sender
        if sender in self.parent.member_of:
            self.rounds_of[sender] = max(message.round_index, self.rounds_of.get(sender, 0))
            self.heard_s[sender] = now_s
        if isinstance(statement, Certified):
            self._hear_certificate(sender, statement.certificate)
            return
        if isinstance(statement, JoinRequest) and message.round_index <= self.round_index:
            self.attendance.hear_join(statement)
        if message.round_index > self.round_index:
            self._out.append(CatchUp(sender, message.round_index))
        elif message.round_index < self.round_index:
            self._answer(sender)
        elif message.parent != self.parent.digest:
            raise PeerError(sender.short, f"is on another chain in round {self.round_index}")
        else:
            self._hear_now(message, now_s)

    def _hear_now(self, message: Message, now_s: float) -> None:
        """A statement about this very round."""
        match message.statement:
            case Announcement() as item:
                self.attendance.hear_announcement(item)
                self._fetch([item])
            case Proposal(view, manifest):
                self._check(manifest)
                self.ballot.hear_proposal(message.sender, view, manifest)
                if view >= self.ballot.view and self.view_ends_s < math.inf:
                    # It deserves the time that fetching and applying it takes.
                    self.view_ends_s = max(self.view_ends_s, now_s + self.pace.view_s(view))
            case Promise() as promise:
                if promise.voted is not None:
                    self._check(promise.voted[1])
                self.ballot.hear_promise(message.sender, promise)
            case Vote() as vote:
                self.ballot.hear_vote(message.sender, vote)
            case LeaveNotice() as notice:
                self.attendance.hear_leave(notice)

    def _hear_certificate(self, sender: PeerId, certificate: Certificate) -> None:
        ahead = certificate.manifest.round_index - self.round_index
        if ahead > 0:
            self._out.append(CatchUp(sender, certificate.manifest.round_index))
        if ahead == 0 and self.certificate is None:
            check_certificate(certificate, self.parent, self.genesis, payload_bytes_max=self.me.payload_bytes_max)
            self._certified(certificate)

    def _answer(self, peer: PeerId) -> None:
        """Tell a peer that is behind how its round ended; once per resend, whatever it sends."""
        if peer not in self.answered:
            self.answered.add(peer)
            self._out.append(Send(peer, self.slot, Certified(self.tip)))

    def _check(self, manifest: Manifest) -> None:
        check_manifest(
            manifest,
            self.parent,
            self.genesis,
            payload_bytes_max=self.me.payload_bytes_max,
            recent_tips=self.recent_tips,
            secret=self.me.secret or None,
        )

    # -- advancing ----------------------------------------------------------------------------------------------------

    def _open(self, now_s: float, joins: dict[PeerId, JoinRequest]) -> None:
        if self.parent.digest not in self.recent_tips:
            self.recent_tips.append(self.parent.digest)
        self.attendance = Attendance(
            self.genesis,
            self.parent,
            self.me.payload_bytes_max,
            self.me.secret,
            self.recent_tips,
            started_s=now_s,
            joins=joins,
        )
        self.ballot = Ballot(self.parent, self.me.peer_id)
        self.asked, self.answered = set(), set()
        self.staging = self.staged = self.certificate = None
        self.view_ends_s, self.resend_s, self.proposed_s = math.inf, now_s, None
        over = 0 < self.genesis.rounds <= self.parent.trained
        self.phase = Phase.DONE if over else Phase.TRAINING if self.is_member else Phase.FOLLOWING

    def _restore(self, journal: Iterable[tuple[str, object]]) -> None:
        for kind, value in journal:
            if kind == "own" and isinstance(value, Announcement):
                self.attendance.restore(self.me.peer_id, value)
                self.phase = Phase.WAITING
            else:
                self.ballot.restore(kind, value, self.me.sign)

    def _advance(self, now_s: float) -> None:
        """Do whatever has become possible, in the one order that is safe."""
        if self.phase is Phase.DONE:
            if now_s >= self.resend_s:
                self.resend_s = now_s + self.genesis.timing.resend_ms / 1e3
                self.answered.clear()
                self._out.append(Broadcast(self.slot, Status(0)))
            return
        closes = self.certificate is None and self.attendance.watch(now_s, self.pace.speak.value_s)
        if closes and self.ballot.votes_here:  # nobody else moves to the next view: a timer would only ring for ever
            self.view_ends_s = now_s + self.pace.view_s(self.ballot.view)
        if self.proposed_s is None and self.ballot.proposals:
            self.proposed_s = now_s
        self._count_votes()
        if self.certificate is None:
            if self.ballot.votes_here:
                self._propose(now_s)
                self._time_out(now_s)
            self._support()
            self._count_votes()
        if self.certificate is not None and self._apply(self.certificate, now_s):
            return
        if now_s >= self.resend_s:
            self._resend(now_s)

    def _count_votes(self) -> None:
        if self.certificate is None and (found := self.ballot.certificate()) is not None:
            self._certified(found)

    def _certified(self, certificate: Certificate) -> None:
        self.certificate, self.phase, self.view_ends_s = certificate, Phase.APPLYING, math.inf

    def _propose(self, now_s: float) -> None:
        view = self.ballot.view
        mine = self.ballot.proposer(view) == self.me.peer_id
        if not mine or view in self.ballot.proposals or (view > 0 and not self.ballot.has_promises(view)):
            return
        manifest = self.ballot.bound_manifest(view)
        if manifest is None:
            if self.attendance.closed_s is None:
                return
            manifest = self._begun() or self.attendance.draft(self.me.peer_id)
        self.ballot.proposals[view] = manifest
        self.view_ends_s = now_s + self.pace.view_s(view)
        self._out += [Persist("proposal", Proposal(view, manifest)), Broadcast(self.slot, Proposal(view, manifest))]

    def _begun(self) -> Manifest | None:
        """An earlier view's proposal that I am applying: proposed again, nobody's work on it is lost."""
        proposals, done = self.ballot.proposals, self.staged[0] if self.staged is not None else None
        begun = [view for view in proposals if proposals[view].digest in (self.staging, done)]
        return proposals[max(begun)] if begun else None

    def _time_out(self, now_s: float) -> None:
        """Move to the next view when mine took too long, or to one in which somebody waits already."""
        view = self.ballot.view
        target = view + 1 if now_s >= self.view_ends_s else view
        # Whoever waits in a later view has closed the round by what it measured; deadlines differ, following is safe.
        target = max([target, *self.ballot.promises])
        if target > view:
            promise = self.ballot.enter_view(target)
            self.ballot.hear_promise(self.me.peer_id, promise)
            closed = self.attendance.closed_s is not None
            self.view_ends_s = now_s + self.pace.view_s(target) if closed else math.inf
            self._out += [Persist("promise", promise), Broadcast(self.slot, promise)]
            self._out.append(Note(f"view {target}: now {self.ballot.proposer(target).short} proposes"))
            self._propose(now_s)

    def _support(self) -> None:
        """Apply the latest proposal on trial, and vote for it if I may. Followers only apply: it saves time later."""
        ballot = self.ballot
        views = [view for view in ballot.proposals if ballot.may_vote(view) or not ballot.votes_here]
        if not views:
            self._foresee()
            return
        view = max(views)
        manifest = ballot.proposals[view]
        state_digest = self._trial(manifest)
        if state_digest is not None and ballot.votes_here:
            ballot.cast(view, manifest, state_digest)
            vote = ballot.signed_vote(self.me.sign)
            ballot.hear_vote(self.me.peer_id, vote)
            self._out += [Persist("vote", (view, manifest, state_digest)), Broadcast(self.slot, vote)]

    def _foresee(self) -> None:
        """Everybody has spoken, so what will be proposed is known: apply it on trial while the proposal travels."""
        if not self.ballot.proposals and self.ballot.view == 0 and self.attendance.spoken_s is not None:
            self._trial(self.attendance.draft(self.ballot.proposer(0)))

    def _trial(self, manifest: Manifest) -> bytes | None:
        """The state `manifest` gives, or None while what that takes is being fetched and computed."""
        if self.staged is not None and self.staged[0] == manifest.digest:
            return self.staged[1]
        missing = self.missing(manifest)
        self._fetch(missing)
        if not missing and self.staging != manifest.digest:
            # The room for the next state holds one trial: from now on the one before is gone.
            self.staging, self.staged = manifest.digest, None
            self._out.append(Stage(manifest))
        return None

    def _apply(self, certificate: Certificate, now_s: float) -> bool:
        state_digest = self._trial(certificate.manifest)
        if state_digest is None:
            return False
        if state_digest != certificate.state_digest:
            self.staged, self.staging = None, certificate.manifest.digest
            self._out.append(Heal(certificate))
            return False
        self._learn(now_s)
        effects = [*self._out, Apply(certificate)]
        self.tip = certificate
        self._out = effects + self.begin(now_s)
        return True

    def _learn(self, now_s: float) -> None:
        """Measure this round for the next ones' deadlines."""
        attendance = self.attendance
        if attendance.spoken_s is not None:
            self.pace.speak.observe(attendance.spoken_s - attendance.started_s)
        # From the first proposal over all views: it grows where applying takes longer than a view, and does not where
        # a proposer was silent.
        if attendance.closed_s is not None and self.proposed_s is not None:
            self.pace.certify.observe(now_s - max(attendance.closed_s, self.proposed_s))

    def _resend(self, now_s: float) -> None:
        """Say again what this round needs of me, for whoever missed it; this is also the heartbeat."""
        self.resend_s = now_s + self.genesis.timing.resend_ms / 1e3
        self.answered.clear()
        ballot, view = self.ballot, self.ballot.view
        if not self.is_member and self.me.wants_in and not self.leaving:
            self._out.append(Broadcast(self.slot, self._join_request()))
        if self.is_member and self.leaving:
            self._out.append(Broadcast(self.slot, self._leave_notice()))
        if (own := self.attendance.announcements.get(self.me.peer_id)) is not None:
            self._out.append(Broadcast(self.slot, own))
        if ballot.my_promise is not None:
            self._out.append(Broadcast(self.slot, ballot.my_promise))
        if ballot.votes_here and view in ballot.proposals and ballot.proposer(view) == self.me.peer_id:
            self._out.append(Broadcast(self.slot, Proposal(view, ballot.proposals[view])))
        if ballot.my_vote is not None:
            self._out.append(Broadcast(self.slot, ballot.signed_vote(self.me.sign)))
        self._out.append(Broadcast(self.slot, Status(view)))

    # -- small things -------------------------------------------------------------------------------------------------

    def _speak(self, announcement: Announcement) -> None:
        self.attendance.hear_announcement(announcement)
        if announcement.payload is not None:
            self.attendance.held.add(announcement.payload.digest)
        self.phase = Phase.WAITING
        self._out += [Persist("own", announcement), Broadcast(self.slot, announcement)]

    def _fetch(self, items: Iterable[Announcement]) -> None:
        for item in items:
            ref = item.payload
            if ref is not None and ref.digest not in self.asked | self.attendance.held | self.attendance.refused.keys():
                self.asked.add(ref.digest)
                self._out.append(Fetch(item))

    def missing(self, manifest: Manifest) -> list[Announcement]:
        """Payloads of a manifest that are not here."""
        held = self.attendance.held
        return [item for item in manifest.payloads if item.payload is not None and item.payload.digest not in held]

    def _join_request(self) -> JoinRequest:
        me = self.me
        return JoinRequest.make(self.genesis.run_id, me.public_key, self.parent.digest, me.secret, me.sign)

    def _leave_notice(self) -> LeaveNotice:
        notice = LeaveNotice.make(self.me.public_key, self.slot, self.me.sign)
        self.attendance.leaves[self.me.peer_id] = notice
        return notice
