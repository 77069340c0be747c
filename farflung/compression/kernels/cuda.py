"""The kernels in Triton, for updates that live on an NVIDIA or AMD GPU. Same bytes as on the CPU.

Triton comes with torch's CUDA builds; nothing here is imported without a GPU. Divisions are IEEE (`div_rn`), fused
multiply-adds are off, sums are of integers: so records are equal byte for byte, not only nearly. One program works on
one block of coordinates, whole blocks only; the caller does the short last block on the CPU.

TRITON_INTERPRET=1 runs them without a GPU, slowly: that is how they are tested where there is none.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from farflung.compression.kernels import BF16_ABS_MAX_BITS, INT8_SCALE_MAX, REFINEMENTS, SCALE_MAX_BITS

FORMATS = {"int8": 8, "int4": 4, "int2": 2, "q2": 2}
"""Bits of a code."""

HEADER_BYTES = {"int8": 4, "int4": 2, "int2": 2, "q2": 4}

BLOCK_MIN = 16
"""Coordinates of the smallest block; the kernels work on powers of two."""

NORMAL_MIN, NORMAL_MIN_BITS = 2.0**-126, 0x0080
BF16_ABS_MAX = float(torch.tensor(BF16_ABS_MAX_BITS << 16, dtype=torch.int32).view(torch.float32))

ROUND = tl.constexpr(12582912.0)
"""1.5 x 2**23: adding it rounds a small fp32 to an even integer, subtracting it gives that integer back."""

LEVEL_SCALE = tl.constexpr(1048576.0)
LEVEL_TOP = tl.constexpr(1 << 20)


@triton.jit
def _byte_store(start, word, count: tl.constexpr):
    """The low bytes of a 32-bit word, little-endian, at any address."""
    for i in tl.static_range(count):
        tl.store(start + i, ((word >> (8 * i)) & 0xFF).to(tl.uint8))


@triton.jit
def _byte_load(start, count: tl.constexpr):
    word = tl.load(start).to(tl.uint32)
    for i in tl.static_range(1, count):
        word |= tl.load(start + i).to(tl.uint32) << (8 * i)
    return word


@triton.jit
def _bf16_bits(x):
    """Nearest bf16, ties to even, of a finite fp32, as its bits."""
    word = x.to(tl.uint32, bitcast=True)
    return (word + (0x7FFF + ((word >> 16) & 1))) >> 16


@triton.jit
def _absmax(x_ptr, row, lane, block: tl.constexpr, slots: tl.constexpr):
    """Largest magnitude of a block that is read in `slots` runs."""
    run: tl.constexpr = block // slots
    largest = 0.0
    for slot in tl.static_range(slots):
        largest = tl.maximum(largest, tl.max(tl.abs(tl.load(x_ptr + row * block + slot * run + lane))))
    return largest


@triton.jit
def _int8_encode(x_ptr, out_ptr, scale_max, normal_min, block: tl.constexpr):
    """Blockwise absmax with an fp32 scale; see formats.dense.int8."""
    record: tl.constexpr = 4 + block
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, block)
    scale = tl.minimum(tl.div_rn(_absmax(x_ptr, row, lane, block, 1), 127.0), scale_max)
    scale = tl.where(scale < normal_min, 0.0, tl.div_rn(scale * 127.0, 127.0))
    _byte_store(out_ptr + row * record, scale.to(tl.uint32, bitcast=True), 4)
    step = tl.div_rn(tl.load(x_ptr + row * block + lane), tl.where(scale > 0, scale, 1.0))
    step = tl.minimum(tl.maximum(step, -127.0), 127.0)
    code = tl.where(scale > 0, (step + ROUND) - ROUND, 0.0).to(tl.int32)
    tl.store(out_ptr + row * record + 4 + lane, (code & 0xFF).to(tl.uint8))


@triton.jit
def _int8_decode(record_ptr, out_ptr, block: tl.constexpr):
    record: tl.constexpr = 4 + block
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, block)
    scale = _byte_load(record_ptr + row * record, 4).to(tl.float32, bitcast=True)
    code = tl.load(record_ptr + row * record + 4 + lane).to(tl.int8, bitcast=True)
    tl.store(out_ptr + row * block + lane, code.to(tl.float32) * scale)


@triton.jit
def _packed_encode(x_ptr, out_ptr, scale_max_bits, normal_min_bits, block: tl.constexpr, bits: tl.constexpr):
    """Blockwise absmax with a bf16 scale, 8 / bits codes to a byte; see formats.dense.int4."""
    slots: tl.constexpr = 8 // bits
    run: tl.constexpr = block // slots
    record: tl.constexpr = 2 + run
    top: tl.constexpr = (1 << (bits - 1)) - 1
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, run)
    word = _bf16_bits(tl.div_rn(_absmax(x_ptr, row, lane, block, slots), top * 1.0))
    word = tl.minimum(word, scale_max_bits)
    word = tl.where(word < normal_min_bits, 0, word)
    _byte_store(out_ptr + row * record, word, 2)
    scale = (word << 16).to(tl.float32, bitcast=True)
    inverse = tl.div_rn(1.0, tl.where(scale > 0, scale, 1.0))
    packed = tl.zeros([run], tl.uint8)
    for slot in tl.static_range(slots):
        step = tl.load(x_ptr + row * block + slot * run + lane) * inverse
        step = tl.minimum(tl.maximum(step, -top * 1.0), top * 1.0)
        code = tl.where(scale > 0, (step + ROUND) - ROUND, 0.0).to(tl.int32)
        packed |= ((code & ((1 << bits) - 1)) << (bits * slot)).to(tl.uint8)
    tl.store(out_ptr + row * record + 2 + lane, packed)


@triton.jit
def _packed_decode(record_ptr, out_ptr, block: tl.constexpr, bits: tl.constexpr):
    slots: tl.constexpr = 8 // bits
    run: tl.constexpr = block // slots
    record: tl.constexpr = 2 + run
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, run)
    scale = (_byte_load(record_ptr + row * record, 2) << 16).to(tl.float32, bitcast=True)
    packed = tl.load(record_ptr + row * record + 2 + lane).to(tl.int32)
    for slot in tl.static_range(slots):
        code = (packed >> (bits * slot)) & ((1 << bits) - 1)
        code = tl.where(code >= 1 << (bits - 1), code - (1 << bits), code)
        tl.store(out_ptr + row * block + slot * run + lane, code.to(tl.float32) * scale)


@triton.jit
def _levels(x, divisor):
    return (tl.div_rn(tl.abs(x), divisor) * LEVEL_SCALE).to(tl.int32)


@triton.jit
def _q2_encode(x_ptr, out_ptr, abs_max, block: tl.constexpr, refinements: tl.constexpr):
    """Two magnitudes per block by Lloyd's method on integer levels; see formats.dense.q2."""
    run: tl.constexpr = block // 4
    record: tl.constexpr = 4 + run
    row = tl.program_id(0).to(tl.int64)
    whole, lane = tl.arange(0, block), tl.arange(0, run)
    x = tl.load(x_ptr + row * block + whole)
    absmax = tl.max(tl.abs(x))
    divisor = tl.where(absmax > 0, absmax, 1.0)
    level = _levels(x, divisor).to(tl.int64)
    total = tl.sum(level)
    threshold = tl.minimum(total * 5 // (4 * block) + 1, LEVEL_TOP)
    high_sum, high_count = total * 0, total * 0
    for step in tl.static_range(refinements + 1):
        high_sum = tl.sum(tl.where(level >= threshold, level, 0))
        high_count = tl.sum((level >= threshold).to(tl.int64))
        if step < refinements:
            low_count = tl.maximum(block - high_count, 1)
            middle = ((total - high_sum) // low_count + high_sum // tl.maximum(high_count, 1) + 1) // 2
            threshold = tl.where((high_count > 0) & (high_count < block), middle, threshold)
    unit = absmax.to(tl.float64) / 1048576.0
    low = (total - high_sum).to(tl.float64) / tl.maximum(block - high_count, 1).to(tl.float64) * unit
    high = high_sum.to(tl.float64) / tl.maximum(high_count, 1).to(tl.float64) * unit
    low_bits = _bf16_bits(tl.minimum(low, abs_max).to(tl.float32))
    high_bits = _bf16_bits(tl.minimum(high, abs_max).to(tl.float32))
    same = low_bits == high_bits
    threshold = tl.where(high_bits == 0, LEVEL_TOP + 1, tl.where(same, 0, threshold))
    low_bits = tl.where(same, 0, low_bits)
    _byte_store(out_ptr + row * record, low_bits | (high_bits << 16), 4)
    packed = tl.zeros([run], tl.uint8)
    for slot in tl.static_range(4):
        part = tl.load(x_ptr + row * block + slot * run + lane)
        is_high = _levels(part, divisor).to(tl.int64) >= threshold
        negative = (part < 0) & (is_high | (low_bits != 0))
        code = is_high.to(tl.int32) | (negative.to(tl.int32) << 1)
        packed |= (code << (2 * slot)).to(tl.uint8)
    tl.store(out_ptr + row * record + 4 + lane, packed)


@triton.jit
def _q2_decode(record_ptr, out_ptr, block: tl.constexpr):
    run: tl.constexpr = block // 4
    record: tl.constexpr = 4 + run
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, run)
    word = _byte_load(record_ptr + row * record, 4)
    low = (word << 16).to(tl.float32, bitcast=True)
    high = (word & 0xFFFF0000).to(tl.float32, bitcast=True)
    packed = tl.load(record_ptr + row * record + 4 + lane).to(tl.int32)
    for slot in tl.static_range(4):
        code = packed >> (2 * slot)
        magnitude = tl.where((code & 1) > 0, high, low)
        tl.store(out_ptr + row * block + slot * run + lane, tl.where((code & 2) > 0, -magnitude, magnitude))


@triton.jit
def _topk(x_ptr, index_ptr, value_ptr, k, chunk: tl.constexpr):
    """The k largest magnitudes of a chunk, ascending by index; bit by bit towards the k-th magnitude."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, chunk)
    x = tl.load(x_ptr + row * chunk + lane)
    magnitude = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    kth = 0
    for bit in range(31):
        trial = kth | (1 << (30 - bit))
        kth = tl.where(tl.sum((magnitude >= trial).to(tl.int32)) >= k, trial, kth)
    above, equal = magnitude > kth, magnitude == kth
    ties = k - tl.sum(above.to(tl.int32))
    kept = above | (equal & (tl.cumsum(equal.to(tl.int32)) <= ties))
    place = tl.cumsum(kept.to(tl.int32)) - 1
    tl.store(index_ptr + row * k + place, lane, mask=kept)
    tl.store(value_ptr + row * k + place, x, mask=kept)


def records(name: str, x_bn: Tensor) -> Tensor:
    """Records [b, r] uint8 of whole blocks [b, n] fp32 in one of FORMATS, byte for byte as `formats.dense` writes them.

    Entries must be finite; n is a power of two. One read of the input from memory, a second one from cache.
    """
    b, n = x_bn.shape
    out = torch.empty((b, record_bytes(name, n)), dtype=torch.uint8, device=x_bn.device)
    match name:
        case "int8":
            _int8_encode[(b,)](x_bn, out, float(INT8_SCALE_MAX), NORMAL_MIN, n, **OPTIONS)
        case "q2":
            _q2_encode[(b,)](x_bn, out, BF16_ABS_MAX, n, REFINEMENTS, **OPTIONS)
        case _:
            bits = FORMATS[name]
            _packed_encode[(b,)](x_bn, out, SCALE_MAX_BITS[bits], NORMAL_MIN_BITS, n, bits, **OPTIONS)
    return out


def values(name: str, record_br: Tensor, n: int) -> Tensor:
    """Values [b, n] fp32 of such records, which must have been checked. Bit-equal to the CPU's."""
    b = len(record_br)
    out = torch.empty((b, n), device=record_br.device)
    match name:
        case "int8":
            _int8_decode[(b,)](record_br, out, n, **OPTIONS)
        case "q2":
            _q2_decode[(b,)](record_br, out, n, **OPTIONS)
        case _:
            _packed_decode[(b,)](record_br, out, n, FORMATS[name], **OPTIONS)
    return out


def record_bytes(name: str, n: int) -> int:
    """Length of the record of a block of n coordinates, n a power of two."""
    return HEADER_BYTES[name] + n * FORMATS[name] // 8


def topk_kept(x_bn: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(index_bk int32 ascending, value_bk fp32): the k largest magnitudes of each chunk, the lowest index of equals."""
    b, n = x_bn.shape
    index_bk = torch.empty((b, k), dtype=torch.int32, device=x_bn.device)
    value_bk = torch.empty((b, k), device=x_bn.device)
    _topk[(b,)](x_bn, index_bk, value_bk, k, n, **OPTIONS)
    return index_bk, value_bk


OPTIONS = {"enable_fp_fusion": False, "num_warps": 4}
