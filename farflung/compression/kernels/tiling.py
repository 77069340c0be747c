"""Sparse coordinates of tiles back to those of their matrix, in order, in numba."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from farflung.compression.kernels.numba_cpu import jit

Integers = NDArray[np.int64]


@jit
def untile(
    index_k: Integers, columns: int, tile_rows: int, tile_columns: int, first_r: Integers, order_k: Integers
) -> None:
    """Replace tiled places, ascending, by places in the matrix, ascending; order_k says where each one came from.

    `first_r` has one entry per row and one more, all 0. A stable counting sort by row: within a row, places ascend
    from tile to tile already.
    """
    tile, across, count = tile_rows * tile_columns, columns // tile_columns, len(index_k)
    place_k = np.empty(count, np.int64)
    for k in range(count):
        number, within = index_k[k] // tile, index_k[k] % tile
        row = number // across * tile_rows + within // tile_columns
        place_k[k] = row * columns + number % across * tile_columns + within % tile_columns
        first_r[row + 1] += 1
    for row in range(1, len(first_r)):
        first_r[row] += first_r[row - 1]
    for k in range(count):
        row = place_k[k] // columns
        index_k[first_r[row]] = place_k[k]
        order_k[first_r[row]] = k
        first_r[row] += 1
