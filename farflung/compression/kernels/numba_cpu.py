"""The kernels in numba, written so that LLVM vectorises them without reassociating a float.

Neither fastmath nor threads: numba's worker pool may not be entered from two threads, and windows are the unit of work.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import numba
import numpy as np
from numpy.typing import NDArray

from farflung.compression.kernels import LEVEL_MAX, REFINEMENTS, Floats, Integers, Kernels, Levels, Octets, Split

P = ParamSpec("P")
R = TypeVar("R")

ROUND = np.float32(1.5 * 2**23)
"""Adding this rounds a small float to an even integer and leaves that integer in the low bits of the sum."""

LEVEL_SCALE = np.float32(LEVEL_MAX)


def jit(function: Callable[P, R]) -> Callable[P, R]:
    """Compile on first call, release the GIL; IEEE division, no fast maths. Keeps machine code on disk where it may."""
    compiled: Callable[P, R]
    try:
        compiled = numba.njit(nogil=True, cache=True, error_model="numpy")(function)
    except RuntimeError:  # neither the package's folder nor the user's cache can be written
        compiled = numba.njit(nogil=True, error_model="numpy")(function)
    return compiled


@jit
def int8_pack(x_bn: Floats, scale_b: Floats, out_br: Octets) -> None:
    """See `Kernels.int8_pack`."""
    blocks, n = x_bn.shape
    shifted_n = np.empty(n, np.float32)
    bits_n = shifted_n.view(np.uint32)
    top = np.float32(127)
    for b in range(blocks):
        scale, row_n, out_n = scale_b[b], x_bn[b], out_br[b, 4:]
        if scale == 0:
            out_n[:] = 0
            continue
        for j in range(n):
            step = row_n[j] / scale
            step = top if step > top else step
            step = -top if step < -top else step
            shifted_n[j] = step + ROUND
        for j in range(n):
            out_n[j] = bits_n[j]


@jit
def int8_unpack(records_br: Octets, scale_b: Floats, out_bn: Floats) -> None:
    """See `Kernels.int8_unpack`."""
    blocks, n = out_bn.shape
    signed_br = records_br.view(np.int8)
    for b in range(blocks):
        scale, row_n, step_n = scale_b[b], out_bn[b], signed_br[b, 4:]
        for j in range(n):
            row_n[j] = np.float32(step_n[j]) * scale


@jit
def _measure(x_bn: Floats, absmax_b: Floats, level_bn: Levels, found_4b: Integers) -> None:
    blocks, n = x_bn.shape
    for b in range(blocks):
        row_n, level_n = x_bn[b], level_bn[b]
        absmax = absmax_b[b] if absmax_b[b] > 0 else np.float32(1)
        total = 0
        for j in range(n):
            level_n[j] = np.int32(abs(row_n[j]) / absmax * LEVEL_SCALE)
            total += level_n[j]
        threshold = min(total * 5 // (4 * n) + 1, LEVEL_MAX)
        high_sum, high_count = 0, 0
        for step in range(REFINEMENTS + 1):
            high_sum, high_count = 0, 0
            limit = np.int32(threshold)
            for j in range(n):
                high_sum += level_n[j] if level_n[j] >= limit else 0
                high_count += 1 if level_n[j] >= limit else 0
            if step < REFINEMENTS and 0 < high_count < n:
                threshold = ((total - high_sum) // (n - high_count) + high_sum // high_count + 1) // 2
        found_4b[0, b], found_4b[1, b], found_4b[2, b], found_4b[3, b] = threshold, total, high_sum, high_count


def q2_measure(x_bn: Floats, absmax_b: Floats) -> Split:
    """See `Kernels.q2_measure`."""
    level_bn = np.empty(x_bn.shape, np.int32)
    found_4b = np.empty((4, len(x_bn)), np.int64)
    _measure(x_bn, absmax_b, level_bn, found_4b)
    return Split(level_bn, *found_4b)


@jit
def q2_pack(
    x_bn: Floats, level_bn: Levels, threshold_b: Integers, low_is_zero_b: NDArray[np.bool_], out_br: Octets
) -> None:
    """See `Kernels.q2_pack`."""
    blocks, n = x_bn.shape
    quarter = out_br.shape[1] - 4
    zero = np.float32(0)
    for b in range(blocks):
        limit, out_q, row_n, level_n = np.int32(threshold_b[b]), out_br[b, 4:], x_bn[b], level_bn[b]
        signs = np.uint8(0 if low_is_zero_b[b] else 2)
        out_q[:] = 0
        for slot in range(4):
            first = min(slot * quarter, n)
            part_q, part_level_q = row_n[first : first + quarter], level_n[first : first + quarter]
            shift = np.uint8(2 * slot)
            for j in range(len(part_q)):
                high = part_level_q[j] >= limit
                sign = np.uint8(2) if high else signs
                code = (sign if part_q[j] < zero else np.uint8(0)) | np.uint8(high)
                out_q[j] |= np.uint8(code << shift)


@jit
def q2_unpack(records_br: Octets, low_b: Floats, high_b: Floats, out_bn: Floats) -> None:
    """See `Kernels.q2_unpack`."""
    blocks, n = out_bn.shape
    quarter = records_br.shape[1] - 4
    for b in range(blocks):
        low, high, byte_q, row_n = low_b[b], high_b[b], records_br[b, 4:], out_bn[b]
        for slot in range(4):
            first = min(slot * quarter, n)
            part_q = row_n[first : first + quarter]
            is_high, is_negative = np.uint8(1 << (2 * slot)), np.uint8(2 << (2 * slot))
            for j in range(len(part_q)):
                magnitude = high if byte_q[j] & is_high else low
                part_q[j] = -magnitude if byte_q[j] & is_negative else magnitude


@jit
def _kth_magnitude(bits_n: NDArray[np.uint32], k: int, count_h: Levels) -> tuple[int, int]:
    """The k-th largest of 31-bit numbers, and how many equal ones are among the k: radix digits of 11, 10, 10 bits."""
    found, left = 0, k
    for shift, width in ((20, 11), (10, 10), (0, 10)):
        count_h[: 1 << width] = 0
        mask = (1 << width) - 1
        for j in range(len(bits_n)):
            magnitude = np.int64(bits_n[j] & np.uint32(0x7FFFFFFF))
            if magnitude >> (shift + width) == found:
                count_h[(magnitude >> shift) & mask] += 1
        digit = mask
        while count_h[digit] < left:
            left -= count_h[digit]
            digit -= 1
        found = (found << width) | digit
    return found, left


@jit
def topk_select(x_bn: Floats, k: int) -> Integers:
    """See `Kernels.topk_select`."""
    blocks, n = x_bn.shape
    index_bk = np.empty((blocks, k), np.int64)
    count_h = np.empty(1 << 11, np.int32)
    for b in range(blocks):
        bits_n = x_bn[b].view(np.uint32)
        kth, ties = _kth_magnitude(bits_n, k, count_h)
        position = 0
        for j in range(n):
            magnitude = np.int64(bits_n[j] & np.uint32(0x7FFFFFFF))
            if magnitude > kth or (magnitude == kth and ties > 0):
                ties -= magnitude == kth
                index_bk[b, position] = j
                position += 1
    return index_bk


KERNELS = Kernels(int8_pack, int8_unpack, q2_measure, q2_pack, q2_unpack, topk_select)
