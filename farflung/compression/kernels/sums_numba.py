"""Largest magnitudes and sums of blocks in numba, for `codes`.

A loop over LANES accumulators is the vector that LLVM may not make of a plain sum: it would add in another order.
"""

from __future__ import annotations

import numpy as np

from farflung.compression.kernels import Floats
from farflung.compression.kernels.codes import LANES, Doubles
from farflung.compression.kernels.numba_cpu import jit

SIGN = np.uint32(0x7FFFFFFF)


@jit
def absmax(x_bn: Floats) -> Floats:
    """See `CodeKernels.absmax`. Magnitudes order like their bits, and a maximum of integers vectorises."""
    absmax_b = np.empty(len(x_bn), np.float32)
    bits_b = absmax_b.view(np.uint32)
    for b in range(len(x_bn)):
        bits_n = x_bn[b].view(np.uint32)
        top = np.uint32(0)
        for j in range(len(bits_n)):
            magnitude = np.uint32(bits_n[j] & SIGN)
            top = magnitude if magnitude > top else top
        bits_b[b] = top
    return absmax_b


@jit
def sum_magnitudes(x_bn: Floats) -> Doubles:
    """See `CodeKernels.sum_magnitudes`."""
    blocks, n = x_bn.shape
    total_b = np.zeros(blocks)
    lane_l = np.empty(LANES)
    for b in range(blocks):
        row_n = x_bn[b]
        lane_l[:] = 0
        for first in range(0, n - LANES + 1, LANES):
            for lane in range(LANES):
                lane_l[lane] += np.float64(abs(row_n[first + lane]))
        for lane in range(n % LANES):
            lane_l[lane] += np.float64(abs(row_n[n - n % LANES + lane]))
        for lane in range(LANES):
            total_b[b] += lane_l[lane]
    return total_b


@jit
def sum_squares(x_bn: Floats, shift_b: Doubles) -> Doubles:
    """See `CodeKernels.sum_squares`."""
    blocks, n = x_bn.shape
    total_b = np.zeros(blocks)
    lane_l = np.empty(LANES)
    for b in range(blocks):
        row_n, shift = x_bn[b], shift_b[b]
        lane_l[:] = 0
        for first in range(0, n - LANES + 1, LANES):
            for lane in range(LANES):
                away = np.float64(row_n[first + lane]) - shift
                lane_l[lane] += away * away
        for lane in range(n % LANES):
            away = np.float64(row_n[n - n % LANES + lane]) - shift
            lane_l[lane] += away * away
        for lane in range(LANES):
            total_b[b] += lane_l[lane]
    return total_b


@jit
def sum_plain(x_bn: Floats) -> Doubles:
    """See `CodeKernels.sum_plain`."""
    blocks, n = x_bn.shape
    total_b = np.zeros(blocks)
    lane_l = np.empty(LANES)
    for b in range(blocks):
        row_n = x_bn[b]
        lane_l[:] = 0
        for first in range(0, n - LANES + 1, LANES):
            for lane in range(LANES):
                lane_l[lane] += np.float64(row_n[first + lane])
        for lane in range(n % LANES):
            lane_l[lane] += np.float64(row_n[n - n % LANES + lane])
        for lane in range(LANES):
            total_b[b] += lane_l[lane]
    return total_b
