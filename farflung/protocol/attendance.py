"""Who has spoken in one round, what of it is here, and who wants in or out: what a manifest is drafted from."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field

from farflung.protocol import limits
from farflung.protocol.deadline import closing_time
from farflung.protocol.errors import PeerError
from farflung.protocol.genesis import Genesis
from farflung.protocol.identity import PeerId
from farflung.protocol.manifest import Manifest, build_manifest, check_announcement, check_join
from farflung.protocol.statements import Announcement, JoinRequest, LeaveNotice, Slot


@dataclass(slots=True)
class Attendance:
    """One member's view of one round. Times are when something was first seen here; None: not yet."""

    genesis: Genesis
    parent: Manifest
    payload_bytes_max: int
    secret: bytes
    recent_tips: Collection[bytes]
    started_s: float
    joins: dict[PeerId, JoinRequest]
    announcements: dict[PeerId, Announcement] = field(default_factory=dict)
    leaves: dict[PeerId, LeaveNotice] = field(default_factory=dict)
    held: set[bytes] = field(default_factory=set)
    refused: dict[bytes, str] = field(default_factory=dict)
    quorum_since_s: float | None = None
    spoken_s: float | None = None
    closed_s: float | None = None

    def __post_init__(self) -> None:
        self.joins = {peer: join for peer, join in self.joins.items() if self.may_join(join)}

    @property
    def slot(self) -> Slot:
        """What statements of this round are bound to."""
        return Slot(self.parent.run_id, self.parent.round_index + 1, self.parent.digest)

    @property
    def listable(self) -> list[Announcement]:
        """Announced payloads that are here and sound."""
        return [item for item in self.announcements.values() if item.payload and item.payload.digest in self.held]

    @property
    def waiting_for(self) -> tuple[PeerId, ...]:
        """Members who neither abstained nor left, and whose payload is not here yet."""
        return tuple(peer for peer in self.parent.member_of if not self._resolved(peer))

    def hear_announcement(self, item: Announcement) -> None:
        """Raises PeerError if it is not allowed, or a second one that differs from the first."""
        check_announcement(item, self.slot, self.parent, self.genesis, self.payload_bytes_max)
        if self.announcements.setdefault(item.peer_id, item) != item:
            raise PeerError(item.peer_id.short, f"equivocation: two payloads in round {self.slot.round_index}")

    def restore(self, me: PeerId, own: Announcement) -> None:
        """My own announcement, persisted before a restart: its payload is on disk."""
        self.announcements[me] = own
        if own.payload is not None:
            self.held.add(own.payload.digest)

    def hear_join(self, request: JoinRequest) -> None:
        """Raises PeerError if it may not be granted. A member's request is an echo and is dropped."""
        if request.peer_id in self.parent.member_of or self.joins.get(request.peer_id) == request:
            return
        if len(self.joins) >= limits.JOINS_PER_ROUND_MAX and request.peer_id not in self.joins:
            raise PeerError(request.peer_id.short, "asks to join while too many others wait")
        check_join(request, self.parent, self.genesis, self.recent_tips, self.secret or None)
        self.joins[request.peer_id] = request

    def hear_leave(self, notice: LeaveNotice) -> None:
        """Raises PeerError if it is not a member's, or wrongly signed."""
        if notice.peer_id not in self.parent.member_of:
            raise PeerError(notice.peer_id.short, "leaves without being a member")
        notice.check(self.slot)
        self.leaves[notice.peer_id] = notice

    def watch(self, now_s: float, deadline_s: float) -> bool:
        """Note what has become true by now. Returns whether the round may close since just now."""
        need = -(-len(self.parent.members) * self.genesis.quorum_percent // 100)
        need = max(need, self.genesis.payloads_min)
        if self.quorum_since_s is None and len(self.listable) >= need:
            self.quorum_since_s = now_s
        if self.spoken_s is None and self.parent.started and not self.waiting_for:
            self.spoken_s = now_s
        if self.closed_s is None and now_s >= self.closing_s(now_s, deadline_s):
            self.closed_s = now_s
            return True
        return False

    def closing_s(self, now_s: float, deadline_s: float) -> float:
        """When this round may close. Before training starts: as soon as anybody is to be admitted or released."""
        changes = len(self.joins) + len(self.leaves)
        if not self.parent.started:
            return now_s if changes else math.inf
        return closing_time(
            now_s=now_s,
            waiting_for=self.waiting_for,
            payloads_held=len(self.listable),
            membership_changes=changes,
            quorum_since_s=self.quorum_since_s,
            grace_s=self.genesis.timing.grace_ms / 1e3,
            deadline_s=self.started_s + deadline_s,
            payloads_min=self.genesis.payloads_min,
        )

    def draft(self, proposer: PeerId) -> Manifest:
        """The manifest that closes the round as seen from here."""
        abstained = [item for item in self.announcements.values() if item.payload is None]
        return build_manifest(
            self.genesis,
            self.parent,
            proposer=proposer,
            announcements=[*abstained, *self.listable],
            joined=self.joins.values(),
            left=self.leaves.values(),
        )

    def may_join(self, request: JoinRequest) -> bool:
        """Whether a request heard earlier can still be granted in this round."""
        return request.peer_id not in self.parent.member_of and request.tip in self.recent_tips

    def _resolved(self, peer: PeerId) -> bool:
        item = self.announcements.get(peer)
        if item is None:
            return peer in self.leaves
        return item.payload is None or item.payload.digest in self.held or item.payload.digest in self.refused
