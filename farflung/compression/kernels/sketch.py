"""Count sketch in numba: fp64 cells, coordinates added in ascending order.

A coordinate's place in a row of cells is a hash of (seed, row, position): bits 32 to 63 choose the cell, bit 0 the
sign.
`sketch_reference` does the same in plain numpy. Single-threaded; the GIL is released.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from farflung.compression.kernels.numba_cpu import jit
from farflung.compression.kernels.rotation import mixed

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

STEP = np.uint64(0x9E3779B97F4A7C15)
ROW_STEP = np.uint64(0xD1B54A32D192ED03)

TOGETHER = 256
"""Coordinates estimated at a time."""


@jit
def _hash(seed: np.uint64, row: int, position: int) -> np.uint64:
    return mixed(seed + np.uint64(row + 1) * ROW_STEP + np.uint64(position + 1) * STEP)


@jit
def add_up(x_n: Floats, seed: np.uint64, cell_rc: Doubles) -> None:
    """cell[r, place(r, j)] += sign(r, j) x x[j] for all j, ascending."""
    rows, columns = cell_rc.shape
    for j in range(len(x_n)):
        value = np.float64(x_n[j])
        for r in range(rows):
            code = _hash(seed, r, j)
            cell = ((code >> np.uint64(32)) * np.uint64(columns)) >> np.uint64(32)
            cell_rc[r, cell] += value if code & np.uint64(1) else -value


@jit
def estimate(cell_rc: Floats, seed: np.uint64, out_n: Floats) -> None:
    """out[j] = the median over r of sign(r, j) x cell[r, place(r, j)]; of an even number the mean of the middle two."""
    rows, columns = cell_rc.shape
    guess_rt = np.empty((rows, TOGETHER), np.float32)
    half = rows // 2
    for first in range(0, len(out_n), TOGETHER):
        width = min(TOGETHER, len(out_n) - first)
        for r in range(rows):
            guess_t, cell_c = guess_rt[r], cell_rc[r]
            for t in range(width):
                code = _hash(seed, r, first + t)
                value = cell_c[((code >> np.uint64(32)) * np.uint64(columns)) >> np.uint64(32)]
                guess_t[t] = value if code & np.uint64(1) else -value
        for turn in range(rows):  # odd-even transposition sort, all coordinates at once
            for r in range(turn % 2, rows - 1, 2):
                low_t, high_t = guess_rt[r], guess_rt[r + 1]
                for t in range(width):
                    a, b = low_t[t], high_t[t]
                    low_t[t] = a if a < b else b
                    high_t[t] = b if a < b else a
        middle_t, other_t, out_t = guess_rt[half], guess_rt[half - (rows % 2 == 0)], out_n[first : first + width]
        for t in range(width):
            out_t[t] = (np.float64(middle_t[t]) + np.float64(other_t[t])) * 0.5
