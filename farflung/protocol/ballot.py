"""Agreement on one round's manifest: views, promises and votes (single-decree Paxos, one ballot number per view).

View 0 belongs to the round's first proposer and needs no promises: nothing can have been voted for before it. A later
view's proposer first hears promises of a quorum and, if any of them voted, proposes again what the latest vote was for.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from farflung.protocol.certificate import Certificate, vote_bytes
from farflung.protocol.errors import LocalError, PeerError
from farflung.protocol.identity import PeerId, check_signature
from farflung.protocol.manifest import Manifest, is_quorum, proposer_order
from farflung.protocol.statements import Sign, Slot
from farflung.protocol.wire import Promise, Proposal, Vote

VIEWS_AHEAD_MAX = 64
"""Votes and promises for views further ahead than this are not kept: views advance one timeout at a time."""


@dataclass(slots=True)
class Ballot:
    """One voter's or follower's book of one round. Pure bookkeeping: no clock, nothing is sent from here."""

    parent: Manifest
    me: PeerId
    view: int = 0
    """I do not vote in views before this one."""
    my_vote: tuple[int, Manifest, bytes] | None = None
    """My latest vote: view, manifest, state digest."""
    my_promise: Promise | None = None
    """My latest promise, repeated until the round is over."""
    proposals: dict[int, Manifest] = field(default_factory=dict)
    """The first proposal heard from each view's rightful proposer."""
    promises: dict[int, dict[PeerId, tuple[int, Manifest] | None]] = field(default_factory=dict)
    votes: dict[tuple[int, bytes, bytes], dict[PeerId, bytes]] = field(default_factory=dict)
    order: tuple[PeerId, ...] = ()

    def __post_init__(self) -> None:
        self.order = proposer_order(self.parent)

    def proposer(self, view: int) -> PeerId:
        """Who may propose in a view."""
        return self.order[view % len(self.order)]

    @property
    def votes_here(self) -> bool:
        """Whether this member is a voter of the round."""
        return self.me in self.order

    def hear_proposal(self, sender: PeerId, view: int, manifest: Manifest) -> None:
        """Keep a proposal. Raises PeerError if it is not the sender's turn, or it proposed something else before."""
        self._check_view(sender, view)
        if sender != self.proposer(view):
            raise PeerError(sender.short, f"proposes in view {view}, which is {self.proposer(view).short}'s")
        known = self.proposals.setdefault(view, manifest)
        if known.digest != manifest.digest:
            raise PeerError(sender.short, f"equivocation: two different manifests in view {view}")

    def hear_promise(self, sender: PeerId, promise: Promise) -> None:
        """Keep a promise; a repeated one may only add a vote cast before it was made. Raises PeerError."""
        self._check_view(sender, promise.view)
        if sender not in self.order:
            raise PeerError(sender.short, "promises without being a voter")
        if promise.voted is not None and promise.voted[0] >= promise.view:
            raise PeerError(sender.short, "promises a view it has voted in")
        self.promises.setdefault(promise.view, {}).setdefault(sender, promise.voted)

    def hear_vote(self, sender: PeerId, vote: Vote) -> None:
        """Keep a vote. Raises PeerError if it is a stranger's, wrongly signed, or a second one in its view."""
        self._check_view(sender, vote.view)
        keys = {member.peer_id: member.public_key for member in self.parent.voters}
        if sender not in keys:
            raise PeerError(sender.short, "votes without being a voter")
        key = (vote.view, vote.manifest_digest, vote.state_digest)
        if sender in self.votes.get(key, {}):
            return
        if any(sender in cast for (view, _, _), cast in self.votes.items() if view == vote.view):
            raise PeerError(sender.short, f"equivocation: two different votes in view {vote.view}")
        text = vote_bytes(self._slot(), vote.view, vote.manifest_digest, vote.state_digest)
        check_signature(keys[sender], vote.signature, text, what="a vote")
        self.votes.setdefault(key, {})[sender] = vote.signature

    def has_promises(self, view: int) -> bool:
        """Whether a quorum promised this view."""
        return is_quorum(self.parent.voters, self.promises.get(view, {}).keys())

    def bound_manifest(self, view: int) -> Manifest | None:
        """What a proposer of `view` must propose again: what the latest vote among its promises was for."""
        cast = [voted for voted in self.promises.get(view, {}).values() if voted is not None]
        return max(cast, key=lambda item: item[0])[1] if cast else None

    def enter_view(self, view: int) -> Promise:
        """Promise `view`: no vote of mine will be in an earlier one."""
        if view <= self.view:
            raise LocalError(f"view {view} is not after view {self.view}")
        self.view = view
        voted = None if self.my_vote is None else (self.my_vote[0], self.my_vote[1])
        self.my_promise = Promise(view, voted)
        return self.my_promise

    def may_vote(self, view: int) -> bool:
        """Whether a vote in `view` keeps my promises."""
        return self.votes_here and view >= self.view and (self.my_vote is None or self.my_vote[0] < view)

    def cast(self, view: int, manifest: Manifest, state_digest: bytes) -> None:
        """Enter my own vote."""
        if not self.may_vote(view):
            raise LocalError(f"a vote in view {view} after a promise of view {self.view}")
        self.view, self.my_vote = view, (view, manifest, state_digest)

    def signed_vote(self, sign: Sign) -> Vote:
        """My latest vote, as it is sent: the same bytes every time. Raises LocalError if I have cast none."""
        if self.my_vote is None:
            raise LocalError("there is no vote to sign")
        view, manifest, state_digest = self.my_vote
        signature = sign(vote_bytes(self._slot(), view, manifest.digest, state_digest))
        return Vote(view, manifest.digest, state_digest, signature)

    def restore(self, kind: str, value: object, sign: Sign) -> None:
        """Take back one statement of mine that was persisted before a restart; oldest first."""
        match kind, value:
            case "promise", Promise():
                self.view, self.my_promise = value.view, value
                self.hear_promise(self.me, value)
            case "proposal", Proposal():
                self.proposals[value.view] = value.manifest
            case "vote", (int(view), Manifest() as manifest, bytes(state_digest)):
                self.proposals.setdefault(view, manifest)
                self.cast(view, manifest, state_digest)
                self.hear_vote(self.me, self.signed_vote(sign))
            case _:
                raise LocalError(f"a journal entry of kind {kind!r}")

    def certificate(self) -> Certificate | None:
        """The certificate, once a quorum voted alike and the manifest they voted for is known here."""
        manifests = {item.digest: item for item in self.proposals.values()}
        if self.my_vote is not None:
            manifests[self.my_vote[1].digest] = self.my_vote[1]
        for (view, manifest_digest, state_digest), cast in sorted(self.votes.items(), key=lambda item: item[0]):
            if manifest_digest in manifests and is_quorum(self.parent.voters, cast.keys()):
                return Certificate(manifests[manifest_digest], view, state_digest, tuple(sorted(cast.items())))
        return None

    def _slot(self) -> Slot:
        return Slot(self.parent.run_id, self.parent.round_index + 1, self.parent.digest)

    def _check_view(self, sender: PeerId, view: int) -> None:
        if view > self.view + VIEWS_AHEAD_MAX:
            raise PeerError(sender.short, f"view {view} while here is view {self.view}")
