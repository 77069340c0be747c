"""Small steps on vectors in numba, and the selection of the largest."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from farflung.compression.kernels import LANES, Floats, Integers
from farflung.compression.kernels.numba_base import MAGNITUDE, Words, jit


@jit
def carry(error_d: Floats, update_d: Floats, beta: np.float32) -> None:
    """See `Kernels.carry`."""
    for j in range(len(error_d)):
        error_d[j] = beta * error_d[j] + update_d[j]


@jit
def take_away(x_d: Floats, index_k: Integers, value_k: Floats) -> None:
    """See `Kernels.take_away`."""
    for k in range(len(index_k)):
        x_d[index_k[k]] -= value_k[k]


@jit
def top_bits(x_d: Floats) -> int:
    """See `Kernels.top_bits`."""
    bits_d = x_d.view(np.int32)
    top = np.int32(0)
    for j in range(len(bits_d)):
        magnitude = np.int32(bits_d[j] & MAGNITUDE)
        top = magnitude if magnitude > top else top
    return int(top)


@jit
def square_sum(x_d: Floats) -> float:
    """See `Kernels.square_sum`."""
    lane_l = np.zeros(LANES, np.float64)
    whole = len(x_d) // LANES * LANES
    for first in range(0, whole, LANES):
        for lane in range(LANES):
            lane_l[lane] += np.float64(x_d[first + lane]) * np.float64(x_d[first + lane])
    for j in range(whole, len(x_d)):
        lane_l[j - whole] += np.float64(x_d[j]) * np.float64(x_d[j])
    total = 0.0
    for lane in range(LANES):
        total += lane_l[lane]
    return total


@jit
def _kth_magnitude(bits_n: NDArray[np.uint32], k: int, count_h: Words) -> tuple[int, int]:
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
