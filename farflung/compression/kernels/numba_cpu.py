"""The kernels in numba: the formats of one scale, and the table of all kernels.

Loops index whole arrays, x_bn[b, j]: making a slice costs as much as a short block. Every block is read twice while it
is in the L1 cache, first for its scale, then for its codes; magnitudes are compared as the bits of their fp32. A loop
that stores to two places of one array is not vectorised, so each slot of a byte is decoded by a loop of its own.
"""

from __future__ import annotations

import numpy as np

from farflung.compression.kernels import (
    INT8_SCALE_MAX,
    NARROW,
    PAST_END,
    SCALE,
    SCALE_MAX_BITS,
    UNSETTLED,
    UNUSED_CODE,
    WILD,
    Floats,
    Kernels,
    Octets,
    Packing,
)
from farflung.compression.kernels.numba_base import (
    BF16_LARGEST,
    INFINITE,
    KINDS,
    LARGEST,
    MAGNITUDE,
    ROUND,
    SMALLEST,
    Number,
    Words,
    bf16_bits,
    code_of,
    jit,
    larger,
    signed,
    smaller,
    top_of,
)
from farflung.compression.kernels.numba_q2 import q2_read, q2_write
from farflung.compression.kernels.numba_vectors import carry, square_sum, take_away, top_bits, topk_select

__all__ = ["KERNELS", "jit"]

INT4_SCALE_MAX, INT2_SCALE_MAX = np.int32(SCALE_MAX_BITS[4]), np.int32(SCALE_MAX_BITS[2])


@jit
def fp32_write(x_bn: Floats, out_br: Octets) -> int:
    """See `Packing.write`."""
    bits_bn, out_bn = x_bn.view(np.int32), out_br.view(np.int32)
    for b in range(len(x_bn)):
        top = np.int32(0)
        for j in range(x_bn.shape[1]):
            magnitude = np.int32(bits_bn[b, j] & MAGNITUDE)
            top = magnitude if magnitude > top else top
            out_bn[b, j] = min(magnitude, LARGEST) | (bits_bn[b, j] & ~MAGNITUDE)
        if top >= INFINITE:
            return b
    return -1


@jit
def fp32_read(records_br: Octets, out_bn: Floats) -> int:
    """See `Packing.read`."""
    bits_bn, to_bn = records_br.view(np.int32), out_bn.view(np.int32)
    for b in range(len(out_bn)):
        top = np.int32(0)
        for j in range(out_bn.shape[1]):
            magnitude = np.int32(bits_bn[b, j] & MAGNITUDE)
            top = magnitude if magnitude > top else top
            to_bn[b, j] = bits_bn[b, j]
        if top > LARGEST:
            return b * KINDS + WILD
    return -1


@jit
def bf16_write(x_bn: Floats, out_br: Octets) -> int:
    """See `Packing.write`."""
    bits_bn, out_bn = x_bn.view(np.int32), out_br.view(np.int16)
    for b in range(len(x_bn)):
        top = np.int32(0)
        for j in range(x_bn.shape[1]):
            magnitude = np.int32(bits_bn[b, j] & MAGNITUDE)
            top = magnitude if magnitude > top else top
            rounded = bf16_bits(min(magnitude, LARGEST)) | (bits_bn[b, j] >> np.int32(16) & np.int32(0x8000))
            out_bn[b, j] = rounded
        if top >= INFINITE:
            return b
    return -1


@jit
def bf16_read(records_br: Octets, out_bn: Floats) -> int:
    """See `Packing.read`."""
    bits_bn, to_bn = records_br.view(np.uint16), out_bn.view(np.uint32)
    for b in range(len(out_bn)):
        top = np.uint32(0)
        for j in range(out_bn.shape[1]):
            bits = np.uint32(bits_bn[b, j])
            magnitude = np.uint32(bits & np.uint32(0x7FFF))
            top = magnitude if magnitude > top else top
            to_bn[b, j] = np.uint32(bits << np.uint32(16))
        if top > BF16_LARGEST:
            return b * KINDS + WILD
    return -1


@jit
def int8_write(x_bn: Floats, out_br: Octets) -> int:
    """See `Packing.write`."""
    blocks, n = x_bn.shape
    bits_bn = x_bn.view(np.int32)
    cell_1 = np.empty(1, np.int32)
    float_1 = cell_1.view(np.float32)
    widest = np.float32(127)
    for b in range(blocks):
        cell_1[0] = top_of(bits_bn, b)
        if cell_1[0] >= INFINITE:
            return b
        float_1[0] = min(float_1[0] / widest, INT8_SCALE_MAX)
        if cell_1[0] < SMALLEST:
            out_br[b] = 0
            continue
        scale = float_1[0] * widest / widest
        float_1[0] = scale
        for place in range(4):
            out_br[b, place] = np.uint8(cell_1[0] >> np.int32(8 * place))
        for j in range(n):
            step = x_bn[b, j] / scale
            step = widest if step > widest else step
            step = -widest if step < -widest else step
            out_br[b, 4 + j] = np.uint8(np.int32((step + ROUND) - ROUND))
    return -1


@jit
def int8_read(records_br: Octets, out_bn: Floats) -> int:
    """See `Packing.read`."""
    blocks, n = out_bn.shape
    step_br = records_br.view(np.int8)
    cell_1 = np.empty(1, np.int32)
    float_1 = cell_1.view(np.float32)
    widest = np.float32(127)
    for b in range(blocks):
        bits = np.int32(0)
        for place in range(4):
            bits |= np.int32(records_br[b, place]) << np.int32(8 * place)
        cell_1[0] = bits
        bits, scale = cell_1[0], float_1[0]  # back from 64 bits
        if bits != 0 and not (bits >= SMALLEST and scale <= INT8_SCALE_MAX):
            return b * KINDS + SCALE
        if scale * widest / widest != scale:
            return b * KINDS + UNSETTLED
        top, bottom = np.int8(0), np.int8(0)
        for j in range(n):
            step = step_br[b, 4 + j]
            top, bottom = step if step > top else top, step if step < bottom else bottom
        if bottom == -128:
            return b * KINDS + UNUSED_CODE
        if max(np.int32(top), -np.int32(bottom)) != (127 if bits else 0):
            return b * KINDS + NARROW
        for j in range(n):
            out_bn[b, j] = np.float32(step_br[b, 4 + j]) * scale
    return -1


@jit
def _packed_scale(top: Number, widest: Number, scale_max: Number, cell_1: Words, out_br: Octets, b: int) -> Number:
    """1 / the bf16 scale of block b, after the scale is written; 0 if it is too small. `cell_1` is scratch."""
    float_1 = cell_1.view(np.float32)
    cell_1[0] = top
    float_1[0] = float_1[0] / widest
    scale_bits = min(bf16_bits(cell_1[0]), scale_max)
    cell_1[0] = scale_bits << 16
    if cell_1[0] < SMALLEST:
        return np.float32(0)
    out_br[b, 0], out_br[b, 1] = np.uint8(scale_bits & 255), np.uint8(scale_bits >> 8)
    return np.float32(1) / float_1[0]


@jit
def int4_write(x_bn: Floats, out_br: Octets) -> int:
    """See `Packing.write`."""
    blocks, n = x_bn.shape
    half = out_br.shape[1] - 2
    bits_bn, cell_1 = x_bn.view(np.int32), np.empty(1, np.int32)
    widest, mask = np.float32(7), np.int32(15)
    for b in range(blocks):
        top = top_of(bits_bn, b)
        if top >= INFINITE:
            return b
        inverse = _packed_scale(top, widest, INT4_SCALE_MAX, cell_1, out_br, b)
        if inverse == 0:
            out_br[b] = 0
            continue
        for j in range(n - half):
            low = code_of(x_bn[b, j], inverse, widest, mask)
            high = np.int32(code_of(x_bn[b, half + j], inverse, widest, mask) << 4)
            out_br[b, 2 + j] = np.uint8(np.int32(low | high))
        for j in range(n - half, half):
            out_br[b, 2 + j] = np.uint8(code_of(x_bn[b, j], inverse, widest, mask))
    return -1


@jit
def int2_write(x_bn: Floats, out_br: Octets) -> int:
    """See `Packing.write`."""
    blocks, n = x_bn.shape
    share = out_br.shape[1] - 2
    bits_bn, cell_1 = x_bn.view(np.int32), np.empty(1, np.int32)
    widest, mask, full = np.float32(1), np.int32(3), max(n - 3 * share, 0)
    for b in range(blocks):
        top = top_of(bits_bn, b)
        if top >= INFINITE:
            return b
        inverse = _packed_scale(top, widest, INT2_SCALE_MAX, cell_1, out_br, b)
        if inverse == 0:
            out_br[b] = 0
            continue
        for j in range(full):
            one = code_of(x_bn[b, j], inverse, widest, mask)
            two = np.int32(code_of(x_bn[b, share + j], inverse, widest, mask) << 2)
            three = np.int32(code_of(x_bn[b, 2 * share + j], inverse, widest, mask) << 4)
            four = np.int32(code_of(x_bn[b, 3 * share + j], inverse, widest, mask) << 6)
            out_br[b, 2 + j] = np.uint8(np.int32(one | two | three | four))
        for j in range(full, share):
            out_br[b, 2 + j] = 0
            for place in range(j, n, share):
                code = code_of(x_bn[b, place], inverse, widest, mask)
                out_br[b, 2 + j] |= np.uint8(code << np.int32(place // share * 2))
    return -1


@jit
def _packed_fault(scale_bits: Number, scale_max: Number, top: Number, bottom: Number, past: Number, widest: int) -> int:
    """What is wrong with a record of these extremes; -1 for nothing."""
    if scale_bits != 0 and not 0x80 <= scale_bits <= scale_max:
        return SCALE
    if past:
        return PAST_END
    if bottom < -widest:
        return UNUSED_CODE
    return NARROW if max(top, -bottom) != (widest if scale_bits else 0) else -1


@jit
def int4_read(records_br: Octets, out_bn: Floats) -> int:
    """See `Packing.read`."""
    blocks, n = out_bn.shape
    half = records_br.shape[1] - 2
    cell_1 = np.empty(1, np.int32)
    float_1 = cell_1.view(np.float32)
    for b in range(blocks):
        scale_bits = np.int32(records_br[b, 0]) | np.int32(records_br[b, 1]) << np.int32(8)
        cell_1[0] = scale_bits << 16
        scale = float_1[0]
        top, bottom, past = np.int32(0), np.int32(0), np.uint8(0)
        for j in range(half):
            byte = np.int32(records_br[b, 2 + j])
            low, high = signed(byte & 15, 8), signed(byte >> 4, 8)
            top, bottom = larger(top, larger(low, high)), smaller(bottom, smaller(low, high))
        for j in range(n - half):
            out_bn[b, half + j] = np.float32(signed(np.int32(records_br[b, 2 + j]) >> 4, 8)) * scale
        for j in range(half):
            out_bn[b, j] = np.float32(signed(np.int32(records_br[b, 2 + j]) & 15, 8)) * scale
        for j in range(n - half, half):
            past = records_br[b, 2 + j] & np.uint8(0xF0)
        fault = _packed_fault(scale_bits, INT4_SCALE_MAX, top, bottom, past, 7)
        if fault >= 0:
            return b * KINDS + fault
    return -1


@jit
def int2_read(records_br: Octets, out_bn: Floats) -> int:
    """See `Packing.read`."""
    blocks, n = out_bn.shape
    share = records_br.shape[1] - 2
    cell_1 = np.empty(1, np.int32)
    float_1 = cell_1.view(np.float32)
    full = max(n - 3 * share, 0)
    for b in range(blocks):
        scale_bits = np.int32(records_br[b, 0]) | np.int32(records_br[b, 1]) << np.int32(8)
        cell_1[0] = scale_bits << 16
        scale = float_1[0]
        top, bottom, past = np.int32(0), np.int32(0), np.int32(0)
        for j in range(share):
            byte = np.int32(records_br[b, 2 + j])
            one, two = signed(byte & 3, 2), signed(byte >> 2 & 3, 2)
            three, four = signed(byte >> 4 & 3, 2), signed(byte >> 6, 2)
            top = larger(top, larger(larger(one, two), larger(three, four)))
            bottom = smaller(bottom, smaller(smaller(one, two), smaller(three, four)))
        for j in range(full):
            out_bn[b, j] = np.float32(signed(np.int32(records_br[b, 2 + j]) & 3, 2)) * scale
        for j in range(full):
            out_bn[b, share + j] = np.float32(signed(np.int32(records_br[b, 2 + j]) >> 2 & 3, 2)) * scale
        for j in range(full):
            out_bn[b, 2 * share + j] = np.float32(signed(np.int32(records_br[b, 2 + j]) >> 4 & 3, 2)) * scale
        for j in range(full):
            out_bn[b, 3 * share + j] = np.float32(signed(np.int32(records_br[b, 2 + j]) >> 6, 2)) * scale
        for j in range(full, share):
            for slot in range(4):
                code, place = np.int32(records_br[b, 2 + j]) >> (2 * slot) & 3, slot * share + j
                if place < n:
                    out_bn[b, place] = np.float32(signed(code, 2)) * scale
                else:
                    past |= code
        fault = _packed_fault(scale_bits, INT2_SCALE_MAX, top, bottom, past, 1)
        if fault >= 0:
            return b * KINDS + fault
    return -1


KERNELS = Kernels(
    fp32=Packing(fp32_write, fp32_read),
    bf16=Packing(bf16_write, bf16_read),
    int8=Packing(int8_write, int8_read),
    int4=Packing(int4_write, int4_read),
    int2=Packing(int2_write, int2_read),
    q2=Packing(q2_write, q2_read),
    carry=carry,
    take_away=take_away,
    top_bits=top_bits,
    square_sum=square_sum,
    topk_select=topk_select,
)
