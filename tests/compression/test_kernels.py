"""The fast kernels and the plain torch ones give the same bytes."""

import numpy as np
import pytest

from farflung.compression import kernels, parse_codec
from farflung.compression.kernels import fastest, reference

SPECS = ("int8(block=16)", "int8", "q2(block=16)", "q2", "topk(3/16)|fp32", "topk(64/4096)|q2", "topk(128/128)|int8")


@pytest.mark.parametrize("spec", SPECS)
def test_numba_and_torch_encode_and_decode_to_the_same_bytes(spec, shape, monkeypatch, schema_of, vector):
    codec, d = parse_codec(spec), 70_003
    update, schema = vector(shape, d), schema_of(d)
    payload, _ = codec.encode(update, None, None, 0)
    row = codec.decode(payload, schema, None, 0, 0, d)
    for module in ("dense", "sparse"):
        monkeypatch.setattr(f"farflung.compression.{module}.fastest", lambda: reference.KERNELS)
    assert codec.encode(update, None, None, 0)[0] == payload
    for fast, plain in zip(row[-1:], codec.decode(payload, schema, None, 0, 0, d)[-1:], strict=True):
        assert fast.numpy().tobytes() == plain.numpy().tobytes()


@pytest.mark.parametrize("n", [1, 2, 3, 5, 16, 511, 4096])
def test_each_kernel_equals_its_reference_on_every_width(n, shape, vector):
    x_bn = vector(shape, 3 * n, n).numpy().reshape(3, n)
    absmax_b = np.abs(x_bn).max(1)
    fast, plain = fastest().q2_measure(x_bn, absmax_b), reference.q2_measure(x_bn, absmax_b)
    assert all((a == b).all() for a, b in zip(fast, plain, strict=True))
    assert (fast.high_count_b[absmax_b > 0] > 0).all()
    for k in {1, (n + 1) // 2, n}:
        assert (fastest().topk_select(x_bn, k) == reference.topk_select(x_bn, k)).all()


def test_rounding_is_to_even_and_clamped():
    x_bn = np.array([[0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 300.0, -300.0]], np.float32)
    for kernel in (fastest(), reference.KERNELS):
        out_br = np.zeros((1, 12), np.uint8)
        kernel.int8_pack(x_bn, np.ones(1, np.float32), out_br)
        assert out_br[0, 4:].view(np.int8).tolist() == [0, 2, 2, 0, -2, 126, 127, -127]


def test_sums_cannot_overflow_at_the_largest_block():
    assert kernels.LEVEL_MAX * 16384 * 5 < 2**63
