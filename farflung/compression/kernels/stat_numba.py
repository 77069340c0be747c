"""The statistical quantiser in numba, whole blocks in one call: `formats.statistical` has the plain form of both."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from farflung.compression.kernels import ABS_MAX_BITS, BF16_ABS_MAX_BITS, Floats, Octets
from farflung.compression.kernels.codes_numba import bins, ranked_pack
from farflung.compression.kernels.numba_cpu import jit
from farflung.compression.kernels.sums_numba import absmax, sum_plain, sum_squares

Halves = NDArray[np.uint16]

ABS_MAX = np.uint32(ABS_MAX_BITS).view(np.float32)
LEVEL_MAX = np.float64(np.uint32(BF16_ABS_MAX_BITS << 16).view(np.float32))

LOOKED_AT = 64
"""So many first numbers of a block decide whether it may hold bf16 numbers only."""

HIGH, MINUS_ZERO, PAST_END, UNUSED, FALLING = range(5)
"""What `stat_read` found wrong; `formats.statistical.FAULTS` has the words."""


@jit
def _unusual(x_bn: Floats) -> bool:
    """Whether a number is beyond PAYLOAD_ABS_MAX or not finite, or a block may be one of few bf16 numbers."""
    absmax_b, bits_bn = absmax(x_bn), x_bn.view(np.uint32)
    for b in range(len(x_bn)):
        if not absmax_b[b] <= ABS_MAX:
            return True
        low = np.uint32(0)
        for j in range(min(x_bn.shape[1], LOOKED_AT)):
            low |= bits_bn[b, j] & np.uint32(0xFFFF)
        if low == 0:
            return True
    return False


@jit
def _level_bits(mean: float, cell_1: Floats) -> np.uint16:
    """A mean as bf16, saturating, without -0.0; `cell_1` is scratch."""
    cell_1[0] = np.float32(min(max(mean, -LEVEL_MAX), LEVEL_MAX))
    bits = cell_1.view(np.uint32)[0]
    rounded = (bits + (np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1)))) >> np.uint32(16)
    return np.uint16(0 if rounded == 0x8000 else rounded)


@jit
def stat_write(x_bn: Floats, bits: int, out_br: Octets) -> bool:
    """Fill the records, or say that something unusual is there, which this leaves to the plain form."""
    if _unusual(x_bn):
        return False
    blocks, n = x_bn.shape
    levels = 1 << bits
    shift_b = sum_plain(x_bn)
    for b in range(blocks):
        shift_b[b] /= n
    per_unit_b = sum_squares(x_bn, shift_b)
    for b in range(blocks):
        sigma = np.sqrt(per_unit_b[b] / max(n - 1, 1))
        per_unit_b[b] = levels / 6.0 / sigma if sigma > 0 else 0.0
    bin_bn, sum_bl, count_bl = bins(x_bn, shift_b, per_unit_b, levels)
    rank_bl = np.zeros((blocks, levels), np.uint8)
    cell_1, value_1 = np.empty(1, np.float32), np.empty(1, np.float32)
    value_bits = value_1.view(np.uint32)
    for b in range(blocks):
        used, last = 0, np.float32(-np.inf)
        for level in range(2 * levels):
            out_br[b, level] = 0
        for level in range(levels):
            if count_bl[b, level]:
                found = _level_bits(sum_bl[b, level] / count_bl[b, level], cell_1)
                value_bits[0] = np.uint32(found) << np.uint32(16)
                if value_1[0] > last:
                    last = value_1[0]
                    out_br[b, 2 * used], out_br[b, 2 * used + 1] = np.uint8(found & 255), np.uint8(found >> 8)
                    used += 1
            rank_bl[b, level] = max(used - 1, 0)
    ranked_pack(bin_bn, rank_bl, bits, out_br, 2 * levels)
    return True


@jit
def _table(records_br: Octets, b: int, value_l: Floats) -> int:
    """The levels of a record; -1, or what is wrong with them whatever the codes are."""
    bits_l = value_l.view(np.uint32)
    for level in range(len(value_l)):
        bits = np.uint32(records_br[b, 2 * level]) | np.uint32(records_br[b, 2 * level + 1]) << np.uint32(8)
        if bits & np.uint32(0x7FFF) > BF16_ABS_MAX_BITS:
            return HIGH
        if bits == 0x8000:
            return MINUS_ZERO
        bits_l[level] = bits << np.uint32(16)
    return -1


@jit
def stat_read(records_br: Octets, bits: int, out_bn: Floats) -> int:
    """Decode; -1, or 8 x record + what is wrong with the first record that `stat_write` cannot have made."""
    blocks, n = out_bn.shape
    levels, width = 1 << bits, (n * bits + 7) // 8
    header, mask = 2 * levels, np.uint8(levels - 1)
    value_l, seen_c = np.empty(levels, np.float32), np.zeros(levels, np.uint8)
    for b in range(blocks):
        fault = _table(records_br, b, value_l)
        if fault >= 0:
            return 8 * b + fault
        seen_c[:] = 0
        past = np.uint8(0)
        for slot in range(8 // bits):
            first, shift = slot * width, np.uint8(bits * slot)
            inside = max(min(width, n - first), 0)
            for j in range(inside):
                code = np.uint8(records_br[b, header + j] >> shift) & mask
                seen_c[code] = 1
                out_bn[b, first + j] = value_l[code]
            for j in range(inside, width):
                past |= np.uint8(records_br[b, header + j] >> shift) & mask
        if past:
            return 8 * b + PAST_END
        for level in range(levels):
            if (not seen_c[level] and value_l[level] != 0) or (level and seen_c[level] > seen_c[level - 1]):
                return 8 * b + UNUSED
            if level and seen_c[level] and not value_l[level] > value_l[level - 1]:
                return 8 * b + FALLING
    return -1
