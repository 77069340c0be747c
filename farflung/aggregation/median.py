"""The coordinate median: a rule for members who need not trust each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from farflung.aggregation.network import median_network
from farflung.aggregation.rows import Row, array_of, arrays_of, find_wild
from farflung.aggregation.rule import Aggregate, Context
from farflung.aggregation.verdicts import judge
from farflung.aggregation.weights import checked_weights
from farflung.aggregation.windows import Visit, map_windows
from farflung.protocol.errors import LocalError
from farflung.protocol.rows import WINDOW_ALIGN, DenseRow, Rows

BLOCK_NUMBERS = 1 << 18
"""Numbers of all rows in one window, 1 MiB: they stay in a second-level cache. Many rows take the smallest window."""


class _Window(NamedTuple):
    """What one window tells: per counted row how often it was a middle value, and whether all rows were finite."""

    hit_n: NDArray[np.int64]
    finite: bool


def coordinate_median(
    rows: Rows[Tensor], weight_n: Tensor, *, f: int, context: Context, window: int | None = None
) -> Aggregate:
    """Per coordinate the middle value of n rows; for even n the mean of the two middles, in fp64, rounded once.

    Up to f rows may be arbitrary: no coordinate then leaves the range of the honest rows (arXiv:1803.01498, Def. 1).
    Weights do not enter the ranks (a liar would claim the largest); a row of weight zero is not ranked at all. A
    coordinate that a sparse row did not send is zero, and so is all of a row with a value that is not finite (ANOMALY).
    A row's share is its part of all non-zero middle values, ties counting for each: shares sum to 1, or to 0 if the
    update is zero. Nobody is CUT: every row helped to find the middle.
    Costs 4 n bytes per coordinate of a window and thread. Raises TooFewPeers if fewer than 2 f + 1 rows have weight.
    """
    weights = checked_weights(weight_n, rows.n, f)
    out_d = torch.empty(rows.d) if context.out_d is None else context.out_d
    window = window or max(BLOCK_NUMBERS // rows.n // WINDOW_ALIGN, 1) * WINDOW_ALIGN
    wild: frozenset[int] = frozenset()
    results = _combine(rows, weights, wild, out_d, context=context, window=window)
    if not all(result.finite for result in results):
        wild = find_wild(rows, weights, context, window)
        results = _combine(rows, weights, wild, out_d, context=context, window=window)
    hits = np.zeros(rows.n, dtype=np.int64)
    hits[[i for i, weight in enumerate(weights) if weight]] = sum(result.hit_n for result in results)
    shares = (hits / max(int(hits.sum()), 1)).tolist()
    verdicts = judge(shares, weights, wild)
    return Aggregate(
        out_d, verdicts, {"rows_ranked": float(np.count_nonzero(weights)), "rows_left_out": float(len(wild))}
    )


def _combine(
    rows: Rows[Tensor],
    weights: Sequence[float],
    wild: frozenset[int],
    out_d: Tensor,
    *,
    context: Context,
    window: int,
) -> list[_Window]:
    """Write the median with the rows in `wild` as zeros."""
    from farflung.aggregation.kernels import native

    counted = [i for i, weight in enumerate(weights) if weight]
    comparator_c2 = median_network(len(counted))
    out = array_of(out_d, rows.d)

    def make_visit() -> Visit[_Window]:
        block_nw = np.zeros((len(counted), min(window, rows.d)), dtype=np.float32)

        def visit(start: int, stop: int) -> _Window:
            window_rows = rows.window(start, stop)
            finite = [
                _load(block_nw[position, : stop - start], window_rows[i])
                for position, i in enumerate(counted)
                if i not in wild
            ]
            hit_n = np.zeros(len(counted), dtype=np.int64)
            native.median(out[start:stop], hit_n, block_nw, comparator_c2)
            if context.finish is not None:
                context.finish(start, stop)
            return _Window(hit_n, all(finite))

        return visit

    return map_windows(rows.d, make_visit, threads=context.threads, cancelled=context.cancelled, window=window)


def _load(row_w: NDArray[np.float32], row: Row) -> bool:
    """Write a row as a dense one. False if a value is not finite."""
    from farflung.aggregation.kernels import native

    size = len(row_w)
    if isinstance(row, DenseRow):
        return native.load_dense(row_w, array_of(row.value_d, size))
    index_k, value_k = arrays_of(row, size)
    if not native.load_sparse(row_w, index_k, value_k):
        raise LocalError(f"the indices of a sparse row do not strictly increase below {size}")
    return native.all_finite(value_k)
