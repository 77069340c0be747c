"""The kernels of `sketch` in plain numpy: slow, obvious, the same numbers (a zero's sign may differ before `+ 0`)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from farflung.compression.kernels.rotation_reference import STEP, mixed

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Integers = NDArray[np.int64]

ROW_STEP = np.uint64(0xD1B54A32D192ED03)


def places(seed: np.uint64, rows: int, columns: int, n: int) -> tuple[Integers, Integers]:
    """Cell [r, n] and sign [r, n] of every coordinate."""
    row_r1, position_n = np.arange(1, rows + 1, dtype=np.uint64)[:, None], np.arange(1, n + 1, dtype=np.uint64)
    code_rn = mixed(seed + row_r1 * ROW_STEP + position_n * STEP)
    cell_rn = (code_rn >> np.uint64(32)) * np.uint64(columns) >> np.uint64(32)
    return cell_rn.astype(np.int64), 2 * (code_rn & np.uint64(1)).astype(np.int64) - 1


def add_up(x_n: Floats, seed: np.uint64, cell_rc: Doubles) -> None:
    """See `sketch.add_up`."""
    cell_rn, sign_rn = places(seed, len(cell_rc), cell_rc.shape[1], len(x_n))
    for row_c, cell_n, sign_n in zip(cell_rc, cell_rn, sign_rn, strict=True):
        for cell, sign, value in zip(cell_n, sign_n, x_n.astype(np.float64), strict=True):
            row_c[cell] += sign * value


def estimate(cell_rc: Floats, seed: np.uint64, out_n: Floats) -> None:
    """See `sketch.estimate`."""
    cell_rn, sign_rn = places(seed, len(cell_rc), cell_rc.shape[1], len(out_n))
    out_n[:] = np.median(np.take_along_axis(cell_rc, cell_rn, 1).astype(np.float64) * sign_rn, axis=0)
