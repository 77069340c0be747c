"""One bit per coordinate: the sign, times the mean magnitude of its block."""

from __future__ import annotations

import numpy as np

from farflung.compression.formats.records import (
    BF16_ABS_MAX,
    NORMAL_MIN,
    bits_of,
    blocked,
    dense,
    from_bf16,
    header_and_codes,
    measured,
    refuse_scale,
    to_bf16,
    view,
)
from farflung.compression.kernels.codes import fastest_codes
from farflung.compression.scheme import Floats, Octets, Scheme, refuse_if
from farflung.compression.stage import Stage

SIGN_BLOCK = 512
"""1.031 bits per parameter."""


SIGNS = np.array([1, -1], np.float32)


def sign(block: int) -> Scheme:
    """Scaled signs: mean |x| of the block where x >= 0 (zeros of both signs too), minus it where x < 0.

    Record: the mean magnitude (bf16), then ceil(n / 8) bytes of signs, 1 for negative. 1 + 16 / block bits
    per parameter. ||x - decoded||^2 = ||x||^2 - ||x||_1^2 / n per block, up to the rounding of the scale
    (arXiv:1901.09847, Alg. 2).
    Canonical: the scale is 0 or a normal number; without a scale all bits are 0. Blocks whose mean magnitude is below
    2**-126 become zero.
    """

    def write(x_bn: Floats, out_br: Octets, start: int, salt: int) -> None:
        x_bn, _ = measured(x_bn)
        mean_b = (fastest_codes().sum_magnitudes(x_bn) / x_bn.shape[1]).astype(np.float32)
        bits_b = to_bf16(np.minimum(mean_b, BF16_ABS_MAX))
        bits_b[bits_b < _BITS_MIN] = 0
        view(out_br[:, :2], "<u2")[:, 0] = bits_b
        fastest_codes().sign_pack(x_bn, from_bf16(bits_b), out_br, 2)

    def check(records_br: Octets, n: int) -> None:
        bits_b = view(records_br[:, :2], "<u2")[:, 0]
        refuse_scale(bits_b, _BITS_MIN, _BITS_MAX)
        byte_bw = records_br[:, 2:]
        if n % 8:
            refuse_if((byte_bw & _past_the_end(n)).any(1), "a code past the end is not 0")
        empty_b = bits_b == 0
        if empty_b.any():
            refuse_if(empty_b & byte_bw.any(1), "a block without a scale has signs")

    def fill(records_br: Octets, out_bn: Floats) -> None:
        scale_b = from_bf16(view(records_br[:, :2], "<u2")[:, 0])
        fastest_codes().unpack_scaled(records_br, 2, 1, SIGNS, scale_b, out_bn)

    return dense(f"sign(block={block})", block, header_and_codes(2, 1), write=write, check=check, fill=fill)


def _past_the_end(n: int) -> Octets:
    """The bits of a block's sign bytes that belong to no coordinate."""
    place_w8 = np.arange(8 * -(-n // 8)).reshape(8, -1).T
    past_w: Octets = np.packbits(place_w8 >= n, axis=1, bitorder="little")[:, 0]
    return past_w


_BITS_MIN, _BITS_MAX = bits_of(NORMAL_MIN) >> 16, bits_of(BF16_ABS_MAX) >> 16

STAGES = (
    Stage(
        "sign",
        "number format",
        "sign(block=512)",
        "Signs times the block's mean magnitude.",
        "1 + 16/block",
        "none",
        "arXiv:1901.09847, Alg. 2",
        blocked(sign, SIGN_BLOCK),
        ("sign", "sign(block=16)", "ef(1)|sign", "topk(64/4096)|sign"),
    ),
)
