"""Zeros behind `global-topk`: number formats that make one of a kept value, and what may then be spelled how."""

import numpy as np
import pytest
import torch

from farflung.compression import parse_codec, registry
from farflung.compression.formats.global_topk import _elias_bytes, _low_bits
from farflung.compression.kernels.global_select import elias_write
from farflung.protocol.errors import PeerError
from farflung.protocol.rows import DenseRow

FORMATS = [
    *(
        parse_codec(spec).spec
        for stage in registry.stages().values()
        if stage.kind == "number format"
        for spec in stage.examples
        if "|" not in spec
    ),
    "stat(bits=4, block=256)",
    "stat(bits=8, block=512)",
    "qsgd(levels=2, block=64)",
    "qsgd(levels=3, block=512)",
    "deadzone(1.5)|stat",
    "deadzone(0.5)|stat(bits=4)",
    "deadzone(1)|q2",
]
SYMMETRIC = ("few", "gauss", "spread", "two sizes", "steps")


def symmetric(form, d):
    """Numbers and their negatives, so that the mean of a middle bin is 0."""
    half = torch.randn(d // 2, generator=torch.Generator().manual_seed(d))
    match form:
        case "few":
            half = torch.zeros(d // 2).index_copy(0, torch.arange(3), torch.tensor([10.1, 0.5001, 9.3]))
        case "spread":
            half = half**5
        case "two sizes":
            half = torch.where(half.abs() < 1.5, 1.0, 40.0)
        case "steps":
            half = half.round()
    return torch.stack([half, -half], 1).reshape(-1)


def checked(spec, x_d, schema_of):
    codec, schema = parse_codec(spec), schema_of(len(x_d))
    payload, _ = codec.encode(x_d, *codec.init(schema), 0)
    codec.check(payload, schema, None, 0)
    return codec.decode(payload, schema, None, 0, 0, len(x_d))


def densify(row):
    """As a vector without signs on zeros."""
    if isinstance(row, DenseRow):
        return row.value_d + torch.zeros(())
    return torch.zeros(row.size).index_put((row.index_k,), row.value_k)


@pytest.mark.parametrize("value", FORMATS)
@pytest.mark.parametrize("form", SYMMETRIC)
def test_everything_is_as_in_the_format_itself(value, form, schema_of):
    for d in (60, 512):
        x_d = symmetric(form, d)
        row, alone = checked(f"global-topk(1)|{value}", x_d, schema_of), checked(value, x_d, schema_of)
        if parse_codec(value).scheme.block >= d:  # one unit, one block, one salt
            assert torch.equal(densify(row), densify(alone))


@pytest.mark.parametrize("value", FORMATS)
@pytest.mark.parametrize("form", SYMMETRIC)
def test_symmetric_numbers_pass_the_codecs_own_check(value, form, schema_of):
    x_d = symmetric(form, 20_000)
    row = checked(f"global-topk(0.05)|{value}", x_d, schema_of)
    assert len(row.index_k) <= 1000
    largest = torch.argsort(x_d.abs(), descending=True, stable=True)[:1000]
    assert not densify(row).index_fill(0, largest, 0.0).any()


def test_zeros_that_stat_must_keep_have_one_spelling(schema_of):
    codec, schema = parse_codec("global-topk(1)|stat"), schema_of(64)
    payload, _ = codec.encode(symmetric("few", 64), None, None, 0)
    honest = codec.decode(payload, schema, None, 0, 0, 64)
    assert not honest.value_k.all()
    rows, refused = {densify(honest).numpy().tobytes()}, 0
    for bit in range(8 * len(payload)):
        changed = bytearray(payload)
        changed[bit // 8] ^= 1 << bit % 8
        try:
            codec.check(bytes(changed), schema, None, 0)
        except PeerError:
            refused += 1
            continue
        row = densify(codec.decode(bytes(changed), schema, None, 0, 0, 64)).numpy().tobytes()
        assert row not in rows
        rows.add(row)
    assert refused > 64


def unit(value, value_k, places):
    """The payload of one unit of 64 coordinates that keeps these values at these places, honest or not."""
    block, _ = parse_codec(value).encode(torch.tensor(value_k), None, None, 0)
    count = len(places)
    index_r = np.empty(_elias_bytes(64, count), np.uint8)
    elias_write(np.array(places, np.int32), _low_bits(64, count), index_r)
    return count.to_bytes(2, "little") + block + index_r.tobytes()


@pytest.mark.parametrize(
    ("value", "value_k", "places", "why"),
    [
        ("stat", [0.0, 1.0, -1.0], [0, 5, 9], None),
        ("stat", [1.0, 0.0, -1.0], [0, 1, 9], None),
        ("stat", [1.0, -1.0], [5, 9], None),
        ("stat", [0.0, 1.0, -1.0], [1, 5, 9], "lowest free place"),
        ("stat", [1.0, -1.0, 0.0], [5, 9, 10], "lowest free place"),
        ("stat", [0.0, 0.0], [0, 1], "could be left out"),
        ("int8", [0.0, 1.0, -1.0], [0, 5, 9], "could be left out"),
        ("bf16", [0.0, 1.0, -1.0], [0, 5, 9], "could be left out"),
        ("bf16", [-0.0, 1.0], [0, 5], "has a sign"),
        ("ternary", [0.0, 1.0, -1.0], [0, 5, 9], "could be left out"),
    ],
)
def test_a_zero_is_refused_where_it_could_be_left_out_or_lie_lower(value, value_k, places, why, schema_of):
    codec, schema = parse_codec(f"global-topk(1)|{value}"), schema_of(64)
    payload = unit(value, value_k, places)
    if why is None:
        codec.check(payload, schema, None, 0)
        assert torch.equal(codec.decode(payload, schema, None, 0, 0, 64).value_k, torch.tensor(value_k))
        return
    with pytest.raises(PeerError, match=why):
        codec.check(payload, schema, None, 0)
