"""Whatever the bytes, only PeerError comes out, soon and within the schema's memory; and what passes has one spelling.

`make test` throws 100,000 mutated payloads at the decoders, `make soak` 10,000,000.
"""

import random
import time
import tracemalloc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from farflung.compression import codec_presets, parse_codec
from farflung.compression.guards import has_stage
from farflung.protocol.errors import PeerError
from farflung.protocol.limits import PAYLOAD_ABS_MAX
from farflung.protocol.rows import WINDOW_ALIGN, DenseRow
from farflung.protocol.schema import Schema, TensorSpec

MORE = ("q2(block=16)", "topk(3/16)|q2")
SPECS = tuple({parse_codec(spec).spec: spec for spec in (*codec_presets(), *MORE)}.values())
ROUNDING = ("mix", "adapt", "ef21", "dct", "lowrank", "rotate", "sketch")
"""Behind these two canonical payloads may round to one row (docs/compression.md)."""

CASES, SOAK_CASES = 100_000, 10_000_000
SECONDS_MAX = 5.0
"""For one small payload, on a busy machine; an honest one takes a millisecond."""


def flat(d):
    return Schema((TensorSpec("w", (d,), "float32"),))


SCHEMAS = (
    flat(1),
    flat(7),
    flat(530),
    flat(4097),
    Schema((TensorSpec("bias", (5,), "float32"), TensorSpec("embed", (64, 64), "float32"))),
    Schema(tuple(TensorSpec(f"layer{i}.norm", (i + 3, 17), "float32") for i in range(4))),
)


def windows(d):
    ends = [*range(WINDOW_ALIGN, d, WINDOW_ALIGN), d]
    return list(zip([0, *ends[:-1]], ends, strict=True))


def outcome(codec, payload, schema, shared, round_index=0):
    """The decoded row as bytes, or None if refused; check and reading must agree, and nothing else may be raised."""
    try:
        codec.check(payload, schema, shared, round_index)
        passed = True
    except PeerError:
        passed = False
    try:
        read = codec.open(payload, schema, shared, round_index)
    except PeerError:
        assert not passed
        return None
    row, decoded = b"", True
    for start, stop in windows(schema.numel):
        try:
            window = read(start, stop)
        except PeerError:
            decoded = False
            continue
        values = window.value_d if isinstance(window, DenseRow) else window.value_k
        assert values.isfinite().all()
        assert not len(values) or values.abs().max() <= PAYLOAD_ABS_MAX
        row += b"".join(part.numpy().tobytes() for part in window if isinstance(part, torch.Tensor))
    assert passed == decoded
    return row if passed else None


class Target:
    """A codec with honest payloads to start from, a few per schema."""

    def __init__(self, spec):
        self.codec, self.honest = parse_codec(spec), []
        for number, schema in enumerate(SCHEMAS):
            private, shared = self.codec.init(schema)
            for round_index in range(2):
                generator = torch.Generator().manual_seed(10 * number + round_index)
                update_d = torch.randn(schema.numel, generator=generator)
                payload, private = self.codec.encode(update_d, private, shared, round_index)
                self.honest.append((payload, schema, shared, round_index))


def mutate(payload, rng):
    """Another byte string, near an honest one or far from it."""
    changed = bytearray(payload)
    kind = rng.randrange(10)
    if not changed or kind == 0:
        return rng.randbytes(rng.choice([0, 1, len(payload), len(payload) + 1, 300]))
    for _ in range(rng.choice([1, 1, 2, 20])):
        at = rng.randrange(len(changed)) if kind % 2 else rng.randrange(min(12, len(changed)))
        changed[at] = rng.choice([0, 255, 128, 127, changed[at] ^ 1 << rng.randrange(8)])
    if kind == 2:
        del changed[rng.randrange(len(changed)) :]
    elif kind == 4:
        changed += rng.randbytes(rng.choice([1, 2, 4, 100]))
    elif kind == 6:
        first, second = sorted(rng.randrange(len(changed)) for _ in range(2))
        changed[first:second] = bytes([rng.choice([0, 1, 127, 128, 255])]) * (second - first)
    elif kind == 8:
        at, length = rng.randrange(len(changed)), rng.randrange(1, 9)
        changed[at : at + length] = changed[:length]
    return bytes(changed)


@pytest.mark.parametrize("spec", SPECS)
def test_mutated_payloads_are_refused_or_change_the_row(spec):
    assert fuzz(spec, CASES // len(SPECS), seed=0) > 0


@pytest.mark.soak
@pytest.mark.parametrize("spec", SPECS)
def test_mutated_payloads_are_refused_or_change_the_row_for_long(spec):
    assert fuzz(spec, SOAK_CASES // len(SPECS), seed=1) > 0


def fuzz(spec, cases, *, seed):
    """How many of so many mutated payloads were refused; the others must have changed the row."""
    target, rng = Target(spec), random.Random(f"{spec} {seed}")
    rows = [outcome(target.codec, *item) for item in target.honest]
    assert None not in rows
    rounds = has_stage(target.codec, *ROUNDING)
    slowest_s, refused = 0.0, 0
    for _ in range(cases):
        position = rng.randrange(len(rows))
        payload, *rest = target.honest[position]
        changed = mutate(payload, rng)
        start_s = time.perf_counter()
        row = outcome(target.codec, changed, *rest)
        slowest_s = max(slowest_s, time.perf_counter() - start_s)
        refused += row is None
        assert row is None or changed == payload or row != rows[position] or rounds
    assert slowest_s < SECONDS_MAX
    return refused


@pytest.mark.parametrize("spec", SPECS)
def test_hostile_bytes_cost_no_more_memory_than_the_schema_allows(spec):
    target, rng = Target(spec), random.Random(spec)
    for payload, schema, shared, round_index in target.honest:
        outcome(target.codec, payload, schema, shared, round_index)  # what is compiled or cached once is not counted
        changed = [mutate(payload, rng) for _ in range(5)] + [b"\xff" * len(payload), bytes(len(payload))]
        tracemalloc.start()
        for item in changed:
            outcome(target.codec, item, schema, shared, round_index)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < (1 << 21) + 100 * 4 * schema.numel


@pytest.mark.parametrize("spec", SPECS)
def test_random_bytes_of_the_right_length_raise_nothing_but_peer_error(spec):
    target, rng = Target(spec), random.Random(spec)
    for payload, *rest in target.honest:
        for _ in range(10):
            outcome(target.codec, rng.randbytes(len(payload)), *rest)
        for octet in (0, 1, 127, 128, 255):
            outcome(target.codec, bytes([octet]) * len(payload), *rest)


@pytest.mark.parametrize("spec", SPECS)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_bytes_made_by_hypothesis_raise_nothing_but_peer_error(spec, data):
    codec, d = parse_codec(spec), data.draw(st.sampled_from([1, 4, 5, 17, 40]))
    schema = flat(d)
    private, shared = codec.init(schema)
    length = len(codec.encode(torch.ones(d), private, shared, 0)[0])
    payload = data.draw(st.binary(min_size=length, max_size=length) | st.binary(max_size=300))
    outcome(codec, payload, schema, shared)


@settings(max_examples=300, deadline=None)
@given(
    numbers=st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=70),
    spec=st.sampled_from(SPECS),
    round_index=st.integers(0, 5),
)
def test_what_we_encode_of_any_numbers_passes_and_decodes(numbers, spec, round_index):
    codec, schema = parse_codec(spec), flat(len(numbers))
    private, shared = codec.init(schema)
    payload, _ = codec.encode(torch.tensor(numbers, dtype=torch.float32), private, shared, round_index)
    assert outcome(codec, payload, schema, shared, round_index) is not None


@pytest.mark.parametrize("spec", ["fp32", "int8", "topk(64/4096)|q2"])
def test_any_other_length_is_refused_before_anything_is_read(spec):
    codec, schema = parse_codec(spec), flat(5000)
    payload, _ = codec.encode(torch.ones(5000), None, None, 0)
    for wrong in (b"", payload[:-1], payload + b"\0", payload * 2):
        with pytest.raises(PeerError, match=f"got {len(wrong)}$"):
            codec.check(wrong, schema, None, 0)
        with pytest.raises(PeerError, match=f"got {len(wrong)}$"):
            codec.decode(wrong, schema, None, 0, 0, 5000)
