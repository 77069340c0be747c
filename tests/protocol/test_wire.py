"""Bytes from the network raise nothing but PeerError, whatever they are, and change nothing when they do."""

from __future__ import annotations

import random

import pytest
from forge import PAYLOAD_BYTES_MAX, STATE, Run
from protocol_world import SECRET

from farflung.protocol import limits
from farflung.protocol import messages_pb2 as pb
from farflung.protocol.canonical import decode_canonical, encode_canonical
from farflung.protocol.certificate import vote_bytes
from farflung.protocol.effects import Heard
from farflung.protocol.errors import LocalError, PeerError
from farflung.protocol.round import RoundMachine, Self
from farflung.protocol.statements import JoinRequest, Slot
from farflung.protocol.wire import (
    Certified,
    Message,
    Promise,
    Proposal,
    Status,
    Vote,
    decode_message,
    encode_message,
)

RUN = Run(3)
SPEAKER = RUN.identities[1]
MANIFEST = RUN.manifest()
CERTIFICATE = RUN.certify(MANIFEST, RUN.identities[:2])
VOTE = SPEAKER.sign(vote_bytes(RUN.slot, 0, MANIFEST.digest, STATE))
STATEMENTS = {
    "announcement": RUN.announce(SPEAKER, b"payload"),
    "abstention": RUN.announce(SPEAKER),
    "proposal": Proposal(0, MANIFEST),
    "vote": Vote(0, MANIFEST.digest, STATE, VOTE),
    "promise": Promise(1, None),
    "bound promise": Promise(2, (1, MANIFEST)),
    "join": JoinRequest.make(RUN.genesis.run_id, SPEAKER.public_key, RUN.parent.digest, SECRET, SPEAKER.sign),
    "leave": RUN.leave(SPEAKER),
    "status": Status(1, 5, 7),
    "certified": Certified(CERTIFICATE),
}


def sealed(statement) -> bytes:
    return encode_message(SPEAKER, RUN.slot.run_id, RUN.slot.round_index, RUN.slot.parent, statement)


def resealed(body: bytes) -> bytes:
    """What a member with a key can send: any body, rightly signed."""
    signature = SPEAKER.sign(b"farflung envelope\0" + body)
    return pb.Envelope(public_key=SPEAKER.public_key, body=body, signature=signature).SerializeToString()


def body_of(envelope: bytes) -> pb.Body:
    return pb.Body.FromString(pb.Envelope.FromString(envelope).body)


def mutated(data: bytes, generator: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(generator.randint(1, 4)):
        at = generator.randrange(len(out) + 1)
        match generator.randrange(5):
            case 0:
                out[at : at + 1] = bytes([generator.randrange(256)])
            case 1:
                out[at:at] = generator.randbytes(generator.randint(1, 8))
            case 2:
                del out[at : at + generator.randint(1, 8)]
            case 3:
                out[at : at + 1] = bytes([(out[at] if at < len(out) else 0) ^ 1 << generator.randrange(8)])
            case _:
                out[at:at] = out[max(0, at - generator.randint(1, 40)) : at]
    return bytes(out)


def machine_of_founder() -> RoundMachine:
    founder = RUN.identities[0]
    me = Self(founder.peer_id, founder.public_key, founder.sign, PAYLOAD_BYTES_MAX, SECRET)
    tip = RUN.certify(RUN.parent, [founder])
    machine = RoundMachine(RUN.genesis, me, tip)
    machine.begin(0.0)
    return machine


def believed(data: bytes, machine: RoundMachine) -> Message | None:
    """Through the door and into the machine: anything but PeerError fails the test."""
    try:
        message = decode_message(data, RUN.genesis.run_id)
    except PeerError:
        return None
    try:
        machine.handle(Heard(message), 1.0)
    except PeerError:
        return None
    return message


@pytest.mark.parametrize("kind", STATEMENTS)
def test_a_message_comes_back(kind):
    message = decode_message(sealed(STATEMENTS[kind]), RUN.genesis.run_id)
    assert message.statement == STATEMENTS[kind]
    assert (message.sender, message.round_index, message.parent) == (SPEAKER.peer_id, 2, RUN.slot.parent)


@pytest.mark.parametrize("kind", STATEMENTS)
def test_mutated_envelopes_are_refused_or_say_the_same(kind):
    generator, envelope = random.Random(kind), sealed(STATEMENTS[kind])
    machine = machine_of_founder()
    for _ in range(150):
        message = believed(mutated(envelope, generator), machine)
        assert message is None or message.statement == STATEMENTS[kind]


@pytest.mark.parametrize("kind", STATEMENTS)
def test_mutated_bodies_with_a_right_signature_raise_nothing_else(kind):
    generator, envelope = random.Random(kind), pb.Envelope.FromString(sealed(STATEMENTS[kind]))
    machine = machine_of_founder()
    for _ in range(250):
        believed(resealed(mutated(envelope.body, generator)), machine)
    assert machine.tip.manifest.digest == RUN.parent.digest


JUNK = [None, True, -1, 0, 1, 1 << 62, "", "x", "ab" * 32, "AB" * 32, "a b " * 16, [], [[]], [1, 2, 3], {}, {"key": 1}]


def with_junk(value, generator: random.Random):
    """The same value with one part, at any depth, replaced, dropped or doubled."""
    if isinstance(value, dict) and value and generator.random() < 0.85:
        key = generator.choice(sorted(value))
        if generator.random() < 0.1:
            return {name: item for name, item in value.items() if name != key}
        return {**value, key: with_junk(value[key], generator)}
    if isinstance(value, list) and value and generator.random() < 0.85:
        at = generator.randrange(len(value))
        if generator.random() < 0.2:
            return value[:at] + value[at : at + 1] * 2 + value[at + 1 :]
        return [*value[:at], with_junk(value[at], generator), *value[at + 1 :]]
    if isinstance(value, str) and value.startswith("{") and generator.random() < 0.9:
        inner = decode_canonical(value.encode(), bytes_max=1 << 20)
        return encode_canonical(with_junk(inner, generator)).decode()
    return generator.choice(JUNK)


def field_of(body: pb.Body) -> tuple[object, str] | None:
    """Where a message carries canonical text."""
    match body.WhichOneof("kind"):
        case "announce" | "join" | "leave" | "certified" as name:
            return body, name
        case "proposal":
            return body.proposal, "manifest"
        case "promise" if body.promise.voted:
            return body.promise, "voted_manifest"
    return None


@pytest.mark.parametrize("kind", ["announcement", "proposal", "bound promise", "join", "leave", "certified"])
def test_signed_nonsense_inside_the_text_raises_nothing_else(kind):
    generator, envelope = random.Random(kind), sealed(STATEMENTS[kind])
    machine = machine_of_founder()
    refused = 0
    for _ in range(250):
        body = body_of(envelope)
        holder, name = field_of(body)
        value = decode_canonical(getattr(holder, name), bytes_max=1 << 20)
        setattr(holder, name, encode_canonical(with_junk(value, generator)))
        refused += believed(resealed(body.SerializeToString()), machine) is None
    assert refused > 200
    assert machine.tip.manifest.digest == RUN.parent.digest


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda body: setattr(body, "run_id", bytes(20)), "another run"),
        (lambda body: setattr(body, "parent", b""), "where it stands"),
        (lambda body: setattr(body, "round", 1 << 63), "where it stands"),
        (lambda body: body.ClearField("status"), "unknown kind"),
        (lambda body: setattr(body.status, "view", 1 << 40), "view"),
    ],
)
def test_a_body_out_of_bounds_is_refused_with_a_reason(change, words):
    body = body_of(sealed(Status(0)))
    change(body)
    with pytest.raises(PeerError, match=words):
        decode_message(resealed(body.SerializeToString()), RUN.genesis.run_id)


def test_sizes_are_bounded_both_ways():
    with pytest.raises(PeerError, match="bytes"):
        decode_message(bytes(limits.CONTROL_BYTES_MAX + 1), RUN.genesis.run_id)
    body = body_of(sealed(STATEMENTS["join"]))
    body.join = b"[" * (limits.CONTROL_BYTES_MAX + 1)
    with pytest.raises(PeerError):
        decode_message(resealed(body.SerializeToString()), RUN.genesis.run_id)
    many = [RUN.announce(SPEAKER, b"x")] * 4000
    with pytest.raises(LocalError):
        sealed(Proposal(0, RUN.build(RUN.parent, announcements=many)))


@pytest.mark.parametrize("kind", ["announcement", "join", "leave"])
def test_nobody_speaks_in_another_name(kind):
    other = RUN.identities[2]
    envelope = encode_message(other, RUN.slot.run_id, 2, RUN.slot.parent, STATEMENTS[kind])
    with pytest.raises(PeerError, match="somebody else's name"):
        decode_message(envelope, RUN.genesis.run_id)


def test_a_statement_is_bound_to_its_round_and_chain():
    said = STATEMENTS["announcement"]
    said.check(RUN.slot)
    run_id, parent = RUN.slot.run_id, RUN.slot.parent
    for slot in (Slot(run_id, 3, parent), Slot(run_id, 2, bytes(32)), Slot(bytes(20), 2, parent)):
        with pytest.raises(PeerError):
            said.check(slot)
        with pytest.raises(PeerError):
            STATEMENTS["leave"].check(slot)
