"""One value, one byte string."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from farflung.protocol import limits
from farflung.protocol.canonical import decode_canonical, encode_canonical
from farflung.protocol.errors import LocalError, PeerError

LEAVES = st.none() | st.booleans() | st.integers(-limits.INTEGER_MAX, limits.INTEGER_MAX) | st.text(max_size=12)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)


def decode(data: bytes):
    return decode_canonical(data, bytes_max=1 << 20)


@settings(deadline=None, max_examples=100)
@given(VALUES)
def test_a_value_comes_back_and_has_one_byte_string(value):
    data = encode_canonical(value)
    assert decode(data) == value
    assert encode_canonical(decode(data)) == data
    assert data.isascii()


@settings(deadline=None, max_examples=120)
@given(VALUES, st.randoms(use_true_random=False))
def test_other_spellings_of_the_same_value_are_refused(value, random):
    data = encode_canonical(value)
    loose = json.dumps(value, ensure_ascii=random.random() < 0.5, indent=random.choice([None, 0, 1])).encode()
    if loose != data:
        with pytest.raises(PeerError):
            decode(loose)


@settings(deadline=None, max_examples=120)
@given(VALUES, st.integers(0, 1 << 16), st.binary(max_size=3))
def test_whatever_is_accepted_is_canonical(value, at, junk):
    data = encode_canonical(value)
    at %= len(data) + 1
    for bent in (data[:at] + junk + data[at:], data[:at] + junk + data[at + len(junk) :], data[:at], data + junk):
        try:
            assert encode_canonical(decode(bent)) == bent
        except PeerError:
            pass


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b" 1",
        b"1 ",
        b"-0",
        b"01",
        b"1.0",
        b"1e3",
        b"NaN",
        b"Infinity",
        b"[1,]",
        b"[1, 2]",
        b'{"b":1,"a":2}',
        b'{"a":1,"a":1}',
        b"\xef\xbb\xbf1",
        "é".join('""').encode(),
        '"é"'.encode(),
        b'"\\/"',
        b'"\\u00E9"',
        b"\xff\xfe1\x00",
        b"1\x00",
        b"true ",
        b"9223372036854775808",
        b"-9223372036854775808",
        b"1" * 5000,
        b"[" * 40 + b"]" * 40,
        b"[" * 100_000,
    ],
)
def test_what_is_not_canonical_is_a_peer_error(data):
    with pytest.raises(PeerError):
        decode(data)


def test_a_size_is_compared_before_anything_is_parsed():
    with pytest.raises(PeerError, match="11 bytes of text where 10 are allowed"):
        decode_canonical(b"[1,2,3,4,5]", bytes_max=10)


@pytest.mark.parametrize("value", [1.5, b"bytes", {1: 2}, {"a": {2}}, 1 << 63, float("nan"), object()])
def test_what_has_no_canonical_form_is_our_own_error(value):
    with pytest.raises(LocalError):
        encode_canonical(value)
