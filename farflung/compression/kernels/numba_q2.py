"""The kernels of q2 in numba: two levels per block by Lloyd's method on integers, one pass for all of it."""

from __future__ import annotations

import numpy as np

from farflung.compression.kernels import (
    LEVEL_MAX,
    ORDER,
    PAST_END,
    REFINEMENTS,
    SCALE,
    SIGNED_ZERO,
    USE,
    Floats,
    Octets,
)
from farflung.compression.kernels.numba_base import (
    BF16_LARGEST,
    INFINITE,
    KINDS,
    Number,
    Words,
    bf16_bits,
    jit,
    top_of,
)

LEVEL_SCALE = np.float32(LEVEL_MAX)

SUMMANDS = 1024
"""So many levels of q2 are added in 32 bits."""


@jit
def _sums(level_cw: Words, threshold: Number) -> tuple[Number, Number]:
    """Sum and count of the levels from the threshold on, which is at least 1. A row of them fits 32 bits."""
    total, count, limit = 0, 0, np.int32(threshold)
    for c in range(level_cw.shape[0]):
        part, some = np.int32(0), np.int32(0)
        for j in range(level_cw.shape[1]):
            level = level_cw[c, j]
            part = np.int32(part + (level if level >= limit else np.int32(0)))
            some = np.int32(some + (np.int32(1) if level >= limit else np.int32(0)))
        total, count = total + int(part), count + int(some)
    return total, count


@jit
def _levels(x_bn: Floats, b: int, absmax: np.float32, level_n: Words) -> None:
    """Magnitudes of block b in units of absmax / LEVEL_MAX, rounded down."""
    for j in range(x_bn.shape[1]):
        level_n[j] = np.int32(abs(x_bn[b, j]) / absmax * LEVEL_SCALE)


@jit
def _split(level_cw: Words, n: int, total: Number) -> tuple[Number, Number, Number]:
    """Lloyd's two classes of levels: the threshold, and the sum and count from it on."""
    threshold = min(total * 5 // (4 * n) + 1, LEVEL_MAX)
    high_sum, high_count = _sums(level_cw, threshold)
    for _ in range(REFINEMENTS):
        if 0 < high_count < n:
            threshold = ((total - high_sum) // (n - high_count) + high_sum // high_count + 1) // 2
            high_sum, high_count = _sums(level_cw, threshold)
    return threshold, high_sum, high_count


@jit
def _level_bits(total: Number, count: Number, unit: Number, float_1: Floats) -> Number:
    """The mean of `count` levels as bf16, saturating; `float_1` is scratch."""
    float_1[0] = min(total / max(count, 1) * unit, 999424.0)
    return bf16_bits(float_1.view(np.int32)[0])


@jit
def _code(number: Number, level: Number, limit: Number, low_sign: Number) -> Number:
    """2 x negative + high; `low_sign` is 2, or 0 if low codes have no sign."""
    is_high = level >= limit
    sign = np.int32(2) if is_high else low_sign
    return np.int32((sign if number < 0 else np.int32(0)) | (np.int32(1) if is_high else np.int32(0)))


@jit
def q2_write(x_bn: Floats, out_br: Octets) -> int:
    """See `Packing.write`."""
    blocks, n = x_bn.shape
    quarter = out_br.shape[1] - 4
    full = max(n - 3 * quarter, 0)
    bits_bn = x_bn.view(np.int32)
    float_1 = np.empty(1, np.float32)
    level_cw = np.zeros((-(-n // SUMMANDS), min(n, SUMMANDS)), np.int32)  # zeros behind the last level stay
    level_n = level_cw.reshape(-1)
    cell_1 = float_1.view(np.int32)
    for b in range(blocks):
        cell_1[0] = top_of(bits_bn, b)
        if cell_1[0] >= INFINITE:
            return b
        out_br[b] = 0
        if cell_1[0] == 0:
            continue
        absmax = float_1[0]
        _levels(x_bn, b, absmax, level_n)
        total = _sums(level_cw, 1)[0]
        threshold, high_sum, high_count = _split(level_cw, n, total)
        unit = np.float64(absmax) / LEVEL_MAX
        low = _level_bits(total - high_sum, n - high_count, unit, float_1)
        high = _level_bits(high_sum, high_count, unit, float_1)
        if high == 0:
            continue
        if low == high:
            low, threshold = 0, 0
        out_br[b, 0], out_br[b, 1] = np.uint8(low & 255), np.uint8(low >> 8)
        out_br[b, 2], out_br[b, 3] = np.uint8(high & 255), np.uint8(high >> 8)
        limit, low_sign = np.int32(threshold), np.int32(2 if low else 0)
        for j in range(full):
            two, three, four = quarter + j, 2 * quarter + j, 3 * quarter + j
            low_half = _code(x_bn[b, j], level_n[j], limit, low_sign)
            low_half = np.int32(low_half | _code(x_bn[b, two], level_n[two], limit, low_sign) << 2)
            high_half = _code(x_bn[b, three], level_n[three], limit, low_sign)
            high_half = np.int32(high_half | _code(x_bn[b, four], level_n[four], limit, low_sign) << 2)
            out_br[b, 4 + j] = np.uint8(np.int32(low_half | high_half << 4))
        for j in range(full, quarter):
            for place in range(j, n, quarter):
                code = _code(x_bn[b, place], level_n[place], limit, low_sign)
                out_br[b, 4 + j] |= np.uint8(code << np.int32(place // quarter * 2))
    return -1


@jit
def _q2_uses(records_br: Octets, b: int, n: int) -> tuple[Number, Number, Number, Number]:
    """Bits of block b: 1 in the first if a code is high, in the second if one is low, 2 in the third if a low one has a
    sign; the last is not 0 if a code past the end is not 0."""
    quarter = records_br.shape[1] - 4
    some_high, some_low, signed_low, past = np.uint8(0), np.uint8(0), np.uint8(0), np.uint8(0)
    for slot in range(4):
        down = np.uint8(2 * slot)
        inside = max(min(quarter, n - slot * quarter), 0)
        for j in range(inside):
            code = np.uint8(records_br[b, 4 + j] >> down)
            some_high |= code
            some_low |= ~code
            signed_low |= code & np.uint8(~code << np.uint8(1))
        for j in range(inside, quarter):
            past |= np.uint8(records_br[b, 4 + j] >> down) & np.uint8(3)
    return some_high & 1, some_low & 1, signed_low & 2, past


@jit
def q2_read(records_br: Octets, out_bn: Floats) -> int:
    """See `Packing.read`."""
    blocks, n = out_bn.shape
    quarter = records_br.shape[1] - 4
    float_2 = np.empty(2, np.float32)
    cell_2 = float_2.view(np.int32)
    for b in range(blocks):
        low_bits = np.int32(records_br[b, 0]) | np.int32(records_br[b, 1]) << np.int32(8)
        high_bits = np.int32(records_br[b, 2]) | np.int32(records_br[b, 3]) << np.int32(8)
        if high_bits > BF16_LARGEST:
            return b * KINDS + SCALE
        if low_bits >= high_bits and low_bits > 0:
            return b * KINDS + ORDER
        some_high, some_low, signed_low, past = _q2_uses(records_br, b, n)
        if past:
            return b * KINDS + PAST_END
        if (some_high > 0) != (high_bits > 0) or (low_bits > 0 and not some_low):
            return b * KINDS + USE
        if low_bits == 0 and signed_low:
            return b * KINDS + SIGNED_ZERO
        cell_2[0], cell_2[1] = low_bits << np.int32(16), high_bits << np.int32(16)
        low, high = float_2[0], float_2[1]
        for slot in range(4):
            first, is_high, is_negative = slot * quarter, np.uint8(1 << (2 * slot)), np.uint8(2 << (2 * slot))
            for j in range(min(quarter, n - first)):
                magnitude = high if records_br[b, 4 + j] & is_high else low
                out_bn[b, first + j] = -magnitude if records_br[b, 4 + j] & is_negative else magnitude
    return -1
