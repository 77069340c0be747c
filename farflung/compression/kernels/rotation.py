"""Random signs and Hadamard's butterflies in numba: fp32 additions in one fixed order, no product but the last.

`rotation_reference` does the same in plain numpy. Single-threaded; the GIL is released.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from farflung.compression.kernels.numba_cpu import jit

Floats = NDArray[np.float32]

SHORT = 16
"""Butterflies over fewer coordinates than this go through registers."""


@jit
def mixed(state: np.uint64) -> np.uint64:
    """64 random-looking bits of 64 (the output function of SplitMix64, doi:10.1145/2660193.2660195)."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


@jit
def flip(x_n: Floats, start: int, seed: np.uint64) -> None:
    """Give each coordinate, in place, the sign that the seed has for its position in the vector."""
    bits_n = x_n.view(np.uint32)
    step = np.uint64(0x9E3779B97F4A7C15)
    j, n = 0, len(bits_n)
    while j < n:
        position = start + j
        word = mixed(seed + np.uint64(position >> 6) * step) >> np.uint64(position & 63)
        together_n = bits_n[j : j + min(64 - (position & 63), n - j)]
        for bit in range(len(together_n)):
            together_n[bit] ^= np.uint32((word >> np.uint64(bit)) & np.uint64(1)) << np.uint32(31)
        j += len(together_n)


@jit
def _short_runs(row: Floats) -> None:
    """Butterflies over 1, 2, 4 and 8 coordinates, of every sixteen."""
    for first in range(0, len(row), SHORT):
        for half in (1, 2, 4, 8):
            for left in range(first, first + SHORT, 2 * half):
                for j in range(left, left + half):
                    a, b = row[j], row[j + half]
                    row[j] = a + b
                    row[j + half] = a - b


@jit
def _two_at_once(row: Floats, half: int) -> None:
    """Butterflies over `half` and twice as many coordinates, with one load and store for both."""
    for first in range(0, len(row), 4 * half):
        p, q = row[first : first + half], row[first + half : first + 2 * half]
        r, s = row[first + 2 * half : first + 3 * half], row[first + 3 * half : first + 4 * half]
        for j in range(half):
            a, b, c, d = p[j] + q[j], p[j] - q[j], r[j] + s[j], r[j] - s[j]
            p[j], q[j] = a + c, b + d
            r[j], s[j] = a - c, b - d


@jit
def _one(row: Floats, half: int) -> None:
    for first in range(0, len(row), 2 * half):
        low, high = row[first : first + half], row[first + half : first + 2 * half]
        for j in range(half):
            a, b = low[j], high[j]
            low[j] = a + b
            high[j] = a - b


@jit
def hadamard(x_bn: Floats, scale: np.float32, limit: np.float32) -> None:
    """Each row times the n x n Hadamard matrix (Sylvester's) and the scale, in place, cut at +-limit; n = 2**k."""
    n = x_bn.shape[1]
    for b in range(len(x_bn)):
        row = x_bn[b]
        half = 1
        if n >= SHORT:
            _short_runs(row)
            half = SHORT
        while 2 * half < n:
            _two_at_once(row, half)
            half *= 4
        if half < n:
            _one(row, half)
        for j in range(n):
            value = row[j] * scale
            value = limit if value > limit else value
            row[j] = -limit if value < -limit else value
