"""The kernels of `dct` in plain numpy: slow, obvious, the same bits."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]


def _weighted(weight_pq: Doubles, source_ql: Doubles) -> Doubles:
    """weight x source, the terms of every sum one after the other."""
    out_pl = np.zeros((len(weight_pq), source_ql.shape[1]))
    for weight_p, source_l in zip(weight_pq.T, source_ql, strict=True):
        out_pl += weight_p[:, None] * source_l
    return out_pl


def forward(table: Doubles, x_nl: Doubles) -> Doubles:
    """table x, by symmetry while n is even: even rows of the result from sums, odd ones from differences."""
    n = len(x_nl)
    if n % 2:
        return _weighted(table[:, :n], x_nl)
    low_hl, high_hl = x_nl[: n // 2], x_nl[n // 2 :][::-1]
    out_nl = np.empty_like(x_nl)
    out_nl[::2] = forward(table[::2], low_hl + high_hl)
    out_nl[1::2] = _weighted(table[1::2, : n // 2], low_hl - high_hl)
    return out_nl


def backward(turned: Doubles, y_nl: Doubles) -> Doubles:
    """turned y, where turned is the table's transpose: the inverse of `forward`."""
    n = len(y_nl)
    if n % 2:
        return _weighted(turned[:n], y_nl)
    even_hl = backward(turned[:, ::2], y_nl[::2])
    odd_hl = _weighted(turned[: n // 2, 1::2], y_nl[1::2])
    return np.concatenate([even_hl + odd_hl, (even_hl - odd_hl)[::-1]])


def transform(
    matrix_mn: Floats, row_table: Doubles, column_table: Doubles, limit: float, inverse: bool, tile_tp: Floats
) -> None:
    """See `dct.transform`."""
    rows, columns = len(row_table), len(column_table)
    one = backward if inverse else forward
    across = matrix_mn.shape[1] // columns
    for number, flat in enumerate(tile_tp):
        top, left = number // across * rows, number % across * columns
        place = matrix_mn[top : top + rows, left : left + columns]
        source = (flat.reshape(rows, columns) if inverse else place).astype(np.float64)
        turned = one(column_table, np.ascontiguousarray(one(row_table, source).T)).T.clip(-limit, limit)
        if inverse:
            place[:] = turned
        else:
            flat[:] = turned.reshape(-1)


def transform_runs(x_bn: Floats, table: Doubles, limit: float, inverse: bool, out_bn: Floats) -> None:
    """See `dct.transform_runs`."""
    one = backward if inverse else forward
    out_bn[:] = one(table, x_bn.T.astype(np.float64)).T.clip(-limit, limit)
