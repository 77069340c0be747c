"""What makes a manifest final: enough votes for the same (view, manifest digest, state digest).

Votes of different views are never added up: with them a swarm could certify two manifests for one round (Lamport,
"Paxos Made Simple", §2.2: a value is chosen by a majority in *one* ballot).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from farflung.protocol import limits
from farflung.protocol.canonical import decode_canonical, encode_canonical
from farflung.protocol.errors import PeerError
from farflung.protocol.genesis import Genesis
from farflung.protocol.identity import PeerId, check_signature
from farflung.protocol.manifest import Manifest, check_manifest, decode_manifest, first_manifest, is_quorum
from farflung.protocol.statements import Sign, Slot, from_hex, natural


def vote_bytes(slot: Slot, view: int, manifest_digest: bytes, state_digest: bytes) -> bytes:
    """What a vote signs."""
    return b"farflung vote\0" + slot.bytes() + view.to_bytes(8, "big") + manifest_digest + state_digest


@dataclass(frozen=True)
class Certificate:
    """A manifest that a quorum of its parent's voters holds, has applied, and agrees on the result of."""

    manifest: Manifest
    view: int
    state_digest: bytes
    signatures: tuple[tuple[PeerId, bytes], ...]
    """Sorted by voter."""

    @cached_property
    def canonical_bytes(self) -> bytes:
        """One byte string per certificate."""
        return encode_canonical(
            {
                "manifest": self.manifest.canonical_bytes.decode("ascii"),
                "signatures": [[str(voter), signature.hex()] for voter, signature in self.signatures],
                "state": self.state_digest.hex(),
                "view": self.view,
            }
        )


def certify_first(genesis: Genesis, sign: Sign) -> Certificate:
    """Certificate 0, signed by the founder."""
    manifest = first_manifest(genesis)
    signature = sign(vote_bytes(manifest.slot, 0, manifest.digest, genesis.state_digest))
    return Certificate(manifest, 0, genesis.state_digest, ((PeerId.of(genesis.founder), signature),))


def decode_certificate(data: bytes, *, peer: str = "?") -> Certificate:
    """A certificate from canonical bytes; its votes are not yet checked. Raises PeerError."""
    value = decode_canonical(data, bytes_max=2 * limits.CONTROL_BYTES_MAX, peer=peer)
    if not isinstance(value, dict) or value.keys() != {"manifest", "signatures", "state", "view"}:
        raise PeerError(peer, "a malformed certificate")
    signatures = value["signatures"]
    if not isinstance(signatures, list) or len(signatures) > limits.MEMBERS_MAX:
        raise PeerError(peer, "a certificate with too many votes")
    if not all(isinstance(item, list) and len(item) == 2 for item in signatures):
        raise PeerError(peer, "a certificate with malformed votes")
    certificate = Certificate(
        manifest=decode_manifest(str(value["manifest"]).encode("ascii", "replace"), peer=peer),
        view=natural(value["view"], "a view"),
        state_digest=from_hex(value["state"], "a state digest", 32),
        signatures=tuple((PeerId.parse(str(who)), from_hex(text, "a signature", 64)) for who, text in signatures),
    )
    if certificate.canonical_bytes != data:
        raise PeerError(peer, "a certificate that is not in canonical form")
    return certificate


def check_certificate(
    certificate: Certificate, parent: Manifest | None, genesis: Genesis, *, payload_bytes_max: int
) -> None:
    """Raise PeerError unless a quorum of the parent's voters signed, and the manifest may follow its parent.

    `parent` None checks certificate 0 against genesis. Proofs of admission are the voters' to check.
    """
    manifest = certificate.manifest
    if parent is None:
        if manifest.digest != first_manifest(genesis).digest or certificate.state_digest != genesis.state_digest:
            raise PeerError("?", "a first certificate that does not follow from genesis")
        voters = manifest.voters
    else:
        tips = {request.tip for request in manifest.joined}
        check_manifest(manifest, parent, genesis, payload_bytes_max=payload_bytes_max, recent_tips=tips, secret=None)
        voters = parent.voters
    keys = {member.peer_id: member.public_key for member in voters}
    ids = [voter for voter, _ in certificate.signatures]
    if ids != sorted(set(ids)) or not set(ids) <= keys.keys():
        raise PeerError("?", "a certificate with votes of strangers, or out of order")
    text = vote_bytes(manifest.slot, certificate.view, manifest.digest, certificate.state_digest)
    for voter, signature in certificate.signatures:
        check_signature(keys[voter], signature, text, what="a vote in a certificate")
    if not is_quorum(voters, set(ids)):
        raise PeerError("?", f"a certificate with {len(ids)} of {len(voters)} votes")
