"""Formats with one small code per coordinate: their bytes, their errors, their dice, and the spellings they refuse."""

import math
import random
import struct

import numpy as np
import pytest
import torch

from farflung.compression import parse_codec
from farflung.compression.formats import (
    half,
    natural,
    records,
    signs,
    small_floats,
    statistical,
    stochastic,
)
from farflung.compression.kernels import codes_reference, stat_reference
from farflung.compression.kernels.codes import NF4_BOUNDS, NF4_VALUES
from farflung.protocol.errors import ConfigError, LocalError, PeerError
from farflung.protocol.limits import PAYLOAD_ABS_MAX

FIXED = (
    "fp16",
    "e3m0",
    "e3m0(block=32)",
    "nf4",
    "nf4(block=1024)",
    "sign",
    "sign(block=16)",
    "stat",
    "stat(bits=2, block=64)",
    "stat(bits=4)",
    "stat(bits=8)",
)
DICE = ("ternary", "natural", "qsgd", "qsgd(levels=1, block=64)", "qsgd(levels=5, block=16)", "qsgd(levels=127)")
SPECS = FIXED + DICE
SIZES = (1, 2, 7, 15, 4095, 4096, 4097, 70_000)
SIGMAS = 5.5
"""Of a normal mean: passed by chance in all but 4 of 10^8 cases, times the 10^4 coordinates of a test: 4 in 10^4."""


def encode(spec, update, round_index=0):
    return parse_codec(spec).encode(torch.as_tensor(update, dtype=torch.float32), None, None, round_index)[0]


def decode(spec, payload, schema):
    codec = parse_codec(spec)
    codec.check(payload, schema, None, 0)
    return codec.decode(payload, schema, None, 0, 0, schema.numel).value_d


def roundtrip(spec, update, schema_of, round_index=0):
    return decode(spec, encode(spec, update, round_index), schema_of(len(update)))


def refuses(spec, payload, schema):
    codec = parse_codec(spec)
    with pytest.raises(PeerError):
        codec.check(payload, schema, None, 0)
    with pytest.raises(PeerError):
        codec.decode(payload, schema, None, 0, 0, schema.numel)
    return True


def accepts(spec, payload, schema):
    parse_codec(spec).check(payload, schema, None, 0)
    return True


def bf16_bytes(*numbers):
    return b"".join(struct.pack("<f", number)[2:] for number in numbers)


@pytest.fixture
def plain_kernels(monkeypatch):
    def use():
        for module in (records, signs, small_floats, statistical, stochastic, natural):
            monkeypatch.setattr(module, "fastest_codes", lambda: codes_reference.KERNELS)
        monkeypatch.setattr(statistical, "_kernels", lambda: stat_reference)

    return use


@pytest.mark.parametrize("spec", SPECS)
def test_numba_and_numpy_write_and_read_the_same_bytes(spec, shape, plain_kernels, schema_of, vector):
    codec = parse_codec(spec)
    made = []
    for d in SIZES:
        update = vector(shape, d, d)
        payload = encode(spec, update, d)
        made.append((d, update, payload, codec.decode(payload, schema_of(d), None, d, 0, d).value_d))
    plain_kernels()
    for d, update, payload, row in made:
        assert encode(spec, update, d) == payload
        codec.check(payload, schema_of(d), None, d)
        again = codec.decode(payload, schema_of(d), None, d, 0, d).value_d
        assert again.numpy().tobytes() == row.numpy().tobytes()


@pytest.mark.parametrize("spec", SPECS)
def test_payloads_are_as_long_as_declared_finite_and_within_the_limit(spec, shape, schema_of, vector):
    codec = parse_codec(spec)
    for d in SIZES:
        update = vector(shape, d)
        before = update.clone()
        payload = encode(spec, update)
        assert len(payload) * 8 == round(codec.bits(schema_of(d)) * d)
        row = decode(spec, payload, schema_of(d))
        assert row.isfinite().all()
        assert row.abs().max() <= PAYLOAD_ABS_MAX
        assert torch.equal(update.view(torch.int32), before.view(torch.int32))
        if shape.endswith("zeros"):
            assert not row.any()


@pytest.mark.parametrize(
    ("spec", "bits"),
    [
        ("fp16", 16),
        ("e3m0", 4 + 32 / 512),
        ("nf4", 4.5),
        ("sign", 1 + 16 / 512),
        ("ternary", 2 + 32 / 512),
        ("qsgd", 4 + 32 / 512),
        ("qsgd(levels=1)", 2 + 32 / 512),
        ("qsgd(levels=8)", 8 + 32 / 512),
        ("natural", 9),
        ("stat", 2 + 64 / 1024),
        ("stat(bits=4)", 4 + 256 / 4096),
        ("stat(bits=8)", 8 + 4096 / 16384),
    ],
)
def test_bits_are_the_ones_promised(spec, bits, schema_of):
    assert parse_codec(spec).bits(schema_of(1 << 20)) == bits


@pytest.mark.parametrize("spec", [spec for spec in SPECS if not spec.startswith("qsgd")])
def test_what_was_decoded_encodes_to_the_same_bytes(spec, shape, schema_of, vector):
    for d in (1, 15, 4097, 20_000):
        payload = encode(spec, vector(shape, d))
        row = decode(spec, payload, schema_of(d))
        assert encode(spec, row, 9) == payload


@pytest.mark.parametrize("spec", SPECS)
def test_changed_bytes_are_refused_or_are_what_encode_makes(spec, schema_of, vector):
    codec, rng = parse_codec(spec), random.Random(spec)
    outcomes = []
    for trial in range(150):
        d = rng.choice([1, 3, 17, 600])
        changed = bytearray(encode(spec, vector(rng.choice(["gauss", "ties", "spike"]), d, trial)))
        for _ in range(rng.choice([1, 1, 2, 20])):
            at = rng.randrange(len(changed) if trial % 2 else min(6, len(changed)))
            changed[at] = rng.choice([0, 255, 128, 127, changed[at] ^ 1 << rng.randrange(8)])
        try:
            codec.check(bytes(changed), schema_of(d), None, 0)
        except PeerError:
            with pytest.raises(PeerError):
                codec.decode(bytes(changed), schema_of(d), None, 0, 0, d)
            outcomes.append(False)
            continue
        row = codec.decode(bytes(changed), schema_of(d), None, 0, 0, d).value_d
        assert row.abs().max() <= PAYLOAD_ABS_MAX
        assert spec.startswith("qsgd") or encode(spec, row) == bytes(changed)
        outcomes.append(True)
    assert len(set(outcomes)) == 2


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("keep", ["3/16", "16/1024"])
def test_they_carry_the_values_that_topk_keeps(spec, keep, shape, schema_of, vector):
    codec = parse_codec(f"topk({keep})|{spec}")
    for d in (1, 5, 4097, 9000):
        payload = encode(codec.spec, vector(shape, d))
        codec.check(payload, schema_of(d), None, 0)
        row = codec.decode(payload, schema_of(d), None, 0, 0, d)
        again = torch.zeros(d).index_put((row.index_k,), row.value_k)
        if spec[:4] not in ("stat", "sign", "qsgd"):  # qsgd is no fixed point; the others give a kept zero a value
            assert encode(codec.spec, again) == payload


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_our_own_error(spec, bad):
    update = torch.ones(5000)
    update[4321] = bad
    with pytest.raises(LocalError):
        encode(spec, update)


@pytest.mark.parametrize("spec", SPECS)
def test_entries_beyond_the_limit_saturate(spec, schema_of):
    row = roundtrip(spec, torch.tensor([-3e38, 3e38] * 50), schema_of)
    top = 65504 if spec == "fp16" else 0.99 * PAYLOAD_ABS_MAX
    assert (row[::2] <= -top).all()
    assert (row[1::2] >= top).all()


def test_the_wire_bytes_are_these():
    assert encode("fp16", [1.0, -2.0, -0.0, 1e6]) == bytes.fromhex("003c 00c0 0080 ff7b")
    # scale 64; codes 7, 8+6, 1, 0, 8+3: byte j holds j and j + 3
    assert encode("e3m0", [64.0, -32.0, 1.0, 0.1, -4.0]) == struct.pack("<f", 64) + bytes([0x07, 0xBE, 0x01])
    assert encode("nf4", [-2.0, 0.0, 2.0, 0.9]) == struct.pack("<f", 2) + bytes([0xF0, 0xC7])
    # mean 2; negative: 1, 3, 8; q = 2: byte 0 holds 0 2 4 6 8, byte 1 holds 1 3 5 7
    assert encode("sign", [1, -3, 0, -2, 4, 2, 2, 1, -3]) == bf16_bytes(2) + bytes([0b10000, 0b11])
    assert encode("ternary", [3.0, 0.0, -3.0, 0.0, 3.0]) == struct.pack("<f", 3) + bytes([0b01_11_01, 0])
    assert encode("qsgd", [0.0, -3.5]) == struct.pack("<f", 0.5) + bytes([0xF0])
    assert encode("natural", [1.0, -0.5, 0.0, -1e6]) == bytes([0b1010, 127, 126, 0, 147])
    assert encode("stat", [1.0, -1.0, 3.0, 1.0, 1.0]) == bf16_bytes(-1, 1, 3, 0) + bytes([0b01_10_01, 0b01_00])


def test_fp16_rounds_like_torch_and_saturates(schema_of):
    bits = torch.randint(0, 0x477FE000, (50_000,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    numbers = torch.cat([bits.view(torch.float32), -bits.view(torch.float32)])
    row = roundtrip("fp16", numbers, schema_of)
    assert torch.equal(row.view(torch.int32), numbers.half().float().view(torch.int32))
    assert roundtrip("fp16", torch.tensor([65519.0, 65520.0, -7e4, 1e6]), schema_of).abs().tolist() == [65504.0] * 4


def test_nf4_and_e3m0_hold_the_published_levels(schema_of):
    published = [-1, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635]
    published += [-0.18477343022823334, -0.09105003625154495, 0, 0.07958029955625534, 0.16093020141124725]
    published += [0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941]
    published += [0.7229568362236023, 1]
    assert NF4_VALUES.tolist() == published
    short = "-.69619280 -.52507305 -.39491749 -.28444138 -.18477343 -.09105004 .07958030 .16093020 .24611230 .33791524"
    assert [f"{number:.8f}".replace("0.", ".") for number in published if abs(number) not in (0, 1)][
        :10
    ] == short.split()
    levels = torch.tensor(published)
    assert torch.equal(roundtrip("nf4", levels, schema_of), levels)
    floats = torch.tensor([0, 0.25, 0.5, 1, 2, 4, 8, 16, -0.25, -0.5, -1, -2, -4, -8, -16])
    assert torch.equal(roundtrip("e3m0", floats, schema_of), floats)


@pytest.mark.parametrize("spec", ["nf4", "e3m0"])
def test_four_bit_floats_take_the_nearest_level(spec, shape, schema_of, vector):
    update = vector(shape, 9000).clamp(-1e6, 1e6)
    row = roundtrip(spec, update, schema_of).double()
    level_l = (
        NF4_VALUES if spec == "nf4" else np.array([0, *(2.0**-e for e in range(7)), *(-(2.0**-e) for e in range(7))])
    )
    block = 64 if spec == "nf4" else 512
    for x, y in zip(update.double().split(block), row.split(block), strict=True):
        scale = x.abs().max()
        if scale < 2.0**-120:
            assert not y.any()
            continue
        nearest = (x[:, None] - scale * torch.as_tensor(level_l.astype(np.float64))).abs().amin(1)
        assert ((x - y).abs() <= nearest + 1e-6 * scale).all()


def test_a_tie_of_four_bit_floats_goes_up(schema_of):
    ties = [64.0, 48.0, -48.0, 1.5, -1.5, 0.5, -0.5, np.nextafter(np.float32(0.5), np.float32(0))]
    assert roundtrip("e3m0", torch.tensor(ties), schema_of).tolist() == [64, 64, -64, 2, -2, 1, -1, 0]
    bounds = torch.cat([torch.ones(1), torch.from_numpy(NF4_BOUNDS)])
    assert torch.equal(roundtrip("nf4", bounds, schema_of)[1:], torch.from_numpy(NF4_VALUES[1:]))
    below = torch.from_numpy(np.nextafter(NF4_BOUNDS, np.float32(-1)))
    assert torch.equal(
        roundtrip("nf4", torch.cat([torch.ones(1), below]), schema_of)[1:], torch.from_numpy(NF4_VALUES[:-1])
    )


@pytest.mark.parametrize("block", [16, 512])
def test_sign_keeps_the_share_of_energy_that_the_mean_holds(block, shape, schema_of, vector):
    update = vector(shape, 9000)
    row = roundtrip(f"sign(block={block})", update, schema_of).double()
    for x, y in zip(update.double().split(block), row.split(block), strict=True):
        if x.abs().mean() < 2.0**-126:
            assert not y.any()
            continue
        lost = x.square().sum() - x.abs().sum() ** 2 / len(x)
        slack = len(x) * (y.abs().max() * 2.0**-8) ** 2  # the rounding of the scale to bf16
        assert abs((x - y).square().sum() - lost) <= slack + 1e-12 * x.square().sum()
        assert ((y > 0) == (x >= 0)).all()


def test_sign_of_gauss_keeps_two_over_pi(schema_of, vector):
    update = vector("gauss", 1 << 18)
    row = roundtrip("sign(block=65536)", update, schema_of)
    lost = (update - row).double().square().sum() / update.double().square().sum()
    assert abs(1 - lost - 2 / math.pi) < 0.004


@pytest.mark.parametrize(("bits", "block"), [(2, 1024), (4, 4096), (8, 16384)])
def test_stat_decodes_each_bin_to_its_mean(bits, block, schema_of, vector):
    for shape in ("gauss", "cauchy", "ties", "patches"):
        update = vector(shape, 20_000)
        row = roundtrip(f"stat(bits={bits}, block={block})", update, schema_of).double()
        for x, y in zip(update.double().split(block), row.split(block), strict=True):
            level_l, place_n = y.unique(return_inverse=True)
            assert len(level_l) <= 2**bits
            mean_l = torch.zeros(len(level_l), dtype=torch.float64).index_add(0, place_n, x) / place_n.bincount()
            assert ((mean_l - level_l).abs() <= mean_l.abs() * 2.0**-8 + 1e-300).all()
            between = (x - x.mean()).square().sum() - (mean_l[place_n] - x.mean()).square().sum()
            residual = (x - y).square().sum()
            slack = (mean_l[place_n] * 2.0**-8).square().sum()
            assert abs(residual - between) <= slack + 1e-9 * x.square().sum()


def test_stat_bins_are_those_of_the_paper(schema_of, vector):
    x = vector("gauss", 1024).double() + 0.3
    away = x - x.mean()
    width = 6 * away.norm() / math.sqrt(len(x) - 1) / 4
    bin_n = (away / width + 2).round().clamp(0, 3).long()
    expected = torch.stack([x[bin_n == k].mean() if (bin_n == k).any() else x.new_zeros(()) for k in range(4)])
    row = roundtrip("stat", x.float(), schema_of)
    assert ((row - expected[bin_n]).abs() <= expected[bin_n].abs() * 2.0**-8).all()


def test_stat_sends_few_numbers_as_they_are(schema_of):
    generator = torch.Generator().manual_seed(0)
    for numbers in ([0.0, 3.0], [-1.0, -0.5, 0.0, 1e5], [7.0], [1e-3, 1e3, 1e5]):
        exact = torch.tensor(numbers).bfloat16().float()
        update = exact[torch.randint(0, len(numbers), (3000,), generator=generator)]
        assert torch.equal(roundtrip("stat", update, schema_of), update)


def draws(spec, x, trials, schema_of):
    """Mean and mean square error of many encodings; the round changes the dice."""
    total, square = torch.zeros(len(x), dtype=torch.float64), torch.zeros(len(x), dtype=torch.float64)
    for trial in range(trials):
        row = roundtrip(spec, x, schema_of, trial).double()
        total += row
        square += (row - x).square()
    return total / trials, square / trials


def steps_of(spec, x):
    """(lower level, width of the step) of each entry, from the formulas of the papers; x in fp64."""
    if spec == "natural":
        low = torch.exp2(x.abs().clamp(min=2.0**-126).log2().floor())
        return torch.where(x.abs() < low, 0, low), low
    per_block = [(float(run.abs().max()), float(run.norm()), len(run)) for run in x.split(BLOCKS[spec])]
    levels = {"qsgd": 7, "qsgd(levels=127)": 127}.get(spec, 1)
    width = torch.cat([torch.full((n,), (most if spec == "ternary" else norm) / levels) for most, norm, n in per_block])
    width = width.double().clamp(min=1e-300)
    return (x.abs() / width * (1 - 1e-7)).floor() * width, width


BLOCKS = {"ternary": 512, "qsgd": 512, "qsgd(levels=1, block=64)": 64, "qsgd(levels=127)": 512, "natural": 1}
BERNSTEIN = math.log(2e8)
"""A mean of N draws of a step w and variance v is off by more than sqrt(2 v L / N) + w L / 3N in 2 exp(-L) = 1e-8 of
all cases: in 2e-5 for the 2,000 coordinates of a test. The first term is 6.2 sigma / sqrt(N)."""


@pytest.mark.parametrize("kind", ["gauss", "ties", "spike", "patches"])
@pytest.mark.parametrize("spec", BLOCKS)
def test_random_rounding_is_unbiased_within_its_variance(spec, kind, schema_of, vector):
    trials, x = 400, vector(kind, 2000, 3)
    mean, square = draws(spec, x, trials, schema_of)
    x = x.double()
    low, width = steps_of(spec, x)
    variance = (x.abs() - low).clamp(min=0) * (low + width - x.abs()).clamp(min=0)
    allowed = (2 * variance * BERNSTEIN / trials).sqrt() + width * BERNSTEIN / (3 * trials)
    assert ((mean - x).abs() <= allowed + 1e-6 * width).all()
    spread = (width.square() * variance).sum() / trials  # at least the variance of the mean square error
    assert abs(square.sum() - variance.sum()) <= SIGMAS * spread.sqrt() + 1e-6 * width.square().sum()
    for v, y in zip(variance.split(BLOCKS[spec]), x.split(BLOCKS[spec]), strict=True):
        energy, n = y.square().sum(), len(y)
        if spec == "natural":
            assert v.sum() <= energy / 8 * (1 + 1e-9)
        elif spec == "ternary":
            assert v.sum() <= y.abs().sum() * y.abs().max() - energy * (1 - 1e-9) + 1e-300
        else:
            levels = {"qsgd": 7, "qsgd(levels=127)": 127}.get(spec, 1)
            assert v.sum() <= min(n / levels**2, math.sqrt(n) / levels) * energy * (1 + 1e-6)


def test_dice_are_even_and_independent_of_their_neighbours_and_of_the_round():
    thrown = [codes_reference.dice(0, salt, (1 << 16,)) for salt in (0, 1, 1 << 32, 0x9E3779B97F4A7C15)]
    for word in thrown:
        counts = np.bincount(word >> 24, minlength=256)
        assert ((counts - 256) ** 2 / 256).sum() < 255 + SIGMAS * math.sqrt(2 * 255)
        for shift in (1, 2, 512):
            assert abs(np.corrcoef(word[:-shift], word[shift:])[0, 1]) < SIGMAS / 256
    for first in range(4):
        for second in range(first):
            assert abs(np.corrcoef(thrown[first], thrown[second])[0, 1]) < SIGMAS / 256
    bits = np.unpackbits(np.stack(thrown).view(np.uint8), bitorder="little").reshape(-1, 32).mean(0)
    assert (np.abs(bits - 0.5) < SIGMAS * 0.5 / 512).all()


def test_the_round_changes_the_dice_and_nothing_else_does(vector):
    update = vector("gauss", 70_000)
    for spec in DICE:
        assert encode(spec, update, 3) == encode(spec, update.clone(), 3)
        assert encode(spec, update, 3) != encode(spec, update, 4)


def test_scales_of_qsgd_are_the_largest_that_decode_within_bounds():
    for levels in range(1, 128):
        step, top = stochastic.largest_step(levels), np.float32(PAYLOAD_ABS_MAX)
        following = np.uint32(step.view(np.uint32) + np.uint32(0x100)).view(np.float32)
        assert np.float32(levels) * step <= top < np.float32(levels) * following


def test_four_bit_floats_refuse_every_second_spelling(schema_of):
    def e3m0(scale, *octets):
        return "e3m0", struct.pack("<f", scale) + bytes(octets), schema_of(3)

    def nf4(scale, *octets):
        return "nf4", struct.pack("<f", scale) + bytes(octets), schema_of(3)

    assert accepts(*e3m0(2.0, 0x17, 0x09))
    assert accepts(*e3m0(0.0, 0, 0))
    assert refuses(*e3m0(2.0, 0x16, 0x09))  # nothing at the scale
    assert refuses(*e3m0(2.0, 0x87, 0x09))  # minus zero
    assert refuses(*e3m0(2.0, 0x17, 0x19))  # a fourth code
    assert refuses(*e3m0(0.0, 0x07, 0))
    assert accepts(*nf4(2.0, 0x70, 0x03))
    assert accepts(*nf4(0.0, 0x77, 0x07))
    assert refuses(*nf4(2.0, 0x71, 0x03))
    assert refuses(*nf4(2.0, 0x70, 0x73))
    assert refuses(*nf4(0.0, 0x70, 0x07))
    for scale in (-0.0, -2.0, 1e-37, 1.01e6, math.inf, math.nan):
        assert refuses(*e3m0(scale, 0x17, 0x09))
        assert refuses(*nf4(scale, 0x70, 0x03))


def test_fp16_sign_and_natural_refuse_every_second_spelling(schema_of):
    for bits in (0x7C00, 0xFC00, 0x7E00, 0xFFFF):
        assert refuses("fp16", struct.pack("<2H", 0x3C00, bits), schema_of(2))
    assert accepts("sign", bf16_bytes(2) + bytes([0b101]), schema_of(3))
    assert refuses("sign", bf16_bytes(2) + bytes([0b1101]), schema_of(3))
    assert refuses("sign", bf16_bytes(0) + bytes([0b101]), schema_of(3))
    for scale in (-0.0, -2.0, 1e-39, 1.01e6, math.inf, math.nan):
        assert refuses("sign", bf16_bytes(scale) + bytes([0]), schema_of(3))
    assert accepts("natural", bytes([0b101, 1, 0, 147]), schema_of(3))
    assert refuses("natural", bytes([0b101, 1, 0, 148]), schema_of(3))
    assert refuses("natural", bytes([0b111, 1, 0, 147]), schema_of(3))
    assert refuses("natural", bytes([0b1101, 1, 0, 147]), schema_of(3))


def test_steps_refuse_codes_that_no_block_has(schema_of):
    def ternary(scale, *octets):
        return "ternary", struct.pack("<f", scale) + bytes(octets), schema_of(3)

    def qsgd(step, *octets):
        return "qsgd", struct.pack("<f", step) + bytes(octets), schema_of(4)

    assert accepts(*ternary(2.0, 0b01_00_11))
    assert refuses(*ternary(2.0, 0b01_10_11))
    assert refuses(*ternary(2.0, 0b01_01_00_11))
    assert refuses(*ternary(2.0, 0))
    assert refuses(*ternary(0.0, 1))
    assert accepts(*qsgd(0.5, 0x06, 0x3A))  # 6, -2, 0, 3
    assert refuses(*qsgd(0.5, 0x08, 0x36))  # minus zero
    assert refuses(*qsgd(0.5, 0x07, 0x77))  # three entries of the norm
    assert refuses(*qsgd(0.5, 0x01, 0x11))  # 9 + 9 + ... below 49
    assert accepts(*qsgd(stochastic.largest_step(7), 0x77, 0x77))  # beyond the limit entries saturate
    assert refuses(*qsgd(0.0, 0x06, 0x3A))
    assert refuses("qsgd(levels=5)", struct.pack("<f", 1) + bytes([0x06]), schema_of(2))
    for scale in (-0.0, -2.0, 1e-39, 1.01e6, math.inf, math.nan):
        assert refuses(*ternary(scale, 0b01_00_11))
        assert refuses(*qsgd(scale, 0x06, 0x3A))


def test_stat_refuses_every_second_spelling(schema_of):
    def stat(*levels, codes):
        return "stat", bf16_bytes(*levels) + bytes(codes), schema_of(5)

    assert accepts(*stat(-1, 1, 3, 0, codes=[0b01_10_01, 0b01_00]))
    assert accepts(*stat(0, 0, 0, 0, codes=[0, 0]))
    assert refuses(*stat(-1, 3, 1, 0, codes=[0b01_10_01, 0b01_00]))
    assert refuses(*stat(1, 1, 3, 0, codes=[0b01_10_01, 0b01_00]))
    assert refuses(*stat(-1, 1, 3, 4, codes=[0b01_10_01, 0b01_00]))
    assert refuses(*stat(-1, 1, 3, 0, codes=[0b01_01_01, 0b01_00]))  # 3 is never used
    assert refuses(*stat(-1, 1, 3, 0, codes=[0b01_10_01, 0b01_01_00]))  # past the end
    assert refuses(*stat(-1, 1, 0, 3, codes=[0b01_11_01, 0b01_00]))
    assert refuses(*stat(-1, -0.0, 3, 0, codes=[0b01_10_01, 0b01_00]))
    for level in (1.01e6, math.inf, math.nan):
        assert refuses(*stat(-1, 1, level, 0, codes=[0b01_10_01, 0b01_00]))


@pytest.mark.parametrize(
    "spec", ["qsgd(levels=0)", "qsgd(levels=128)", "stat(bits=3)", "nf4(block=48)", "fp16(block=16)"]
)
def test_arguments_out_of_range_are_refused(spec):
    with pytest.raises(ConfigError):
        parse_codec(spec)


def test_fp16_is_half_of_the_limit_that_it_names():
    assert np.float32(np.finfo(np.float16).max) == half.FP16_ABS_MAX


@pytest.mark.parametrize("levels", [1, 7, 127])
def test_no_two_steps_of_qsgd_decode_alike(levels, schema_of):
    """Of one coordinate all that is seen is levels x step: neighbouring fp32 steps would round to one number."""
    codec, schema = parse_codec(f"qsgd(levels={levels})"), schema_of(1)
    payload, _ = codec.encode(torch.tensor([0.66]), None, None, 0)
    for bit in range(8):
        changed = bytearray(payload)
        changed[0] ^= 1 << bit
        with pytest.raises(PeerError, match="16 significant bits"):
            codec.check(bytes(changed), schema, None, 0)
