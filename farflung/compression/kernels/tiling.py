"""Between a model and its tiles in numba: numbers there, sparse coordinates back, in order."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from farflung.compression.kernels import Floats
from farflung.compression.kernels.numba_cpu import jit
from farflung.compression.kernels.numba_vectors import carry

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


@jit
def _tensor_of(shape_t6: Integers, place: int) -> int:
    """Which tensor holds a derived coordinate."""
    tensor = 0
    while tensor + 1 < len(shape_t6) and shape_t6[tensor + 1, 0] <= place:
        tensor += 1
    return tensor


@jit
def take_tiles(
    shape_t6: Integers, update_d: Floats, error_d: Floats, beta: np.float32, start: int, out_n: Floats
) -> None:
    """Fill out_n with the derived coordinates from `start` on: of the update, or of beta x error + update, which goes
    into error, if that is as long.

    A row of `shape_t6`: a tensor's place in the derived vector and in the model, rows, columns, sides of a tile.
    """
    at, end, carries = start, start + len(out_n), len(error_d) > 0
    from_d = error_d if carries else update_d
    tensor = _tensor_of(shape_t6, start)
    while at < end:
        first, source, rows, columns, tile_rows, tile_columns = shape_t6[tensor]
        last = min(first + rows * columns, end)
        if tile_columns == columns:  # as it is
            tile_rows, tile_columns = 1, rows * columns
        tile, across = tile_rows * tile_columns, max(columns // tile_columns, 1)
        while at < last:
            number, within = (at - first) // tile, (at - first) % tile
            row, column = within // tile_columns, within % tile_columns
            corner = source + number // across * tile_rows * columns + number % across * tile_columns
            whole = min((last - at) // tile, across - number % across) if within == 0 else 0
            if whole:  # neighbours together, row by row: memory is read in long runs
                for row in range(tile_rows):
                    place, to = corner + row * columns, at - start + row * tile_columns
                    if carries:
                        carry(error_d[place : place + whole * tile_columns], update_d[place:], beta)
                    for _ in range(whole):
                        from_n, to_n = from_d[place : place + tile_columns], out_n[to : to + tile_columns]
                        for j in range(len(to_n)):  # slices, whose places cannot be negative: this is vectorised
                            to_n[j] = from_n[j]
                        place, to = place + tile_columns, to + tile
                at += whole * tile
                continue
            while row < tile_rows and at < last:
                n, place, to = min(tile_columns - column, last - at), corner + row * columns + column, at - start
                if carries:
                    for j in range(n):
                        error_d[place + j] = beta * error_d[place + j] + update_d[place + j]
                        out_n[to + j] = error_d[place + j]
                else:
                    for j in range(n):
                        out_n[to + j] = update_d[place + j]
                at += n
                row, column = row + 1, 0
        tensor += 1


@jit
def take_away_tiles(shape_t6: Integers, error_d: Floats, start: int, index_k: Integers, value_k: Floats) -> None:
    """error -= the values at derived coordinates, ascending, counted from `start`."""
    tensor, first, end, corner, tile_columns, columns = -1, 0, 0, 0, 1, 1
    for k in range(len(index_k)):
        place = start + index_k[k]
        if place >= end:
            if tensor < 0 or place >= shape_t6[tensor, 0] + shape_t6[tensor, 2] * shape_t6[tensor, 3]:
                tensor = _tensor_of(shape_t6, place)
            begin, source, _, columns, tile_rows, tile_columns = shape_t6[tensor]
            tile, across = tile_rows * tile_columns, columns // tile_columns
            number = (place - begin) // tile
            first, end = begin + number * tile, begin + number * tile + tile
            corner = source + number // across * tile_rows * columns + number % across * tile_columns
        within = place - first
        row = within // tile_columns
        error_d[corner + row * columns + (within - row * tile_columns)] -= value_k[k]
