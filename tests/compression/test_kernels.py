"""The fast kernels and the plain torch ones give the same bytes, the same numbers and the same refusals."""

import math
import random

import numpy as np
import pytest
import torch

from farflung.compression import kernels, parse_codec
from farflung.compression.kernels import fastest, reference
from farflung.protocol.limits import PAYLOAD_ABS_MAX

SPECS = ("int8(block=16)", "int8", "int4", "int2", "q2(block=16)", "q2", "topk(3/16)|fp32", "topk(128/128)|int4")

RECORD_BYTES = {
    "fp32": lambda n: 4 * n,
    "bf16": lambda n: 2 * n,
    "int8": lambda n: 4 + n,
    "int4": lambda n: 2 + -(-n // 2),
    "int2": lambda n: 2 + -(-n // 4),
    "q2": lambda n: 4 + -(-n // 4),
}
WIDTHS = (1, 2, 3, 5, 16, 127, 511, 4096)


def pair(name):
    return getattr(fastest(), name), getattr(reference.KERNELS, name)


def bits(numbers):
    return numbers.view(np.int32)


@pytest.mark.parametrize("spec", SPECS)
def test_numba_and_torch_encode_and_decode_to_the_same_bytes(spec, shape, monkeypatch, schema_of, vector):
    codec, d = parse_codec(spec), 70_003
    update, schema = vector(shape, d), schema_of(d)
    payload, _ = codec.encode(update, None, None, 0)
    row = codec.decode(payload, schema, None, 0, 0, d)
    monkeypatch.setattr("farflung.compression.formats.dense.fastest", lambda: reference.KERNELS)
    assert codec.encode(update, None, None, 0)[0] == payload
    for fast, plain in zip(row[-1:], codec.decode(payload, schema, None, 0, 0, d)[-1:], strict=True):
        assert fast.numpy().tobytes() == plain.numpy().tobytes()


@pytest.mark.parametrize("name", RECORD_BYTES)
def test_each_kernel_writes_and_reads_like_its_reference_on_every_width(name, shape, vector):
    fast, plain = pair(name)
    for n in WIDTHS:
        x_bn = vector(shape, 3 * n, n).numpy().reshape(3, n)
        one_br, two_br = (np.full((3, RECORD_BYTES[name](n)), filler, np.uint8) for filler in (7, 9))
        assert fast.write(x_bn, one_br) == plain.write(x_bn, two_br) == -1
        assert (one_br == two_br).all()
        one_bn, two_bn = (np.full((3, n), filler, np.float32) for filler in (7, 9))
        assert fast.read(one_br, one_bn) == plain.read(two_br, two_bn) == -1
        assert (bits(one_bn) == bits(two_bn)).all()


@pytest.mark.parametrize("name", RECORD_BYTES)
def test_each_kernel_refuses_the_same_records_as_its_reference(name, vector):
    (fast, plain), rng = pair(name), random.Random(name)
    passed = refused = 0
    for trial in range(400):
        n = rng.choice(WIDTHS[:6])
        good_br = np.empty((3, RECORD_BYTES[name](n)), np.uint8)
        fast.write(vector("cauchy", 3 * n, trial).numpy().reshape(3, n), good_br)
        for _ in range(rng.choice([1, 1, 2])):
            at = rng.randrange(min(good_br.shape[1], 6) if trial % 2 else good_br.shape[1])
            good_br[rng.randrange(3), at] = rng.choice([0, 255, 128, 127, rng.randrange(256)])
        one_bn, two_bn = np.empty((3, n), np.float32), np.empty((3, n), np.float32)
        one, two = fast.read(good_br, one_bn), plain.read(good_br, two_bn)
        assert one // len(kernels.FAULTS) == two // len(kernels.FAULTS)
        passed, refused = passed + (one < 0), refused + (one >= 0)
        assert one >= 0 or (bits(one_bn) == bits(two_bn)).all()
    assert passed
    assert refused


@pytest.mark.parametrize("name", RECORD_BYTES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_each_kernel_names_the_first_block_that_is_not_finite(name, bad):
    x_bn = np.ones((4, 50), np.float32)
    x_bn[2, 49] = x_bn[3, 0] = bad
    for kernel in pair(name):
        assert kernel.write(x_bn, np.empty((4, RECORD_BYTES[name](50)), np.uint8)) == 2


@pytest.mark.parametrize("n", [1, 15, 16, 17, 511, 4096])
def test_steps_on_vectors_equal_their_references(n, shape, vector):
    x_d, y_d = vector(shape, n, 1).numpy(), vector("gauss", n, 2).numpy()
    fast, plain = fastest(), reference.KERNELS
    for k in {1, (n + 1) // 2, n}:
        assert (fast.topk_select(x_d[None], k) == plain.topk_select(x_d[None], k)).all()
    assert fast.top_bits(x_d) == plain.top_bits(x_d) == int(np.abs(x_d).max().view(np.int32))
    assert fast.square_sum(x_d) == plain.square_sum(x_d)
    assert math.isclose(fast.square_sum(x_d), math.fsum(float(x) ** 2 for x in x_d), rel_tol=1e-13, abs_tol=1e-300)
    one_d, two_d = y_d.copy(), y_d.copy()
    fast.carry(one_d, x_d, np.float32(0.95))
    plain.carry(two_d, x_d, np.float32(0.95))
    assert (bits(one_d) == bits(two_d)).all()
    assert (one_d == np.float32(0.95) * y_d + x_d).all()


def test_the_largest_magnitude_shows_whether_all_are_finite():
    for bad in (math.nan, math.inf, -math.inf):
        assert fastest().top_bits(np.array([1.0, bad, 2.0], np.float32)) > 0x7F7FFFFF


def test_rounding_is_to_even_and_clamped():
    x_bn = np.array([[0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 127.0, -127.0]], np.float32)
    y_bn = np.array([[0.5, 1.5, 2.5, -0.5, -1.5, 6.5, 7.0, -7.01]], np.float32)
    for kernel in (fastest(), reference.KERNELS):
        out_br = np.zeros((1, 12), np.uint8)
        kernel.int8.write(x_bn, out_br)
        assert out_br[0, 4:].view(np.int8).tolist() == [0, 2, 2, 0, -2, 126, 127, -127]
        out_br = np.zeros((1, 6), np.uint8)
        kernel.int4.write(y_bn, out_br)
        nibbles = [*(out_br[0, 2:] & 15), *(out_br[0, 2:] >> 4)]
        assert nibbles == [0, 2, 2, 0, 14, 6, 7, 9]


def test_constants_given_as_bits_are_the_numbers_they_stand_for():
    def largest_bf16(limit):
        below = torch.nextafter(torch.tensor(limit).bfloat16(), torch.tensor(0.0).bfloat16())
        near = torch.tensor(limit).bfloat16()
        return float(near if float(near) <= limit else below)

    assert np.uint32(kernels.ABS_MAX_BITS).view(np.float32) == np.float32(PAYLOAD_ABS_MAX)
    assert np.uint32(kernels.BF16_ABS_MAX_BITS << 16).view(np.float32) == largest_bf16(PAYLOAD_ABS_MAX)
    for code_bits, widest in ((4, 7), (2, 1)):
        scale = np.uint32(kernels.SCALE_MAX_BITS[code_bits] << 16).view(np.float32)
        assert scale == largest_bf16(PAYLOAD_ABS_MAX / widest)
    above = np.nextafter(kernels.INT8_SCALE_MAX, np.float32(np.inf))
    assert kernels.INT8_SCALE_MAX * np.float32(127) <= PAYLOAD_ABS_MAX < above * np.float32(127)


def test_sums_cannot_overflow_at_the_largest_block():
    from farflung.compression.kernels.numba_q2 import SUMMANDS

    assert kernels.LEVEL_MAX * 16384 * 5 < 2**63
    assert kernels.LEVEL_MAX * SUMMANDS < 2**31
