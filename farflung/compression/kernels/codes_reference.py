"""The kernels of `codes` in plain numpy: slow, obvious, and what the fast ones are tested against."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from farflung.compression.kernels import Floats, Integers, Octets
from farflung.compression.kernels.codes import (
    CHANCE_BITS,
    LANES,
    NATURAL_TOP_EXPONENT,
    NATURAL_TOP_LEVEL,
    NF4_BOUNDS,
    CodeKernels,
    Doubles,
)

Words = NDArray[np.uint32]


def _summed(term_bn: Doubles) -> Doubles:
    """Lane by lane, then over the lanes; missing entries of the last row add 0."""
    blocks, n = term_bn.shape
    padded_bn = np.pad(term_bn, ((0, 0), (0, -n % LANES)))
    lane_bl = np.zeros((blocks, LANES))
    for row_bl in padded_bn.reshape(blocks, -1, LANES).transpose(1, 0, 2):
        lane_bl += row_bl
    total_b = np.zeros(blocks)
    for lane in range(LANES):
        total_b += lane_bl[:, lane]
    return total_b


def sum_magnitudes(x_bn: Floats) -> Doubles:
    """See `CodeKernels.sum_magnitudes`."""
    return _summed(np.abs(x_bn).astype(np.float64))


def sum_squares(x_bn: Floats, shift_b: Doubles) -> Doubles:
    """See `CodeKernels.sum_squares`."""
    return _summed((x_bn.astype(np.float64) - shift_b[:, None]) ** 2)


def sum_plain(x_bn: Floats) -> Doubles:
    """See `CodeKernels.sum_plain`."""
    return _summed(x_bn.astype(np.float64))


def absmax(x_bn: Floats) -> Floats:
    """See `CodeKernels.absmax`."""
    absmax_b: Floats = np.abs(x_bn).max(1)
    return absmax_b


def fold(code_bn: Any, bits: int, out_br: Octets, header: int) -> None:
    """Pack codes, 8 / bits to a byte, the first ones of the block in the low bits."""
    slots, (blocks, n) = 8 // bits, code_bn.shape
    width = -(-n // slots)
    code_bsw = np.pad(code_bn.astype(np.uint8), ((0, 0), (0, slots * width - n))).reshape(blocks, slots, width)
    shift_s1 = bits * np.arange(slots, dtype=np.uint8)[:, None]
    out_br[:, header : header + width] = np.bitwise_or.reduce(code_bsw << shift_s1, axis=1)


def unfold(records_br: Octets, header: int, bits: int, n: int) -> tuple[Octets, Octets]:
    """The inverse of `fold`: the codes, and those past the end."""
    slots = 8 // bits
    byte_bw = records_br[:, header : header + -(-n // slots)]
    code_bsw = byte_bw[:, None, :] >> (bits * np.arange(slots, dtype=np.uint8)[:, None]) & np.uint8((1 << bits) - 1)
    code_bn = code_bsw.reshape(len(records_br), -1)
    return code_bn[:, :n], code_bn[:, n:]


def _parts(x_bn: Floats, scale_b: Floats) -> Floats:
    divisor_b = np.where(scale_b > 0, scale_b, np.float32(1)).astype(np.float32)
    part_bn: Floats = x_bn / divisor_b[:, None]
    return part_bn


def sign_pack(x_bn: Floats, scale_b: Floats, out_br: Octets, header: int) -> None:
    """See `CodeKernels.sign_pack`."""
    fold((x_bn < 0) & (scale_b > 0)[:, None], 1, out_br, header)


def e3m0_pack(x_bn: Floats, scale_b: Floats, out_br: Octets, header: int) -> None:
    """See `CodeKernels.e3m0_pack`. The nearest of 0, 1/64, 1/32, ..., 1; halfway, the larger magnitude."""
    part_bn = np.abs(_parts(x_bn, scale_b))
    level_bn = (part_bn >= np.float32(2.0**-7)).astype(np.uint8)
    for e in range(-6, 0):
        level_bn += part_bn >= np.float32(1.5 * 2.0**e)
    level_bn[scale_b == 0] = 0
    fold(level_bn + 8 * ((x_bn < 0) & (level_bn > 0)), 4, out_br, header)


def nf4_pack(x_bn: Floats, scale_b: Floats, out_br: Octets, header: int) -> None:
    """See `CodeKernels.nf4_pack`."""
    part_bn = np.where(scale_b[:, None] > 0, _parts(x_bn, scale_b), np.float32(0))
    fold(np.searchsorted(NF4_BOUNDS, part_bn, side="right"), 4, out_br, header)


def dice(start: int, salt: int, shape: tuple[int, ...]) -> Words:
    """32 random-looking bits for each coordinate from `start` on: a counter, keyed and mixed twice."""
    with np.errstate(over="ignore"):
        word: Words = np.arange(start, start + int(np.prod(shape)), dtype=np.uint64).astype(np.uint32)
        word = word * np.uint32(0x9E3779B1) + np.uint32(salt & 0xFFFFFFFF)
        word = (word ^ word >> np.uint32(16)) * np.uint32(0x7FEB352D) ^ np.uint32(salt >> 32)
        word = (word ^ word >> np.uint32(15)) * np.uint32(0x846CA68B)
        word = (word ^ word >> np.uint32(16)) * np.uint32(0x2C1B3C6D)
        return (word ^ word >> np.uint32(15)).reshape(shape)


def steps_pack(
    x_bn: Floats, step_b: Floats, levels: int, bits: int, start: int, salt: int, out_br: Octets, header: int
) -> None:
    """See `CodeKernels.steps_pack`."""
    height_bn = np.minimum(np.abs(_parts(x_bn, step_b)), np.float32(levels))
    level_bn = height_bn.astype(np.int32)
    chance_bn = ((height_bn - level_bn.astype(np.float32)) * np.float32(1 << CHANCE_BITS)).astype(np.int32)
    level_bn += (dice(start, salt, x_bn.shape) >> np.uint32(32 - CHANCE_BITS)).astype(np.int32) < chance_bn
    level_bn[step_b == 0] = 0
    fold(level_bn + (1 << bits - 1) * ((x_bn < 0) & (level_bn > 0)), bits, out_br, header)


def natural_pack(x_bn: Floats, start: int, salt: int, out_br: Octets) -> None:
    """See `CodeKernels.natural_pack`."""
    magnitude_bn = np.minimum(np.abs(x_bn), np.float32(NATURAL_TOP_LEVEL))
    bits_bn = magnitude_bn.view(np.uint32)
    exponent_bn = bits_bn >> np.uint32(23)
    below = np.float32(1 << 19)
    last_bn = (magnitude_bn - below) * np.float32(2**23 / (NATURAL_TOP_LEVEL - 2**19))
    chance_bn = np.where(exponent_bn == NATURAL_TOP_EXPONENT, last_bn, 0).astype(np.uint32)
    chance_bn = np.where(exponent_bn == NATURAL_TOP_EXPONENT, chance_bn, bits_bn & np.uint32(0x7FFFFF))
    exponent_bn = exponent_bn + (dice(start, salt, x_bn.shape) >> np.uint32(9) < chance_bn)
    fold((x_bn < 0) & (exponent_bn > 0), 1, out_br, 0)
    fold(exponent_bn, 8, out_br, -(-x_bn.shape[1] // 8))


def bins(x_bn: Floats, shift_b: Doubles, per_unit_b: Doubles, levels: int) -> tuple[Octets, Doubles, Integers]:
    """See `CodeKernels.bins`."""
    blocks, n = x_bn.shape
    place_bn = np.rint((x_bn.astype(np.float64) - shift_b[:, None]) * per_unit_b[:, None] + levels / 2)
    bin_bn = np.clip(place_bn, 0, levels - 1).astype(np.int64)
    lane_n = np.arange(n) % 8
    cell_bn = (np.arange(blocks)[:, None] * 8 + lane_n) * levels + bin_bn
    sum_b8l = np.bincount(cell_bn.ravel(), x_bn.ravel(), 8 * blocks * levels).reshape(blocks, 8, levels)
    count_bl = np.bincount(cell_bn.ravel(), minlength=8 * blocks * levels).reshape(blocks, 8, levels).sum(1)
    sum_bl = np.zeros((blocks, levels))
    for lane in range(8):
        sum_bl += sum_b8l[:, lane]
    return bin_bn.astype(np.uint8), sum_bl, count_bl


def ranked_pack(bin_bn: Octets, rank_bl: Octets, bits: int, out_br: Octets, header: int) -> None:
    """See `CodeKernels.ranked_pack`."""
    fold(np.take_along_axis(rank_bl, bin_bn.astype(np.int64), 1), bits, out_br, header)


def unpack(records_br: Octets, header: int, bits: int, table_bl: Floats, out_bn: Floats) -> None:
    """See `CodeKernels.unpack`."""
    code_bn = unfold(records_br, header, bits, out_bn.shape[1])[0]
    out_bn[:] = np.take_along_axis(table_bl, code_bn.astype(np.int64), 1)


def unpack_scaled(records_br: Octets, header: int, bits: int, value_l: Floats, scale_b: Floats, out_bn: Floats) -> None:
    """See `CodeKernels.unpack_scaled`."""
    out_bn[:] = value_l[unfold(records_br, header, bits, out_bn.shape[1])[0]] * scale_b[:, None]


def seen(records_br: Octets, header: int, bits: int, n: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """See `CodeKernels.seen`."""
    code_bn, past_bp = unfold(records_br, header, bits, n)
    seen_bl = np.zeros((len(records_br), 1 << bits), np.bool_)
    np.put_along_axis(seen_bl, code_bn.astype(np.int64), True, 1)
    stray_b: NDArray[np.bool_] = past_bp.max(1, initial=0) > 0
    return seen_bl, stray_b


def level_sums(records_br: Octets, header: int, bits: int, n: int) -> tuple[Integers, Integers, Integers]:
    """See `CodeKernels.level_sums`."""
    level_bn = unfold(records_br, header, bits, n)[0].astype(np.int64) & ((1 << bits - 1) - 1)
    return (level_bn > 0).sum(1), level_bn.sum(1), (level_bn**2).sum(1)


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
