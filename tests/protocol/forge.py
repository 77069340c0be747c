"""A founded run with n members, and statements in their names: what forgeries are made from."""

from __future__ import annotations

from dataclasses import replace

from protocol_world import SECRET, make_genesis, make_identity

from farflung.protocol import blob
from farflung.protocol.certificate import Certificate, certify_first, vote_bytes
from farflung.protocol.genesis import Genesis
from farflung.protocol.identity import Identity
from farflung.protocol.manifest import Manifest, build_manifest
from farflung.protocol.statements import Announcement, JoinRequest, LeaveNotice, Slot

STATE = b"\x07" * 32
PAYLOAD_BYTES_MAX = 1 << 16


class Run:
    """Members 0..n-1 of round 2; nobody has announced anything yet. `parent` is manifest 1."""

    def __init__(self, n: int = 3, **genesis_changes) -> None:
        self.identities = [make_identity(index) for index in range(n)]
        self.genesis: Genesis = make_genesis(self.identities[0], **genesis_changes)
        self.first = certify_first(self.genesis, self.identities[0].sign)
        joins = [self.join(identity, self.first.manifest.digest) for identity in self.identities[1:]]
        self.parent = self.build(self.first.manifest, joined=joins)
        self.slot = Slot(self.genesis.run_id, 2, self.parent.digest)

    def by_id(self) -> list[Identity]:
        return sorted(self.identities, key=lambda identity: identity.peer_id)

    def join(self, identity: Identity, tip: bytes, secret: bytes = SECRET) -> JoinRequest:
        return JoinRequest.make(self.genesis.run_id, identity.public_key, tip, secret, identity.sign)

    def leave(self, identity: Identity) -> LeaveNotice:
        return LeaveNotice.make(identity.public_key, self.slot, identity.sign)

    def announce(self, identity: Identity, data: bytes | None = None, **changes) -> Announcement:
        ref = None if data is None else blob.describe(data)[0]
        bare = Announcement(identity.public_key, ref, 5 if ref else 0, 50 if ref else 0)
        return replace(bare, **changes).signed(self.slot, identity.sign)

    def build(self, parent: Manifest, *, announcements=(), joined=(), left=(), proposer: Identity | None = None):
        who = (proposer or self.identities[0]).peer_id
        return build_manifest(self.genesis, parent, proposer=who, announcements=announcements, joined=joined, left=left)

    def manifest(self) -> Manifest:
        """A sound manifest of round 2: everybody but the last announced a payload, the last abstained."""
        *most, last = self.identities
        spoke = [self.announce(identity, b"payload %d" % at) for at, identity in enumerate(most)]
        return self.build(self.parent, announcements=[*spoke, self.announce(last)])

    def certify(self, manifest: Manifest, voters, view: int = 0, state: bytes = STATE) -> Certificate:
        text = vote_bytes(manifest.slot, view, manifest.digest, state)
        signatures = sorted((voter.peer_id, voter.sign(text)) for voter in voters)
        return Certificate(manifest, view, state, tuple(signatures))
