"""The kernels of `codes` in numba. Codes are made block by block in a row of bytes that stays in the first cache.

What they compute is said in `codes.CodeKernels`; here is how. Loops over one slot of the bytes at a time vectorise.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from farflung.compression.kernels import Floats, Integers, Octets
from farflung.compression.kernels.codes import (
    CHANCE_BITS,
    NATURAL_TOP_EXPONENT,
    NATURAL_TOP_LEVEL,
    NF4_BOUNDS,
    CodeKernels,
    Doubles,
)
from farflung.compression.kernels.numba_cpu import jit
from farflung.compression.kernels.sums_numba import absmax, sum_magnitudes, sum_plain, sum_squares

Words = NDArray[np.uint32]

LOW = np.uint32(0x7FFFFF)
CHANCE = np.float32(1 << CHANCE_BITS)
LAST_BASE, LAST_TOP = np.float32(1 << 19), np.float32(NATURAL_TOP_LEVEL)
LAST_SLOPE = np.float32(2**23 / (NATURAL_TOP_LEVEL - 2**19))

CELLS = np.float32(32)
"""NF4 codes are looked up by the cell of x / scale, 1 / CELLS wide, which holds one boundary at most."""

CELL_OF_BOUND = (NF4_BOUNDS * CELLS + CELLS).astype(np.int64)  # monotone in the boundary, as the cell is in x
CODE_BELOW = (CELL_OF_BOUND[:, None] < np.arange(65)).sum(0).astype(np.int32)
BOUND_IN_CELL = np.full(65, 2, np.float32)
BOUND_IN_CELL[CELL_OF_BOUND] = NF4_BOUNDS


@jit
def _fold(code_n: Octets, bits: int, out_w: Octets) -> None:
    """Pack one block's codes into its bytes, one slot at a time."""
    n, width = len(code_n), len(out_w)
    out_w[:] = code_n[:width]
    for slot in range(1, 8 // bits):
        first = min(slot * width, n)
        part_w = code_n[first : first + width]
        shift = np.uint8(bits * slot)
        for j in range(len(part_w)):
            out_w[j] |= np.uint8(part_w[j] << shift)


@jit
def _unfold(byte_w: Octets, bits: int, code_n: Octets) -> bool:
    """The inverse of `_fold`; whether a code past the end is not 0."""
    n, width = len(code_n), len(byte_w)
    mask, stray = np.uint8((1 << bits) - 1), False
    for slot in range(8 // bits):
        first = min(slot * width, n)
        part_w = code_n[first : first + width]
        shift = np.uint8(bits * slot)
        for j in range(len(part_w)):
            part_w[j] = np.uint8(np.uint8(byte_w[j] >> shift) & mask)
        for j in range(len(part_w), width):
            stray |= (byte_w[j] >> shift) & mask != 0
    return stray


@jit
def sign_pack(x_bn: Floats, scale_b: Floats, out_br: Octets, header: int) -> None:
    """See `CodeKernels.sign_pack`."""
    blocks, n = x_bn.shape
    code_n = np.empty(n, np.uint8)
    zero = np.float32(0)
    for b in range(blocks):
        row_n = x_bn[b]
        if scale_b[b] == 0:
            out_br[b, header:] = 0
            continue
        for j in range(n):
            code_n[j] = row_n[j] < zero
        _fold(code_n, 1, out_br[b, header:])


@jit
def e3m0_pack(x_bn: Floats, scale_b: Floats, out_br: Octets, header: int) -> None:
    """See `CodeKernels.e3m0_pack`. Half a mantissa added to the bits of the quotient carries into its exponent."""
    blocks, n = x_bn.shape
    code_n, part_n = np.empty(n, np.uint8), np.empty(n, np.float32)
    bits_n = part_n.view(np.int32)
    for b in range(blocks):
        scale, row_n = scale_b[b], x_bn[b]
        if scale == 0:
            out_br[b, header:] = 0
            continue
        for j in range(n):
            part_n[j] = row_n[j] / scale
        for j in range(n):
            word = bits_n[j]
            magnitude = np.int32(word & np.int32(0x7FFFFFFF))
            level = np.int32(np.int32(np.int32(magnitude + np.int32(0x400000)) >> np.int32(23)) - np.int32(120))
            level = np.int32(max(level, np.int32(1)))
            kept = magnitude >= np.int32(120 << 23)  # 2**-7
            negative = np.int32(np.int32(word >> np.int32(28)) & np.int32(8))
            code_n[j] = np.uint8(level | negative if kept else np.int32(0))
        _fold(code_n, 4, out_br[b, header:])


@jit
def nf4_pack(x_bn: Floats, scale_b: Floats, out_br: Octets, header: int) -> None:
    """See `CodeKernels.nf4_pack`."""
    blocks, n = x_bn.shape
    code_n = np.empty(n, np.uint8)
    for b in range(blocks):
        scale, row_n = scale_b[b], x_bn[b]
        divisor = scale if scale > 0 else np.float32(np.inf)
        for j in range(n):
            part = row_n[j] / divisor
            cell = np.uint32(np.int32(part * CELLS + CELLS))
            code_n[j] = np.uint8(CODE_BELOW[cell] + np.int32(part >= BOUND_IN_CELL[cell]))
        _fold(code_n, 4, out_br[b, header:])


@jit
def _dice(position: np.uint32, low: np.uint32, high: np.uint32) -> np.uint32:
    word = np.uint32(np.uint32(position * np.uint32(0x9E3779B1)) + low)
    word = np.uint32(np.uint32(np.uint32(word ^ np.uint32(word >> np.uint32(16))) * np.uint32(0x7FEB352D)) ^ high)
    word = np.uint32(np.uint32(word ^ np.uint32(word >> np.uint32(15))) * np.uint32(0x846CA68B))
    word = np.uint32(np.uint32(word ^ np.uint32(word >> np.uint32(16))) * np.uint32(0x2C1B3C6D))
    return np.uint32(word ^ np.uint32(word >> np.uint32(15)))


@jit
def _steps_pack(
    x_bn: Floats,
    step_b: Floats,
    top: np.float32,
    bits: int,
    start: int,
    low: int,
    high: int,
    out_br: Octets,
    first: int,
) -> None:
    blocks, n = x_bn.shape
    code_n, die_n = np.empty(n, np.uint8), np.empty(n, np.int32)
    key, twist = np.uint32(low), np.uint32(high)
    zero, half = np.float32(0), np.int32(1 << (bits - 1))
    for b in range(blocks):
        step, row_n, base = step_b[b], x_bn[b], np.uint32(start + b * n)
        if step == 0:
            out_br[b, first:] = 0
            continue
        for j in range(n):
            die_n[j] = _dice(np.uint32(base + np.uint32(j)), key, twist) >> np.uint32(32 - CHANCE_BITS)
        for j in range(n):
            height = abs(row_n[j]) / step
            height = top if height > top else height
            level = np.int32(height)
            chance = np.int32(np.float32(height - np.float32(level)) * CHANCE)
            level = np.int32(level + np.int32(die_n[j] < chance))
            sign = half if row_n[j] < zero else np.int32(0)
            code_n[j] = np.uint8(level | (sign if level > np.int32(0) else np.int32(0)))
        _fold(code_n, bits, out_br[b, first:])


def steps_pack(
    x_bn: Floats, step_b: Floats, levels: int, bits: int, start: int, salt: int, out_br: Octets, header: int
) -> None:
    """See `CodeKernels.steps_pack`."""
    _steps_pack(x_bn, step_b, np.float32(levels), bits, start, salt & 0xFFFFFFFF, salt >> 32, out_br, header)


@jit
def _natural_pack(x_bn: Floats, start: int, low: int, high: int, out_br: Octets) -> None:
    blocks, n = x_bn.shape
    width = (n + 7) // 8
    sign_n, magnitude_n = np.empty(n, np.uint8), np.empty(n, np.float32)
    bits_n = magnitude_n.view(np.uint32)
    key, twist = np.uint32(low), np.uint32(high)
    zero = np.float32(0)
    for b in range(blocks):
        row_n, code_n, base = x_bn[b], out_br[b, width:], np.uint32(start + b * n)
        for j in range(n):
            magnitude = abs(row_n[j])
            magnitude_n[j] = LAST_TOP if magnitude > LAST_TOP else magnitude
        for j in range(n):
            exponent = np.uint32(bits_n[j] >> np.uint32(23))
            last = np.float32(np.float32(magnitude_n[j] - LAST_BASE) * LAST_SLOPE)
            chance = np.int32(bits_n[j] & LOW)
            chance = np.int32(last) if exponent == np.uint32(NATURAL_TOP_EXPONENT) else chance
            thrown = np.int32(_dice(np.uint32(base + np.uint32(j)), key, twist) >> np.uint32(9))
            exponent = np.uint32(exponent + np.uint32(thrown < chance))
            code_n[j] = np.uint8(exponent)
        for j in range(n):
            sign_n[j] = (row_n[j] < zero) & (code_n[j] > 0)
        _fold(sign_n, 1, out_br[b, :width])


def natural_pack(x_bn: Floats, start: int, salt: int, out_br: Octets) -> None:
    """See `CodeKernels.natural_pack`."""
    _natural_pack(x_bn, start, salt & 0xFFFFFFFF, salt >> 32, out_br)


@jit
def bins(x_bn: Floats, shift_b: Doubles, per_unit_b: Doubles, levels: int) -> tuple[Octets, Doubles, Integers]:
    """See `CodeKernels.bins`. Eight tables in turn, so that equal bins do not wait for each other."""
    blocks, n = x_bn.shape
    bin_bn = np.empty((blocks, n), np.uint8)
    sum_bl, count_bl = np.zeros((blocks, levels)), np.zeros((blocks, levels), np.int64)
    sum_8l, count_8l = np.empty((8, levels)), np.empty((8, levels), np.int64)
    last, middle = np.float64(levels - 1), np.float64(levels / 2)
    magic = np.float64(1.5 * 2.0**52)
    for b in range(blocks):
        row_n, bin_n, shift, per_unit = x_bn[b], bin_bn[b], shift_b[b], per_unit_b[b]
        for j in range(n):
            place = (np.float64(row_n[j]) - shift) * per_unit + middle
            place = last if place > last else place
            place = 0.0 if place < 0.0 else place
            bin_n[j] = np.uint8(np.int32((place + magic) - magic))
        sum_8l[:] = 0
        count_8l[:] = 0
        for j in range(n):
            sum_8l[j & 7, bin_n[j]] += np.float64(row_n[j])
            count_8l[j & 7, bin_n[j]] += 1
        for lane in range(8):
            for level in range(levels):
                sum_bl[b, level] += sum_8l[lane, level]
                count_bl[b, level] += count_8l[lane, level]
    return bin_bn, sum_bl, count_bl


@jit
def ranked_pack(bin_bn: Octets, rank_bl: Octets, bits: int, out_br: Octets, header: int) -> None:
    """See `CodeKernels.ranked_pack`."""
    blocks, n = bin_bn.shape
    code_n = np.empty(n, np.uint8)
    for b in range(blocks):
        rank_l, bin_n = rank_bl[b], bin_bn[b]
        for j in range(n):
            code_n[j] = rank_l[bin_n[j]]
        _fold(code_n, bits, out_br[b, header:])


@jit
def unpack(records_br: Octets, header: int, bits: int, table_bl: Floats, out_bn: Floats) -> None:
    """See `CodeKernels.unpack`."""
    blocks, n = out_bn.shape
    code_n = np.empty(n, np.uint8)
    width = (n * bits + 7) // 8
    for b in range(blocks):
        table_l, row_n = table_bl[b], out_bn[b]
        _unfold(records_br[b, header : header + width], bits, code_n)
        for j in range(n):
            row_n[j] = table_l[code_n[j]]


@jit
def unpack_scaled(records_br: Octets, header: int, bits: int, value_l: Floats, scale_b: Floats, out_bn: Floats) -> None:
    """See `CodeKernels.unpack_scaled`."""
    blocks, n = out_bn.shape
    code_n = np.empty(n, np.uint8)
    width = (n * bits + 7) // 8
    for b in range(blocks):
        scale, row_n = scale_b[b], out_bn[b]
        _unfold(records_br[b, header : header + width], bits, code_n)
        for j in range(n):
            row_n[j] = value_l[code_n[j]] * scale


@jit
def seen(records_br: Octets, header: int, bits: int, n: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """See `CodeKernels.seen`."""
    blocks, width = len(records_br), (n * bits + 7) // 8
    seen_bl = np.zeros((blocks, 1 << bits), np.bool_)
    stray_b = np.empty(blocks, np.bool_)
    code_n = np.empty(n, np.uint8)
    for b in range(blocks):
        seen_l = seen_bl[b]
        stray_b[b] = _unfold(records_br[b, header : header + width], bits, code_n)
        if bits > 4:
            for j in range(n):
                seen_l[code_n[j]] = True
            continue
        mask = np.int32(0)
        for j in range(n):
            mask = np.int32(mask | np.int32(np.int32(1) << np.int32(code_n[j])))
        for code in range(1 << bits):
            seen_l[code] = (mask >> code) & 1
    return seen_bl, stray_b


@jit
def level_sums(records_br: Octets, header: int, bits: int, n: int) -> tuple[Integers, Integers, Integers]:
    """See `CodeKernels.level_sums`."""
    blocks, width = len(records_br), (n * bits + 7) // 8
    used_b, sum_b, square_b = np.empty(blocks, np.int64), np.empty(blocks, np.int64), np.empty(blocks, np.int64)
    code_n = np.empty(n, np.uint8)
    mask = np.int32((1 << (bits - 1)) - 1)
    for b in range(blocks):
        _unfold(records_br[b, header : header + width], bits, code_n)
        used, total, square = np.int64(0), np.int64(0), np.int64(0)
        for j in range(n):
            level = np.int32(np.int32(code_n[j]) & mask)
            used += level > 0
            total += level
            square += level * level
        used_b[b], sum_b[b], square_b[b] = used, total, square
    return used_b, sum_b, square_b


KERNELS = CodeKernels(
    absmax,
    sum_magnitudes,
    sum_squares,
    sum_plain,
    sign_pack,
    e3m0_pack,
    nf4_pack,
    steps_pack,
    natural_pack,
    bins,
    ranked_pack,
    unpack,
    unpack_scaled,
    seen,
    level_sums,
)
