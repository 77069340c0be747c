"""The cosine transform in numba: fp64, every sum in one fixed order, sixty-four columns at a time.

One dimension of n rows is taken apart by its symmetry (even rows from sums of mirrored entries, odd ones from their
differences, again and again while n is even): a third of the multiplications of a matrix product. `dct_reference` does
the same in plain numpy. Single-threaded; the GIL is released.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from farflung.compression.kernels.numba_cpu import jit

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

TOGETHER = 64
"""Short runs transformed at a time."""

PAD = 8
"""Unused columns: entries of one column then lie in different sets of the cache, which transposing needs."""


@jit
def _sum_rows(weight: Doubles, source: Doubles, first: int, step: int, count: int, lanes: int, out: Doubles) -> None:
    """out = sum over q < count, ascending, of weight[j] x source[j] with j = first + q x step; four terms at a time."""
    out[:lanes] = 0
    whole = count - count % 4
    for q in range(0, whole, 4):
        j = first + q * step
        a, b, c, d = weight[j], weight[j + step], weight[j + 2 * step], weight[j + 3 * step]
        ra, rb, rc, rd = source[j], source[j + step], source[j + 2 * step], source[j + 3 * step]
        for lane in range(lanes):
            out[lane] = (((out[lane] + ra[lane] * a) + rb[lane] * b) + rc[lane] * c) + rd[lane] * d
    for q in range(whole, count):
        j = first + q * step
        a, ra = weight[j], source[j]
        for lane in range(lanes):
            out[lane] += ra[lane] * a


@jit
def _forward(table: Doubles, x: Doubles, lanes: int, room: Doubles, out: Doubles) -> None:
    """out[u] = sum over i of table[u, i] x x[i]; uses up x."""
    n, stride = len(table), 1
    while n % 2 == 0:
        half = n // 2
        for i in range(half):
            low, high, difference = x[i], x[n - 1 - i], room[i]
            for lane in range(lanes):
                a, b = low[lane], high[lane]
                low[lane] = a + b
                difference[lane] = a - b
        for k in range(half):
            u = stride * (2 * k + 1)
            _sum_rows(table[u], room, 0, 1, half, lanes, out[u])
        n, stride = half, 2 * stride
    for k in range(n):
        _sum_rows(table[stride * k], x, 0, 1, n, lanes, out[stride * k])


@jit
def _backward(turned: Doubles, y: Doubles, lanes: int, room: Doubles, out: Doubles) -> None:
    """out[i] = sum over u of turned[i, u] x y[u]; turned is the table's transpose."""
    size, n, stride = len(turned), len(turned), 1
    while n % 2 == 0:
        n, stride = n // 2, 2 * stride
    for i in range(n):
        _sum_rows(turned[i], y, 0, stride, n, lanes, out[i])
    while n < size:
        half, n, stride = n, 2 * n, stride // 2
        for i in range(half):
            _sum_rows(turned[i], y, stride, 2 * stride, half, lanes, room[i])
        for i in range(half):
            low, high, odd = out[i], out[n - 1 - i], room[i]
            for lane in range(lanes):
                even = low[lane]
                low[lane] = even + odd[lane]
                high[lane] = even - odd[lane]


@jit
def _transposed(x: Doubles, rows: int, columns: int, out: Doubles) -> None:
    for i in range(rows):
        for j in range(columns):
            out[j, i] = x[i, j]


@jit
def _rounded(value: float, limit: float) -> np.float32:
    value = limit if value > limit else value
    value = -limit if value < -limit else value
    return np.float32(value)


@jit
def transform(
    matrix_mn: Floats, row_table: Doubles, column_table: Doubles, limit: float, inverse: bool, tile_tp: Floats
) -> None:
    """Each tile X of a matrix to row_table X column_table^T, one row of tile_tp per tile, cut at +-limit; or back.

    Back, the tables are transposes, and `matrix_mn` is filled from `tile_tp`. Sides of tiles are those of the tables.
    """
    tile_rows, tile_columns = len(row_table), len(column_table)
    across = matrix_mn.shape[1] // tile_columns
    side = max(tile_rows, tile_columns)
    width = side + PAD
    x, y, room = np.empty((side, width)), np.empty((side, width)), np.empty((side, width))
    for tile in range(len(tile_tp)):
        top, left = tile // across * tile_rows, tile % across * tile_columns
        flat = tile_tp[tile]
        for i in range(tile_rows):
            for j in range(tile_columns):
                x[i, j] = flat[i * tile_columns + j] if inverse else matrix_mn[top + i, left + j]
        if inverse:
            _backward(row_table, x, tile_columns, room, y)
        else:
            _forward(row_table, x, tile_columns, room, y)
        _transposed(y, tile_rows, tile_columns, x)
        if inverse:
            _backward(column_table, x, tile_rows, room, y)
        else:
            _forward(column_table, x, tile_rows, room, y)
        for i in range(tile_rows):
            for j in range(tile_columns):
                value = _rounded(y[j, i], limit)
                if inverse:
                    matrix_mn[top + i, left + j] = value
                else:
                    flat[i * tile_columns + j] = value


@jit
def transform_runs(x_bn: Floats, table: Doubles, limit: float, inverse: bool, out_bn: Floats) -> None:
    """Each row of x_bn times table^T, cut at +-limit; or, with the transpose, back."""
    blocks, n = x_bn.shape
    width = TOGETHER + PAD
    x, y, room = np.empty((n, width)), np.empty((n, width)), np.empty((n, width))
    for first in range(0, blocks, TOGETHER):
        lanes = min(TOGETHER, blocks - first)
        for lane in range(lanes):
            for j in range(n):
                x[j, lane] = x_bn[first + lane, j]
        if inverse:
            _backward(table, x, lanes, room, y)
        else:
            _forward(table, x, lanes, room, y)
        for lane in range(lanes):
            for j in range(n):
                out_bn[first + lane, j] = _rounded(y[j, lane], limit)
