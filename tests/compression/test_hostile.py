"""Whatever the bytes, only PeerError comes out; and what passes has one spelling."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from farflung.compression import codec_presets, parse_codec
from farflung.protocol.errors import PeerError
from farflung.protocol.limits import PAYLOAD_ABS_MAX
from farflung.protocol.rows import WINDOW_ALIGN
from farflung.protocol.schema import Schema, TensorSpec

SPECS = [spec for spec in codec_presets() if not spec.startswith("ef")] + ["q2(block=16)", "topk(3/16)|q2"]


def flat(d):
    return Schema((TensorSpec("w", (d,), "float32"),))


def outcome(codec, payload, schema):
    """The decoded row as bytes, or None if refused; check and decode must agree, and nothing else may be raised."""
    try:
        codec.check(payload, schema, None, 0)
        passed = True
    except PeerError:
        passed = False
    ends = [*range(WINDOW_ALIGN, schema.numel, WINDOW_ALIGN), schema.numel]
    row, decoded = b"", True
    for start, stop in zip([0, *ends[:-1]], ends, strict=True):
        try:
            window = codec.decode(payload, schema, None, 0, start, stop)
        except PeerError:
            decoded = False
            continue
        assert window[-1].isfinite().all()
        assert window[-1].abs().max() <= PAYLOAD_ABS_MAX
        row += b"".join(part.numpy().tobytes() for part in window if isinstance(part, torch.Tensor))
    assert passed == decoded
    return row if passed else None


@pytest.mark.parametrize("spec", SPECS)
def test_a_changed_byte_is_refused_or_changes_the_row(spec):
    codec, generator, rng = parse_codec(spec), torch.Generator().manual_seed(1), random.Random(spec)
    passed = 0
    for trial in range(200):
        d = rng.choice([1, 7, 530, 4097, WINDOW_ALIGN + 50])
        schema = flat(d)
        payload, _ = codec.encode(torch.randn(d, generator=generator), None, None, 0)
        changed = bytearray(payload)
        for _ in range(rng.choice([1, 1, 2, 20])):
            at = rng.randrange(len(changed)) if trial % 2 else rng.randrange(min(6, len(changed)))
            changed[at] = rng.choice([0, 255, 128, 127, changed[at] ^ 1 << rng.randrange(8)])
        row = outcome(codec, bytes(changed), schema)
        passed += row is not None
        if row is not None and bytes(changed) != payload:
            assert row != outcome(codec, payload, schema)
    assert passed < 200


@pytest.mark.parametrize("spec", SPECS)
def test_random_bytes_of_the_right_length_raise_nothing_but_peer_error(spec):
    codec, rng = parse_codec(spec), random.Random(spec)
    for d in (1, 3, 100, 4099, WINDOW_ALIGN + 1):
        length = round(codec.bits(flat(d)) * d / 8)
        for _ in range(20):
            outcome(codec, rng.randbytes(length), flat(d))
        for octet in (0, 1, 127, 128, 255):
            outcome(codec, bytes([octet]) * length, flat(d))


@pytest.mark.parametrize("spec", SPECS)
def test_any_other_length_is_refused_before_anything_is_read(spec):
    codec, schema = parse_codec(spec), flat(5000)
    payload, _ = codec.encode(torch.ones(5000), None, None, 0)
    for wrong in (b"", payload[:-1], payload + b"\0", payload * 2):
        with pytest.raises(PeerError, match=f"got {len(wrong)}$"):
            codec.check(wrong, schema, None, 0)
        with pytest.raises(PeerError, match=f"got {len(wrong)}$"):
            codec.decode(wrong, schema, None, 0, 0, 5000)


@pytest.mark.parametrize("spec", SPECS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_bytes_made_by_hypothesis_raise_nothing_but_peer_error(spec, data):
    codec = parse_codec(spec)
    d = data.draw(st.sampled_from([1, 4, 5, 17, 40]))
    length = round(codec.bits(flat(d)) * d / 8)
    outcome(codec, data.draw(st.binary(min_size=length, max_size=length) | st.binary(max_size=300)), flat(d))


@settings(max_examples=60, deadline=None)
@given(
    numbers=st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=70),
    spec=st.sampled_from(SPECS),
)
def test_what_we_encode_of_any_numbers_passes_and_decodes(numbers, spec):
    codec, schema = parse_codec(spec), flat(len(numbers))
    payload, _ = codec.encode(torch.tensor(numbers, dtype=torch.float32), None, None, 0)
    assert outcome(codec, payload, schema) is not None
