"""The kernels of `lowrank` in plain numpy: slow, obvious, the same bits."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]


def times(matrix_mn: Floats, right_rn: Doubles, out_rm: Doubles) -> None:
    """See `lowrank.times`."""
    out_rm[:] = 0
    for column_m, right_r in zip(matrix_mn.T.astype(np.float64), right_rn.T, strict=True):
        out_rm += right_r[:, None] * column_m


def transposed_times(matrix_mn: Floats, left_rm: Doubles, out_rn: Doubles) -> None:
    """See `lowrank.transposed_times`."""
    times(matrix_mn.T, left_rm, out_rn)


def product(left_rm: Doubles, right_rn: Doubles, start: int, limit: float, out_p: Floats) -> None:
    """See `lowrank.product`."""
    total_mn = np.zeros((left_rm.shape[1], right_rn.shape[1]))
    for left_m, right_n in zip(left_rm, right_rn, strict=True):
        total_mn += left_m[:, None] * right_n
    out_p[:] = total_mn.clip(-limit, limit).reshape(-1)[start : start + len(out_p)]


def dot(a_n: Doubles, b_n: Doubles) -> float:
    """See `lowrank.dot`."""
    whole, lane_8 = len(a_n) // 8 * 8, np.zeros(8)
    for terms_8 in (a_n[:whole] * b_n[:whole]).reshape(-1, 8):
        lane_8 += terms_8
    total = 0.0
    for term in [*lane_8, *(a_n[whole:] * b_n[whole:])]:
        total += float(term)
    return total


def orthonormalise(basis_rn: Doubles, done: int, floor: float) -> int:
    """See `lowrank.orthonormalise`."""
    for k in range(done, len(basis_rn)):
        row_n = basis_rn[k]
        before = np.sqrt(dot(row_n, row_n))
        for _ in range(2):
            for earlier_n in basis_rn[:k]:
                row_n -= dot(row_n, earlier_n) * earlier_n
        after = np.sqrt(dot(row_n, row_n))
        if not after > before * floor:
            row_n[:] = 0
            return k
        row_n /= after
    return len(basis_rn)
