"""Bytes of one control message <-> what it says. Sizes are checked first; whatever is wrong is a PeerError."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from google.protobuf.message import DecodeError

from farflung.protocol import limits
from farflung.protocol import messages_pb2 as pb
from farflung.protocol.canonical import encode_canonical
from farflung.protocol.certificate import Certificate, decode_certificate
from farflung.protocol.errors import LocalError, PeerError
from farflung.protocol.identity import Identity, PeerId, check_signature
from farflung.protocol.manifest import Manifest, decode_manifest
from farflung.protocol.mixing.notes import Note
from farflung.protocol.statements import Announcement, JoinRequest, LeaveNotice, decode_statement

_TAG = b"farflung envelope\0"
_VIEW_MAX = 1 << 20
"""Views of one round. With doubling timeouts a thousand would already take longer than any run."""


@dataclass(frozen=True, slots=True)
class Proposal:
    """ "Let this be the round's manifest." """

    view: int
    manifest: Manifest


@dataclass(frozen=True, slots=True)
class Vote:
    """ "I hold every payload this manifest lists, and applying it gave me this state." """

    view: int
    manifest_digest: bytes
    state_digest: bytes
    signature: bytes


@dataclass(frozen=True, slots=True)
class Promise:
    """ "I will not vote in a view before this one; this was my last vote of the round (view, manifest), if any." """

    view: int
    voted: tuple[int, Manifest] | None


@dataclass(frozen=True, slots=True)
class Status:
    """A sign of life."""

    view: int
    upload_bytes_per_s: int = 0
    inner_step: int = 0


@dataclass(frozen=True, slots=True)
class Certified:
    """ "That round is over." """

    certificate: Certificate


Statement: TypeAlias = Announcement | Proposal | Vote | Promise | JoinRequest | LeaveNotice | Status | Certified | Note


@dataclass(frozen=True, slots=True)
class Message:
    """A statement, who made it, and where on the chain it stood when it did."""

    sender: PeerId
    public_key: bytes
    run_id: bytes
    round_index: int
    parent: bytes
    statement: Statement


def encode_message(identity: Identity, run_id: bytes, round_index: int, parent: bytes, statement: Statement) -> bytes:
    """A signed envelope. Raises LocalError if it is too large to be accepted by anybody."""
    body = pb.Body(run_id=run_id, round=round_index, parent=parent)
    match statement:
        case Announcement():
            body.announce = encode_canonical(statement.to_json())
        case Proposal(view, manifest):
            body.proposal.view, body.proposal.manifest = view, manifest.canonical_bytes
        case Vote(view, manifest_digest, state_digest, signature):
            body.vote.view, body.vote.signature = view, signature
            body.vote.manifest_digest, body.vote.state_digest = manifest_digest, state_digest
        case Promise(view, voted):
            body.promise.view, body.promise.voted = view, voted is not None
            if voted is not None:
                body.promise.voted_view, body.promise.voted_manifest = voted[0], voted[1].canonical_bytes
        case JoinRequest():
            body.join = encode_canonical(statement.to_json())
        case LeaveNotice():
            body.leave = encode_canonical(statement.to_json())
        case Status(view, upload_bytes_per_s, inner_step):
            body.status.view, body.status.inner_step = view, inner_step
            body.status.upload_bytes_per_s = upload_bytes_per_s
        case Certified(certificate):
            body.certified = certificate.canonical_bytes
        case Note():
            body.mixing = encode_canonical(statement.to_json())
    data = body.SerializeToString()
    envelope = pb.Envelope(public_key=identity.public_key, body=data, signature=identity.sign(_TAG + data))
    encoded = envelope.SerializeToString()
    if len(encoded) > limits.CONTROL_BYTES_MAX:
        raise LocalError(f"a control message of {len(encoded)} bytes")
    return encoded


def decode_message(data: bytes, run_id: bytes) -> Message:
    """The message in a signed envelope.

    Raises PeerError if it is too large, malformed, unsigned, of another run, or a statement in somebody else's name.
    """
    if len(data) > limits.CONTROL_BYTES_MAX:
        raise PeerError("?", f"a control message of {len(data)} bytes")
    try:
        envelope = pb.Envelope.FromString(data)
        check_signature(envelope.public_key, envelope.signature, _TAG + envelope.body, what="a message")
        who = PeerId.of(envelope.public_key).short
        body = pb.Body.FromString(envelope.body)
    except DecodeError as error:
        raise PeerError("?", f"not a message: {error}") from None
    if body.run_id != run_id:
        raise PeerError(who, "a message of another run")
    if len(body.parent) != 32 or body.round > limits.INTEGER_MAX:
        raise PeerError(who, "a message that does not say where it stands")
    try:
        statement = _decode_statement(body, who)
    except PeerError as error:
        raise PeerError(who, error.why) from None
    sender = PeerId.of(envelope.public_key)
    if isinstance(statement, (Announcement, JoinRequest, LeaveNotice)) and statement.peer_id != sender:
        raise PeerError(who, "a statement in somebody else's name")
    return Message(sender, envelope.public_key, run_id, body.round, body.parent, statement)


def _decode_statement(body: pb.Body, who: str) -> Statement:
    match body.WhichOneof("kind"):
        case "announce":
            return Announcement.from_json(decode_statement(body.announce, peer=who))
        case "proposal":
            return Proposal(_view(body.proposal.view, who), decode_manifest(body.proposal.manifest, peer=who))
        case "vote":
            vote = body.vote
            if (len(vote.manifest_digest), len(vote.state_digest), len(vote.signature)) != (32, 32, 64):
                raise PeerError(who, "a malformed vote")
            return Vote(_view(vote.view, who), vote.manifest_digest, vote.state_digest, vote.signature)
        case "promise":
            promise = body.promise
            voted = None
            if promise.voted:
                voted = (_view(promise.voted_view, who), decode_manifest(promise.voted_manifest, peer=who))
            return Promise(_view(promise.view, who), voted)
        case "join":
            return JoinRequest.from_json(decode_statement(body.join, peer=who))
        case "leave":
            return LeaveNotice.from_json(decode_statement(body.leave, peer=who))
        case "status":
            status = body.status
            return Status(
                _view(status.view, who),
                min(status.upload_bytes_per_s, limits.INTEGER_MAX),
                min(status.inner_step, limits.INTEGER_MAX),
            )
        case "certified":
            return Certified(decode_certificate(body.certified, peer=who))
        case "mixing":
            return Note.from_json(decode_statement(body.mixing, peer=who))
        case kind:
            raise PeerError(who, f"a message of an unknown kind {kind}")


def _view(view: int, who: str) -> int:
    if view > _VIEW_MAX:
        raise PeerError(who, f"view {view}")
    return view
