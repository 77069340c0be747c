"""What members who mix say, as bytes: one byte string per value, and nothing but PeerError for any other."""

from __future__ import annotations

import random
from dataclasses import fields, replace
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mixing_masses import Setting, masses_in, push_world
from mixing_world import CALM, ROUND, STORM, blob_of, members_of
from protocol_world import make_genesis, make_identity
from test_wire import mutated, resealed, with_junk

from farflung.protocol import messages_pb2 as pb
from farflung.protocol.canonical import decode_canonical, encode_canonical
from farflung.protocol.errors import ConfigError, PeerError
from farflung.protocol.genesis import decode_genesis, run_id_of
from farflung.protocol.ledger.amounts import Amount
from farflung.protocol.ledger.books import Ledger, Terms
from farflung.protocol.ledger.messages import Fence, Parcel, Receipt
from farflung.protocol.mixing.account import ACCOUNT_BYTES_MAX, Account, Adrift, Book, Totals, decode_account
from farflung.protocol.mixing.notes import Absent, Note, Offer
from farflung.protocol.mixing.settings import FRAGMENTS_MAX, TICKS_MAX, Mixing
from farflung.protocol.wire import decode_message, encode_message

REF = blob_of("vector")
PARCEL = Parcel(ROUND, 0, 2, 3, ROUND, Amount(Fraction(3, 8), REF.digest))
NOTES = {
    "nothing": Note(0, 0, None),
    "absent": Note(0, 1, Absent()),
    "parcel": Note(7, 63, PARCEL, REF),
    "flow": Note(1, 2, PARCEL, REF, b"c" * 32),
    "fence": Note(0, 0, Fence(ROUND, 4, 2, ROUND)),
    "receipt": Note(0, 5, Receipt(ROUND, 1, 3, (5, 7), (1, 4))),
    "offer": Note(2, 3, Offer(0.1, 1.5), REF),
    "answer": Note(2, 3, Offer(1e300, -0.0), REF, again=True),
    "again nothing": Note(2, 3, None, again=True),
}
SPEAKER, RUN = make_identity(1), bytes(20)


def accounts() -> dict[str, Account]:
    """Small and large, with and without books."""
    world = push_world(4, STORM, Setting(n=4, graph="complete", ticks=3, fragments=2)).run()
    calm = push_world(4, CALM, Setting(n=3)).run()
    stormy = max(
        (member.account for member in masses_in(world) if member.account), key=lambda a: len(a.canonical_bytes)
    )
    me = members_of(3)[0]
    pairs = Account(me, 2, ROUND, (Book(None, Fraction(3, 2), Totals(0.1, -0.25, 4.0)),) * 8)
    return {
        "stormy": stormy,
        "calm": masses_in(calm)[0].account or pairs,
        "pairs": pairs,
        "none": Account(me, 3, why="was away"),
        "reference": Account(me, 0, reference=REF),
    }


ACCOUNTS = accounts()


@pytest.mark.parametrize("kind", NOTES)
def test_a_note_comes_back(kind):
    note = NOTES[kind]
    assert Note.from_json(note.to_json()) == note
    data = encode_message(SPEAKER, RUN, ROUND, bytes(32), note)
    message = decode_message(data, RUN)
    assert (message.statement, message.sender, message.round_index) == (note, SPEAKER.peer_id, ROUND)


@pytest.mark.parametrize("kind", NOTES)
def test_notes_are_one_byte_string_each(kind):
    """Whatever is read back is written as it was read."""
    generator, data = random.Random(kind), encode_canonical(NOTES[kind].to_json())
    read = 0
    for _ in range(400):
        value = with_junk(decode_canonical(data, bytes_max=1 << 20), generator)
        try:
            note = Note.from_json(value)
        except PeerError:
            continue
        assert encode_canonical(note.to_json()) == encode_canonical(value)
        read += 1
    assert read < 200


@pytest.mark.parametrize("kind", NOTES)
def test_mutated_bodies_with_a_right_signature_raise_nothing_else(kind):
    generator = random.Random(kind)
    envelope = pb.Envelope.FromString(encode_message(SPEAKER, RUN, ROUND, bytes(32), NOTES[kind]))
    for _ in range(200):
        try:
            decode_message(resealed(mutated(envelope.body, generator)), RUN)
        except PeerError:
            pass


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=7) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=200, deadline=None)
@given(JSON | st.tuples(st.integers(0, 7), st.integers(0, 63), JSON, JSON, JSON, st.booleans()).map(list))
def test_no_value_makes_a_note_raise_anything_else(value):
    try:
        Note.from_json(value)
    except PeerError:
        pass


@pytest.mark.parametrize(
    ("kind", "at", "value"),
    [
        ("parcel", 0, FRAGMENTS_MAX),
        ("parcel", 1, TICKS_MAX),
        ("parcel", 3, None),
        ("parcel", 3, [blob_of("another").digest.hex(), 64, 1 << 14]),
        ("parcel", 3, [REF.digest.hex(), 0, 1 << 14]),
        ("parcel", 5, True),
        ("receipt", 3, [REF.digest.hex(), 64, 1 << 14]),
        ("receipt", 4, "cc" * 32),
        ("nothing", 4, "cc" * 32),
        ("offer", 4, "cc" * 32),
        ("offer", 3, None),
        ("offer", 2, ["offer", "0x1p0", "0x1.0000000000000p+0"]),
        ("offer", 2, ["offer", "inf", "0x1.0000000000000p+0"]),
        ("offer", 2, ["offer", 1, 1]),
        ("absent", 5, True),
        ("absent", 2, ["absent", 1]),
        ("flow", 4, "CC" * 32),
        ("flow", 4, "cc"),
    ],
)
def test_what_no_honest_member_would_say_is_refused(kind, at, value):
    told = NOTES[kind].to_json()
    told[at] = value
    with pytest.raises(PeerError):
        Note.from_json(told)


# -- accounts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ACCOUNTS)
def test_an_account_comes_back(kind):
    account = ACCOUNTS[kind]
    again = decode_account(account.canonical_bytes, Terms())
    assert again == account
    assert again.canonical_bytes == account.canonical_bytes


@pytest.mark.parametrize("kind", ACCOUNTS)
def test_a_mutated_account_raises_nothing_else_and_is_canonical_if_it_is_read(kind):
    generator, data = random.Random(kind), ACCOUNTS[kind].canonical_bytes
    junk = encode_canonical(with_junk(decode_canonical(data, bytes_max=1 << 20), generator))
    for _ in range(300):
        value = with_junk(decode_canonical(data, bytes_max=1 << 20), generator)
        for junk in (mutated(data, generator), encode_canonical(value)):
            try:
                account = decode_account(junk, Terms())
            except PeerError:
                continue
            assert account.canonical_bytes == junk
    assert junk != data


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200) | JSON.map(lambda value: repr(value).encode()))
def test_no_bytes_make_an_account_raise_anything_else(data):
    with pytest.raises(PeerError):
        decode_account(data, Terms())


def bent(account: Account, **changes) -> bytes:
    return encode_canonical({**decode_canonical(account.canonical_bytes, bytes_max=1 << 20), **changes})


STORMY = ACCOUNTS["stormy"]


@pytest.mark.parametrize(
    "data",
    [
        replace(STORMY, round_index=ROUND + 1).canonical_bytes,
        replace(STORMY, member=members_of(9)[8]).canonical_bytes,
        replace(STORMY, round_index=0).canonical_bytes,
        replace(STORMY, books=(STORMY.books[0], replace(STORMY.books[1], ledger=None))).canonical_bytes,
        replace(STORMY, books=STORMY.books * 5).canonical_bytes,
        replace(STORMY, books=(replace(STORMY.books[0], weight=Fraction(-1)),)).canonical_bytes,
        replace(STORMY, books=(replace(STORMY.books[0], totals=Totals(0.0, 1e31, 1.0)),)).canonical_bytes,
        replace(STORMY, books=(replace(STORMY.books[0], totals=Totals(0.0, 0.0, -1.0)),)).canonical_bytes,
        replace(
            ACCOUNTS["calm"],
            books=(
                replace(
                    ACCOUNTS["calm"].books[0],
                    totals=replace(ACCOUNTS["calm"].books[0].totals, adrift=(Adrift(members_of(3)[1], 0, 1.0),)),
                ),
            ),
        ).canonical_bytes,
        replace(ACCOUNTS["none"], why="a\nb").canonical_bytes,
        replace(ACCOUNTS["none"], why="a" * 201).canonical_bytes,
        bent(ACCOUNTS["none"], why="\ud800"),
        bent(ACCOUNTS["none"], member=str(members_of(1)[0]).upper()),
        bent(ACCOUNTS["none"], behind=-1),
        bent(ACCOUNTS["none"], reference=[REF.digest.hex(), 1]),
        bent(ACCOUNTS["none"], more=1),
    ],
)
def test_an_account_that_cannot_be_is_refused(data):
    with pytest.raises(PeerError):
        decode_account(data, Terms())


def test_books_with_something_of_members_who_are_gone_are_refused():
    """Mass is of one round, and nobody is struck out within one."""
    ledger = Ledger(STORMY.member, Terms(), ROUND, Fraction(1), foreign=Fraction(1, 2))
    account = replace(STORMY, books=(Book(ledger, Fraction(3, 2), Totals(0.0, 0.0, 1.0)),))
    with pytest.raises(PeerError):
        decode_account(account.canonical_bytes, Terms())


def test_an_account_that_is_too_long_is_not_read(monkeypatch):
    def read(*args, **kwargs):
        raise AssertionError("it was parsed before its size was looked at")

    monkeypatch.setattr("farflung.protocol.canonical.json.loads", read)
    with pytest.raises(PeerError, match=str(ACCOUNT_BYTES_MAX)):
        decode_account(bytes(ACCOUNT_BYTES_MAX + 1), Terms())


# -- genesis ----------------------------------------------------------------------------------------------------------

GATHER = make_genesis(make_identity(0))
OTHER = {
    "graph": "ring",
    "ticks": 3,
    "fragments": 2,
    "reference_rounds": 5,
    "gamma_percent": 50,
    "late_percent": 0,
    "radius_percent": 200,
    "tick_ms": 119_000,
    "settle_ms": 1,
    "silence_ms": 2,
}


@pytest.mark.parametrize("mode", ["push-sum", "pairs"])
@pytest.mark.parametrize("changes", [{}, *({name: value} for name, value in OTHER.items())])
def test_a_genesis_that_mixes_comes_back(mode, changes):
    genesis = replace(GATHER, mode=mode, mixing=Mixing(**changes))
    assert decode_genesis(genesis.canonical_bytes, genesis.run_id) == genesis


def test_every_setting_of_a_mixing_is_in_the_run_id():
    assert OTHER.keys() == {item.name for item in fields(Mixing)}
    ids = {replace(GATHER, mode="push-sum", mixing=Mixing(**{name: value})).run_id for name, value in OTHER.items()}
    plain = replace(GATHER, mode="push-sum").run_id
    assert len(ids | {plain, GATHER.run_id, replace(GATHER, mode="pairs").run_id}) == len(OTHER) + 3


def test_gather_does_not_mix():
    with pytest.raises(ConfigError, match="mixing"):
        replace(GATHER, mixing=Mixing(ticks=3))
    assert b"mixing" not in GATHER.canonical_bytes
    value = decode_canonical(GATHER.canonical_bytes, bytes_max=1 << 20)
    for mixing in (Mixing().to_json(), Mixing(ticks=3).to_json(), {}):
        data = encode_canonical({**value, "mixing": mixing})
        with pytest.raises((PeerError, ConfigError)):
            decode_genesis(data, run_id_of(data))


def test_a_genesis_that_leaves_out_what_it_means_is_refused():
    """Or two run ids would name one run."""
    value = decode_canonical(replace(GATHER, mode="push-sum").canonical_bytes, bytes_max=1 << 20)
    small = {name: item for name, item in value["mixing"].items() if name != "ticks"}
    shorter = [{**value, "mixing": small}, {**value, "mixing": {}}]
    shorter += [{name: item for name, item in value.items() if name != gone} for gone in ("mixing", "trust", "rounds")]
    for bent_value in shorter:
        data = encode_canonical(bent_value)
        with pytest.raises(PeerError):
            decode_genesis(data, run_id_of(data))


@pytest.mark.parametrize(
    "mixing", [3, [], {"ticks": "3"}, {"ticks": True}, {"ticks": -1}, {"fragments": 9}, {"graph": ""}, {"new": 1}]
)
def test_nonsense_in_a_mixing_is_an_error_of_the_tree(mixing):
    value = decode_canonical(replace(GATHER, mode="push-sum").canonical_bytes, bytes_max=1 << 20)
    whole = {**value["mixing"], **mixing} if isinstance(mixing, dict) else mixing
    data = encode_canonical({**value, "mixing": whole})
    with pytest.raises((PeerError, ConfigError)):
        decode_genesis(data, run_id_of(data))
