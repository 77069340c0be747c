"""Products of a tall and a wide matrix in numba, and Gram-Schmidt: fp64, every sum in one fixed order.

Factors are stored by component: [r, m] and [r, n], so that inner loops run over contiguous lanes that never add to each
other; only the order of the terms within one sum matters, and it is ascending. `lowrank_reference` says the same in
plain numpy. Single-threaded; the GIL is released.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from farflung.compression.kernels.numba_cpu import jit

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

TILE = 64
"""Rows and columns transposed at a time: 32 KiB of fp64."""

PAD = 8
"""Unused columns of a transposed tile: entries of one column then lie in different sets of the cache."""

LANES = 8
"""Partial sums of `dot`."""

SPAN = 1024
"""Columns of fp64 kept in the first-level cache."""


@jit
def times(matrix_mn: Floats, right_rn: Doubles, out_rm: Doubles) -> None:
    """out[k, i] = sum over j, ascending, of matrix[i, j] x right[k, j]."""
    m, n = matrix_mn.shape
    turned = np.empty((TILE, TILE + PAD), np.float64)
    out_rm[:] = 0
    for i0 in range(0, m, TILE):
        rows = min(TILE, m - i0)
        for j0 in range(0, n, TILE):
            columns = min(TILE, n - j0)
            for i in range(rows):
                for j in range(columns):
                    turned[j, i] = matrix_mn[i0 + i, j0 + j]
            for k in range(len(right_rn)):
                out = out_rm[k, i0 : i0 + rows]
                factor = right_rn[k, j0 : j0 + columns]
                whole = columns - columns % 4
                for j in range(0, whole, 4):
                    a, b, c, d = factor[j], factor[j + 1], factor[j + 2], factor[j + 3]
                    ta, tb, tc, td = turned[j], turned[j + 1], turned[j + 2], turned[j + 3]
                    for i in range(rows):
                        out[i] = (((out[i] + ta[i] * a) + tb[i] * b) + tc[i] * c) + td[i] * d
                for j in range(whole, columns):
                    a, ta = factor[j], turned[j]
                    for i in range(rows):
                        out[i] += ta[i] * a


@jit
def transposed_times(matrix_mn: Floats, left_rm: Doubles, out_rn: Doubles) -> None:
    """out[k, j] = sum over i, ascending, of matrix[i, j] x left[k, i]."""
    m, n = matrix_mn.shape
    whole = m - m % 4
    out_rn[:] = 0
    for j0 in range(0, n, SPAN):
        j1 = min(j0 + SPAN, n)
        for i in range(0, whole, 4):
            ra, rb, rc, rd = (
                matrix_mn[i, j0:j1],
                matrix_mn[i + 1, j0:j1],
                matrix_mn[i + 2, j0:j1],
                matrix_mn[i + 3, j0:j1],
            )
            for k in range(len(left_rm)):
                out = out_rn[k, j0:j1]
                a, b, c, d = left_rm[k, i], left_rm[k, i + 1], left_rm[k, i + 2], left_rm[k, i + 3]
                for j in range(len(out)):
                    out[j] = (((out[j] + ra[j] * a) + rb[j] * b) + rc[j] * c) + rd[j] * d
        for i in range(whole, m):
            ra = matrix_mn[i, j0:j1]
            for k in range(len(left_rm)):
                out, a = out_rn[k, j0:j1], left_rm[k, i]
                for j in range(len(out)):
                    out[j] += ra[j] * a


@jit
def product(left_rm: Doubles, right_rn: Doubles, start: int, limit: float, out_p: Floats) -> None:
    """out[p] = sum over k, ascending, of left[k, i] x right[k, j], cut at +-limit; start + p = i x n + j."""
    rank, n = right_rn.shape
    total = np.empty(SPAN, np.float64)
    position, stop = 0, len(out_p)
    while position < stop:
        i, j0 = (start + position) // n, (start + position) % n
        width = min(n - j0, SPAN, stop - position)
        first, right = left_rm[0, i], right_rn[0, j0 : j0 + width]
        for j in range(width):
            total[j] = right[j] * first
        for k in range(1, rank):
            factor, right = left_rm[k, i], right_rn[k, j0 : j0 + width]
            for j in range(width):
                total[j] += right[j] * factor
        out = out_p[position : position + width]
        for j in range(width):
            value = total[j]
            value = limit if value > limit else value
            value = -limit if value < -limit else value
            out[j] = value
        position += width


@jit
def dot(a_n: Doubles, b_n: Doubles) -> float:
    """Eight partial sums over positions equal modulo 8, ascending, then the partial sums in order, then the tail."""
    lanes = np.zeros(LANES, np.float64)
    whole = len(a_n) - len(a_n) % LANES
    for q in range(0, whole, LANES):
        for lane in range(LANES):
            lanes[lane] += a_n[q + lane] * b_n[q + lane]
    total = 0.0
    for lane in range(LANES):
        total += lanes[lane]
    for j in range(whole, len(a_n)):
        total += a_n[j] * b_n[j]
    return total


@jit
def orthonormalise(basis_rn: Doubles, done: int, floor: float) -> int:
    """Gram-Schmidt, twice over, of the rows from `done` on, in place; the rows before it are orthonormal.

    Stops at the first row of which less than `floor` of its length is left, sets it to zero and returns its number;
    r when all are done.
    """
    rank: int = len(basis_rn)
    n = basis_rn.shape[1]
    for k in range(done, rank):
        row = basis_rn[k]
        before = np.sqrt(dot(row, row))
        for _ in range(2):
            for other in range(k):
                earlier = basis_rn[other]
                part = dot(row, earlier)
                for j in range(n):
                    row[j] -= part * earlier[j]
        after = np.sqrt(dot(row, row))
        if not after > before * floor:
            row[:] = 0
            return k
        for j in range(n):
            row[j] /= after
    return rank
