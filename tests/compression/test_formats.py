"""What each format promises: its bytes, its error, and the spellings it refuses."""

import struct

import numpy as np
import pytest
import torch

from farflung.compression import parse_codec
from farflung.compression.formats.dense import BF16_ABS_MAX, INT8_SCALE_MAX
from farflung.protocol.errors import PeerError
from farflung.protocol.limits import PAYLOAD_ABS_MAX
from farflung.protocol.rows import SparseRow


def roundtrip(spec, update, schema_of):
    codec = parse_codec(spec)
    payload, _ = codec.encode(update, None, None, 0)
    row = codec.decode(payload, schema_of(len(update)), None, 0, 0, len(update))
    if isinstance(row, SparseRow):
        return torch.zeros(row.size).index_put((row.index_k,), row.value_k)
    return row.value_d


def encode(spec, numbers):
    return parse_codec(spec).encode(torch.tensor(numbers, dtype=torch.float32), None, None, 0)[0]


def refuses(spec, payload, schema):
    codec = parse_codec(spec)
    with pytest.raises(PeerError):
        codec.check(payload, schema, None, 0)
    with pytest.raises(PeerError):
        codec.decode(payload, schema, None, 0, 0, schema.numel)
    return True


def bf16_bytes(*numbers):
    return b"".join(struct.pack("<f", number)[2:] for number in numbers)


def test_the_wire_bytes_are_these():
    assert encode("fp32", [1.0, -0.0]) == struct.pack("<2f", 1.0, -0.0)
    assert encode("bf16", [1.0, -2.0]) == bytes.fromhex("803f 00c0")
    assert encode("int8", [127.0, -64.5, 0.5, 1.5]) == struct.pack("<f4b", 1.0, 127, -64, 0, 2)
    # low 1, high 4; q = 2: byte 0 holds x0 x2 x4, byte 1 holds x1 x3
    assert encode("q2", [1.0, -1.0, 4.0, -4.0, -1.0]) == bf16_bytes(1, 4) + bytes([0b00_10_01_00, 0b00_00_11_10])
    # 16 coordinates, 4-bit indices 3 and 9: the low nibble comes first
    sparse = [0.0] * 16
    sparse[3], sparse[9] = -1.0, 5.0
    assert encode("topk(2/16)|bf16", sparse) == bf16_bytes(-1, 5) + bytes([0x93])
    wide = [0.0] * 4096
    wide[0xABC], wide[0x123] = 2.0, -2.0
    assert encode("topk(2/4096)|fp32", wide) == struct.pack("<2f", -2, 2) + bytes([0x23, 0xC1, 0xAB])


def test_fp32_and_bf16_keep_minus_zero_and_denormals(schema_of):
    numbers = torch.tensor([-0.0, 0.0, 1e-45, -1e-39, 2.0**-133, 1e6, -1e6])
    assert torch.equal(roundtrip("fp32", numbers, schema_of).view(torch.int32), numbers.view(torch.int32))
    expected = numbers.bfloat16().float()
    assert torch.equal(roundtrip("bf16", numbers, schema_of).view(torch.int32), expected.view(torch.int32))


def test_bf16_rounds_like_torch(schema_of):
    bits = torch.randint(0, 0x49742400, (50_000,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    numbers = bits.view(torch.float32)
    assert torch.equal(roundtrip("bf16", numbers, schema_of), numbers.bfloat16().float())


def test_limits_of_scales_are_the_largest_that_decode_within_bounds():
    top = np.float32(PAYLOAD_ABS_MAX)
    assert np.float32(127) * INT8_SCALE_MAX <= top < np.float32(127) * np.nextafter(INT8_SCALE_MAX, top)
    assert top.view(np.uint32) >> 16 == BF16_ABS_MAX.view(np.uint32) >> 16
    assert BF16_ABS_MAX.view(np.uint32) & 0xFFFF == 0


@pytest.mark.parametrize("block", [16, 1024, 16384])
def test_int8_errs_by_half_a_step_of_its_block_and_keeps_the_extremes(block, shape, schema_of, vector):
    update = vector(shape, 40_000)
    row = roundtrip(f"int8(block={block})", update, schema_of)
    for x, y in zip(update.split(block), row.split(block), strict=True):
        step = x.abs().max().double() / 127
        assert (x.double() - y).abs().max() <= step * 0.5001 + 2.0**-126 * 127 * (step < 2.0**-125)


@pytest.mark.parametrize("block", [16, 512])
def test_q2_is_never_worse_than_scaled_signs(block, shape, schema_of, vector):
    update = vector(shape, 40_000)
    row = roundtrip(f"q2(block={block})", update, schema_of)
    for x, y in zip(update.double().split(block), row.double().split(block), strict=True):
        signs_error = x.square().sum() - x.abs().sum() ** 2 / len(x)
        assert (x - y).square().sum() <= signs_error + 1e-4 * x.square().sum() + len(x) * 2.0**-266


def test_q2_of_gauss_loses_12_percent_of_the_energy(schema_of, vector):
    update = vector("gauss", 1 << 18)
    lost = (update - roundtrip("q2", update, schema_of)).square().sum() / update.square().sum()
    assert 0.115 < lost < 0.122  # Lloyd-Max for four levels: 0.1175


def test_q2_keeps_zero_and_two_magnitudes_exactly(schema_of):
    generator = torch.Generator().manual_seed(0)
    for magnitudes in ([0.0, 3.0], [0.25, 3.0], [1.0, 1.0]):
        choice = torch.randint(0, 2, (3000,), generator=generator)
        sign = torch.randint(0, 2, (3000,), generator=generator) * 2 - 1
        update = torch.tensor(magnitudes)[choice] * sign
        assert torch.equal(roundtrip("q2", update, schema_of), update)


@pytest.mark.parametrize("k", [1, 64, 4096])
def test_topk_keeps_the_k_largest_and_loses_at_most_its_share(k, shape, schema_of, vector):
    update = vector(shape, 9000)
    row = roundtrip(f"topk({k}/4096)|fp32", update, schema_of)
    for x, y in zip(update.split(4096), row.split(4096), strict=True):
        kept = -(-k * len(x) // 4096)
        assert torch.equal(y[y != 0], x[y != 0])
        assert torch.equal(y.abs().sort().values[-kept:], x.abs().sort().values[-kept:])
        bound = (1 - kept / len(x)) * x.double().square().sum()
        assert (x - y).double().square().sum() <= bound * (1 + 1e-12)


def test_topk_gives_a_tie_to_the_lowest_index(schema_of):
    update = torch.tensor([1.0, -2.0, 2.0, 1.0] * 8)
    row = roundtrip("topk(3/16)|fp32", update, schema_of)
    assert row[:16].nonzero().flatten().tolist() == [1, 2, 5]


def test_topk_moves_values_its_format_cannot_carry_to_the_front(schema_of):
    update = torch.zeros(16)
    update[9], update[12] = 1e-44, 1.0  # bf16 has no 1e-44
    codec = parse_codec("topk(3/16)|bf16")
    payload, _ = codec.encode(update, None, None, 0)
    row = codec.decode(payload, schema_of(16), None, 0, 0, 16)
    assert row.index_k.tolist() == [0, 1, 12]
    assert row.value_k.tolist() == [0.0, 0.0, 1.0]


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf, 1.001e6, -1.01e6, 3e38])
def test_floats_that_are_not_finite_or_too_large_are_refused(number, schema_of):
    good = encode("fp32", [1.0] * 5)
    assert refuses("fp32", good[:8] + struct.pack("<f", number) + good[12:], schema_of(5))
    assert refuses("bf16", bf16_bytes(1, 1, number * 1.01, 1, 1), schema_of(5))


def test_int8_refuses_every_second_spelling(schema_of):
    def bad(scale, *steps):
        return refuses("int8", struct.pack("<f4b", scale, *steps), schema_of(4))

    parse_codec("int8").check(struct.pack("<f4b", 0.5, 127, -3, 0, 0), schema_of(4), None, 0)
    assert bad(0.5, -128, 127, 0, 0)
    assert bad(0.5, 126, -3, 0, 0)
    assert bad(0.5, 0, 0, 0, 0)
    assert bad(0.0, 127, 0, 0, 0)
    assert bad(-0.0, 0, 0, 0, 0)
    assert bad(1e-40, 127, 0, 0, 0)
    assert bad(-0.5, 127, 0, 0, 0)
    assert bad(7875.0, 127, 0, 0, 0)
    assert bad(np.inf, 127, 0, 0, 0)
    assert bad(np.nan, 127, 0, 0, 0)


def test_int8_has_one_scale_for_one_largest_value(schema_of):
    scales = np.arange(0x40400000, 0x40400000 + 1000, dtype=np.uint32).view(np.float32)
    settled = scales * np.float32(127) / np.float32(127)
    twins = scales[settled != scales]
    assert len(twins) > 0
    for scale in twins:
        assert refuses("int8", struct.pack("<fb", scale, 127), schema_of(1))
        parse_codec("int8").check(encode("int8", [scale * np.float32(127)]), schema_of(1), None, 0)


def test_q2_refuses_every_second_spelling(schema_of):
    def bad(low, high, *octets):
        return refuses("q2", bf16_bytes(low, high) + bytes(octets), schema_of(6))

    parse_codec("q2").check(bf16_bytes(1, 2) + bytes([0b00_10_01_00, 0b00_00_11_01]), schema_of(6), None, 0)
    assert bad(1, 2, 0b01_10_01_00, 0b00_00_11_01)  # padding of the last slot
    assert bad(1, 2, 0b00_10_01_00, 0b10_00_11_01)
    assert bad(1, 2, 0b00_10_00_00, 0b00_00_10_00)  # high never used
    assert bad(1, 2, 0b00_11_01_01, 0b00_01_11_01)  # low never used
    assert bad(0, 2, 0b00_10_01_00, 0b00_00_11_01)  # minus zero
    assert bad(2, 2, 0b00_10_01_00, 0b00_00_11_01)
    assert bad(2, 1, 0b00_10_01_00, 0b00_00_11_01)
    assert bad(0, 0, 0b00_00_01_00, 0)
    assert bad(0, 0, 0b00_00_10_00, 0)
    assert bad(-1, 2, 0b00_10_01_00, 0b00_00_11_01)
    assert bad(-0.0, 2, 0b00_00_01_00, 0b00_00_11_01)
    assert bad(0, -0.0, 0, 0)
    assert bad(1, np.inf, 0b00_10_01_00, 0b00_00_11_01)
    assert bad(1, 1.01e6, 0b00_10_01_00, 0b00_00_11_01)


def test_topk_refuses_indices_out_of_order_out_of_range_or_with_loose_bits(schema_of):
    values = struct.pack("<3f", 1.0, 2.0, 3.0)
    parse_codec("topk(3/16)|fp32").check(values + bytes([0x42, 0x07]), schema_of(16), None, 0)
    assert refuses("topk(3/16)|fp32", values + bytes([0x24, 0x07]), schema_of(16))
    assert refuses("topk(3/16)|fp32", values + bytes([0x22, 0x07]), schema_of(16))
    assert refuses("topk(3/16)|fp32", values + bytes([0x42, 0x17]), schema_of(16))
    assert refuses("topk(3/16)|fp32", values + bytes([0x42, 0x0E]), schema_of(14))
    zero = struct.pack("<3f", 0.0, 2.0, 3.0)
    parse_codec("topk(3/16)|fp32").check(zero + bytes([0x40, 0x07]), schema_of(16), None, 0)
    assert refuses("topk(3/16)|fp32", zero + bytes([0x42, 0x07]), schema_of(16))
    assert refuses("topk(3/16)|fp32", struct.pack("<3f", -0.0, 2.0, 3.0) + bytes([0x40, 0x07]), schema_of(16))
