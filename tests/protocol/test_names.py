"""Invites, identities and records: what is damaged, forged or too large is refused."""

from __future__ import annotations

import random
import string
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from protocol_world import make_identity

from farflung.protocol import limits
from farflung.protocol.canonical import decode_canonical, encode_canonical
from farflung.protocol.errors import ConfigError, PeerError
from farflung.protocol.identity import Identity, PeerId, check_signature
from farflung.protocol.invite import PREFIX, Invite, parse_invite
from farflung.protocol.record import PeerRecord, decode_record

RUN = bytes(range(20))
ALPHABET = string.ascii_letters + string.digits + "-_"


@settings(deadline=None, max_examples=100)
@given(st.binary(min_size=20, max_size=20), st.lists(st.text(max_size=40), max_size=4), st.binary(max_size=32))
def test_an_invite_comes_back(run_id, addresses, secret):
    invite = Invite(run_id, tuple(addresses), ("/ip4/1.2.3.4/tcp/5",), secret)
    text = str(invite)
    assert parse_invite(f"  {text}\n") == invite
    assert set(text) <= set(ALPHABET)


def test_damage_to_any_character_of_an_invite_is_noticed():
    text = str(Invite(RUN, ("abc@example.org:1234",), (), b"sixteen bytes ok"))
    generator = random.Random(1)
    for at in range(len(text)):
        others = [letter for letter in ALPHABET if letter != text[at]]
        for bent in (text[:at] + generator.choice(others) + text[at + 1 :], text[:at] + text[at + 1 :], text[:at]):
            try:
                parsed = parse_invite(bent)
            except ConfigError:
                continue
            raise AssertionError(f"character {at}: {parsed}")


@pytest.mark.parametrize(
    "text", ["", "hello", PREFIX, PREFIX + "A" * 5000, PREFIX + "A" * 40, PREFIX + "é", "http://" + PREFIX, "\0"]
)
def test_what_is_not_an_invite_is_said_in_words(text):
    with pytest.raises(ConfigError, match="invite"):
        parse_invite(text)


def test_an_invite_that_inflates_without_end_is_refused():
    import base64
    import zlib

    bomb = base64.urlsafe_b64encode(bytes(4) + zlib.compress(bytes(1 << 20))).decode().rstrip("=")
    with pytest.raises(ConfigError):
        parse_invite(PREFIX + bomb)


# -- identity ---------------------------------------------------------------------------------------------------------


def test_a_peer_id_is_the_hash_of_the_key_and_prints_both_ways():
    one, other = make_identity(1), make_identity(2)
    assert one.peer_id == PeerId.of(one.public_key) != other.peer_id
    assert PeerId.parse(str(one.peer_id)) == one.peer_id
    assert Identity(one.seed()).public_key == one.public_key
    ids = [make_identity(at).peer_id for at in range(20)]
    assert sorted(ids) == sorted(ids, key=lambda peer: peer.digest)


@pytest.mark.parametrize("text", ["", "abc", "a" * 31, "1" * 32, "é" * 32, "a" * 64, "\0" * 32])
def test_what_is_no_peer_id_is_a_peer_error(text):
    with pytest.raises(PeerError):
        PeerId.parse(text)


@settings(deadline=None, max_examples=60)
@given(st.binary(max_size=60), st.integers(0, 10**6))
def test_a_signature_is_right_for_one_key_and_one_text(text, at):
    one, other = make_identity(1), make_identity(2)
    signature = one.sign(text)
    assert one.sign(text) == signature
    check_signature(one.public_key, signature, text, what="it")
    bent = bytearray(signature)
    bent[at % 64] ^= 1 << at % 8
    for key, mark, data in (
        (other.public_key, signature, text),
        (one.public_key, bytes(bent), text),
        (one.public_key, signature, text + b"x"),
        (one.public_key, signature[:-1], text),
        (b"", b"", text),
        (bytes(31), signature, text),
        (one.public_key, bytes(64), text),
        (b"\xff" * 32, signature, text),
    ):
        with pytest.raises(PeerError):
            check_signature(key, mark, data, what="it")


# -- records ----------------------------------------------------------------------------------------------------------


def record_of(identity: Identity, **changes) -> PeerRecord:
    base = PeerRecord(RUN, identity.public_key, ("host:1", "[::1]:2"), b"der", 1000, 500, "nick", "0.1.0", 77)
    return replace(base, **changes).signed(identity)


def test_a_record_comes_back_and_lives_as_long_as_its_lease():
    record = record_of(make_identity(1))
    assert decode_record(record.encode(), run_id=RUN) == record
    assert record.alive(1499)
    assert not record.alive(1500)


@pytest.mark.parametrize(
    "changes",
    [
        {"addresses": ("h:1",) * (limits.ADDRESSES_MAX + 1)},
        {"addresses": ("",)},
        {"addresses": ("x" * 257,)},
        {"addresses": ("host:1\x1b[2J",)},
        {"name": "n" * (limits.NAME_CHARS_MAX + 1)},
        {"name": "\x1b[31mred"},
        {"name": "\ud800"},
        {"version": "v" * (limits.NAME_CHARS_MAX + 1)},
        {"version": "1\n2"},
        {"issued_ms": -1},
        {"lease_ms": True},
        {"certificate_der": b"x" * limits.RECORD_BYTES_MAX},
    ],
)
def test_a_signed_record_out_of_bounds_is_refused(changes):
    with pytest.raises(PeerError):
        decode_record(record_of(make_identity(1), **changes).encode(), run_id=RUN)


def test_any_change_of_a_record_is_refused():
    record = record_of(make_identity(1))
    data = record.encode()
    value = decode_canonical(data, bytes_max=1 << 20)
    for key in value:
        for junk in (None, 5, "ab", [], {}, [1], "é", 10**18, value[key][:-1] if isinstance(value[key], str) else -1):
            bent = encode_canonical({**value, key: junk})
            if bent != data:
                with pytest.raises(PeerError):
                    decode_record(bent)
    spaced = encode_canonical({**value, "key": value["key"].upper()})
    for other in (spaced, encode_canonical({**value, "more": 1}), data[:-1], b"[]", b"7"):
        with pytest.raises(PeerError):
            decode_record(other)
    with pytest.raises(PeerError, match="another run"):
        decode_record(data, run_id=bytes(20))
