"""The chain of certificates: what each round aggregated, who is in the next one, and who signed for it.

    certificate 0 ── manifest 1 ── manifest 2 ── ...
    (founder, θ₀)    payloads,     payloads,       each names its parent *manifest*, never a set of signatures
                     next members  next members

A manifest is a proposal; `certificate.py` says what makes it final.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from farflung.protocol import limits
from farflung.protocol.canonical import decode_canonical, encode_canonical
from farflung.protocol.errors import PeerError
from farflung.protocol.genesis import Genesis
from farflung.protocol.identity import PeerId
from farflung.protocol.statements import (
    Announcement,
    JoinRequest,
    LeaveNotice,
    Slot,
    from_hex,
    natural,
)

NO_PARENT = bytes(32)


@dataclass(frozen=True, slots=True)
class Member:
    """A member as the chain sees it."""

    public_key: bytes
    since: int
    """The round from which it is a member: who has the smallest is the longest-standing."""
    absent: int
    """Rounds in a row without a payload or an abstention."""
    voter: bool

    @property
    def peer_id(self) -> PeerId:
        """Its id."""
        return PeerId.of(self.public_key)


@dataclass(frozen=True)
class Manifest:
    """What one round aggregates, and who is in the next. All lists are sorted by peer id."""

    run_id: bytes
    round_index: int
    parent: bytes
    proposer: PeerId | None
    announcements: tuple[Announcement, ...]
    """Signed: payloads to aggregate, and abstentions."""
    joined: tuple[JoinRequest, ...]
    left: tuple[LeaveNotice, ...]
    members: tuple[Member, ...]
    """Of the next round."""
    started: bool
    """Whether training has begun (genesis.start_members); once true it stays true."""
    trained: int = 0
    """Rounds with enough payloads up to and including this one: what schedules and the run's length count."""

    @property
    def slot(self) -> Slot:
        """What its statements are bound to."""
        return Slot(self.run_id, self.round_index, self.parent)

    @cached_property
    def payloads(self) -> tuple[Announcement, ...]:
        """The announcements that carry a payload, in member order."""
        return tuple(item for item in self.announcements if item.payload is not None)

    @cached_property
    def canonical_bytes(self) -> bytes:
        """One byte string per manifest."""
        return encode_canonical(
            {
                "announcements": [item.to_json() for item in self.announcements],
                "joined": [item.to_json() for item in self.joined],
                "left": [item.to_json() for item in self.left],
                "members": [[m.public_key.hex(), m.since, m.absent, m.voter] for m in self.members],
                "parent": self.parent.hex(),
                "proposer": str(self.proposer) if self.proposer else "",
                "round": self.round_index,
                "run": self.run_id.hex(),
                "started": self.started,
                "trained": self.trained,
            }
        )

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of the canonical bytes."""
        return hashlib.sha256(b"farflung manifest\0" + self.canonical_bytes).digest()

    @cached_property
    def member_of(self) -> dict[PeerId, Member]:
        """Members of the next round by id."""
        return {member.peer_id: member for member in self.members}

    @cached_property
    def voters(self) -> tuple[Member, ...]:
        """Who votes in the next round."""
        return tuple(member for member in self.members if member.voter)


def decode_manifest(data: bytes, *, peer: str = "?") -> Manifest:
    """A manifest from canonical bytes; well-formed, not yet checked against its parent. Raises PeerError."""
    value = decode_canonical(data, bytes_max=limits.CONTROL_BYTES_MAX, peer=peer)
    keys = {"announcements", "joined", "left", "members", "parent", "proposer", "round", "run", "started", "trained"}
    if not isinstance(value, dict) or value.keys() != keys or type(value["started"]) is not bool:
        raise PeerError(peer, "a malformed manifest")
    for key in ("announcements", "joined", "left", "members"):
        if not isinstance(value[key], list) or len(value[key]) > limits.MEMBERS_MAX:
            raise PeerError(peer, f"a manifest with too many {key}")
    manifest = Manifest(
        run_id=from_hex(value["run"], "a run id", 20),
        round_index=natural(value["round"], "a round"),
        parent=from_hex(value["parent"], "a parent", 32),
        proposer=PeerId.parse(str(value["proposer"])) if value["proposer"] else None,
        announcements=tuple(Announcement.from_json(item) for item in value["announcements"]),
        joined=tuple(JoinRequest.from_json(item) for item in value["joined"]),
        left=tuple(LeaveNotice.from_json(item) for item in value["left"]),
        members=tuple(_decode_member(item, peer) for item in value["members"]),
        started=value["started"],
        trained=natural(value["trained"], "trained rounds"),
    )
    if manifest.canonical_bytes != data:
        raise PeerError(peer, "a manifest that is not in canonical form")
    return manifest


def _decode_member(value: Any, peer: str) -> Member:
    if not isinstance(value, list) or len(value) != 4 or type(value[3]) is not bool:
        raise PeerError(peer, "a malformed member")
    return Member(
        from_hex(value[0], "a key", 32), natural(value[1], "a round"), natural(value[2], "absent rounds"), value[3]
    )


def first_manifest(genesis: Genesis) -> Manifest:
    """Manifest 0: the founder alone. Follows from genesis, so every member derives the same one."""
    founder = Member(genesis.founder, since=0, absent=0, voter=True)
    return Manifest(
        run_id=genesis.run_id,
        round_index=0,
        parent=NO_PARENT,
        proposer=None,
        announcements=(),
        joined=(),
        left=(),
        members=(founder,),
        started=genesis.start_members <= 1,
    )


def build_manifest(
    genesis: Genesis,
    parent: Manifest,
    *,
    proposer: PeerId,
    announcements: Iterable[Announcement],
    joined: Iterable[JoinRequest],
    left: Iterable[LeaveNotice],
) -> Manifest:
    """The next manifest. The next members follow from its other parts, so a proposer cannot choose them."""
    spoke = tuple(sorted(announcements, key=lambda item: item.peer_id))
    new = tuple(sorted(joined, key=lambda item: item.peer_id))
    gone = tuple(sorted(left, key=lambda item: item.peer_id))
    members = next_members(genesis, parent, [item.peer_id for item in spoke], new, [item.peer_id for item in gone])
    return Manifest(
        run_id=parent.run_id,
        round_index=parent.round_index + 1,
        parent=parent.digest,
        proposer=proposer,
        announcements=spoke,
        joined=new,
        left=gone,
        members=members,
        started=parent.started or len(members) >= genesis.start_members,
        trained=parent.trained + (sum(item.payload is not None for item in spoke) >= genesis.payloads_min),
    )


def next_members(
    genesis: Genesis,
    parent: Manifest,
    spoke: Collection[PeerId],
    joined: Sequence[JoinRequest],
    left: Collection[PeerId],
) -> tuple[Member, ...]:
    """Members of the next round: those who did not leave and were not silent for too long, and the new ones.

    In a round in which nobody spoke nobody was absent. A manifest never leaves the swarm without a voter: if all would
    go, the longest-standing one stays.
    """
    aged = []
    for member in parent.members:
        silent = bool(spoke) and member.peer_id not in spoke
        aged.append(Member(member.public_key, member.since, member.absent + 1 if silent else 0, member.voter))
    kept = [item for item in aged if item.peer_id not in left and item.absent < limits.ABSENT_ROUNDS_MAX]
    if not any(member.voter for member in kept):
        eldest = longest_standing(parent.voters)
        kept += [Member(item.public_key, item.since, 0, True) for item in aged if item.peer_id == eldest]
    known = {member.peer_id for member in kept}
    for request in joined:
        if request.peer_id not in known and len(kept) < limits.MEMBERS_MAX:
            voter = genesis.closed or bool(request.proof)
            kept.append(Member(request.public_key, parent.round_index + 2, 0, voter))
    return tuple(sorted(kept, key=lambda member: member.peer_id))


def check_manifest(
    manifest: Manifest,
    parent: Manifest,
    genesis: Genesis,
    *,
    payload_bytes_max: int,
    recent_tips: Collection[bytes],
    secret: bytes | None,
) -> None:
    """Raise PeerError unless `manifest` may follow `parent`.

    `secret` None means that this node cannot check proofs of admission (it is not a voter) and trusts the votes.
    Costs one signature check per statement.
    """
    who = manifest.proposer.short if manifest.proposer else "?"
    if (manifest.run_id, manifest.round_index, manifest.parent) != (
        parent.run_id,
        parent.round_index + 1,
        parent.digest,
    ):
        raise PeerError(who, f"manifest {manifest.round_index} does not follow {parent.round_index}")
    if manifest.proposer not in parent.member_of or not parent.member_of[manifest.proposer].voter:
        raise PeerError(who, "a manifest proposed by somebody who does not vote")
    slot = manifest.slot
    for items in (manifest.announcements, manifest.joined, manifest.left):
        ids = [item.peer_id for item in items]
        if ids != sorted(set(ids)):
            raise PeerError(who, "a manifest whose lists are not sorted or name somebody twice")
    for item in manifest.announcements:
        check_announcement(item, slot, parent, genesis, payload_bytes_max)
    if len(manifest.joined) > limits.JOINS_PER_ROUND_MAX:
        raise PeerError(who, f"{len(manifest.joined)} joins in one manifest")
    for request in manifest.joined:
        check_join(request, parent, genesis, recent_tips, secret)
    for notice in manifest.left:
        if notice.peer_id not in parent.member_of:
            raise PeerError(who, "somebody leaves who is not a member")
        notice.check(slot)
    expected = build_manifest(
        genesis,
        parent,
        proposer=manifest.proposer,
        announcements=manifest.announcements,
        joined=manifest.joined,
        left=manifest.left,
    )
    if expected.digest != manifest.digest:
        raise PeerError(who, "a manifest whose next members do not follow from it")


def check_announcement(
    item: Announcement, slot: Slot, parent: Manifest, genesis: Genesis, payload_bytes_max: int
) -> None:
    """Raise PeerError unless a member may say this in this round.

    A payload is of at least one step; where members mix it is an account, which whoever trained nothing has as well.
    """
    who = item.peer_id.short
    if item.peer_id not in parent.member_of:
        raise PeerError(who, "announces without being a member")
    if not parent.started:
        raise PeerError(who, "announces before training has started")
    if item.payload is not None and item.payload.size > payload_bytes_max:
        raise PeerError(who, f"announces {item.payload.size} bytes where {payload_bytes_max} are the most")
    empty = item.payload is not None and genesis.mode != "gather"
    if not empty and (item.payload is not None) != (item.steps > 0):
        raise PeerError(who, f"announces a payload of {item.steps} steps" if item.payload else "abstains with steps")
    item.check(slot)


def check_join(
    request: JoinRequest, parent: Manifest, genesis: Genesis, recent_tips: Collection[bytes], secret: bytes | None
) -> None:
    """Raise PeerError unless this request may be granted in the round after `parent`."""
    who = request.peer_id.short
    if request.peer_id in parent.member_of:
        raise PeerError(who, "asks to join but is a member")
    if request.tip not in recent_tips:
        raise PeerError(who, "asks to join with a tip that is too old or of another chain")
    if genesis.closed and not request.proof:
        raise PeerError(who, "asks to join a closed run without the join secret")
    if request.proof and secret is not None and not request.proves(genesis.run_id, secret):
        raise PeerError(who, "asks to join with a wrong join secret")
    request.check(genesis.run_id)


def longest_standing(voters: Sequence[Member]) -> PeerId | None:
    """The voter whose vote breaks a tie."""
    first = min(voters, key=lambda member: (member.since, member.peer_id), default=None)
    return first.peer_id if first else None


def is_quorum(voters: Sequence[Member], yes: Collection[PeerId]) -> bool:
    """More than half of the voters, or exactly half with the longest-standing one: any two quorums share a voter."""
    count = sum(1 for member in voters if member.peer_id in yes)
    return 2 * count > len(voters) or (len(voters) > 0 and 2 * count == len(voters) and longest_standing(voters) in yes)


def proposer_order(parent: Manifest) -> tuple[PeerId, ...]:
    """Who proposes in view 0, 1, 2, ...: voters by hash(run, round, id), those silent in the parent round last."""

    def key(member: Member) -> tuple[bool, bytes]:
        text = parent.run_id + (parent.round_index + 1).to_bytes(8, "big") + member.peer_id.digest
        return member.absent > 0, hashlib.sha256(b"farflung proposer\0" + text).digest()

    return tuple(member.peer_id for member in sorted(parent.voters, key=key))
