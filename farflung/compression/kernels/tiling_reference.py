"""The kernel of `tiling` in plain numpy: slow, obvious, the same numbers."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]


def untile(
    index_k: Integers, columns: int, tile_rows: int, tile_columns: int, first_r: Integers, order_k: Integers
) -> None:
    """See `tiling.untile`."""
    rows, across = len(first_r) - 1, columns // tile_columns
    place_mn = np.arange(rows * columns).reshape(rows // tile_rows, tile_rows, across, tile_columns)
    place_k = place_mn.swapaxes(1, 2).reshape(-1)[index_k]
    order_k[:] = place_k.argsort()
    index_k[:] = place_k[order_k]
