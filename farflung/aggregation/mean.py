"""The weighted mean: the rule for members who trust each other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from farflung.aggregation.rows import Row, array_of, arrays_of, find_wild
from farflung.aggregation.rule import Aggregate, Context, Entries
from farflung.aggregation.verdicts import judge
from farflung.aggregation.weights import checked_weights, sum_in_order
from farflung.aggregation.windows import WINDOW, Visit, map_windows
from farflung.protocol.errors import LocalError
from farflung.protocol.rows import WINDOW_ALIGN, DenseRow, Rows, SparseRow

SPARSE_WINDOW = 1 << 18
"""Coordinates per window of sparse rows: the sum is touched where they have entries, and reading a window of a payload
costs the same however short it is."""


def weighted_mean(
    rows: Rows[Tensor], weight_n: Tensor, *, f: int, context: Context, window: int | None = None
) -> Aggregate:
    """update = Σ w_i x_i / Σ w_i: fp64 products and sums in member order, one fp64 division, one rounding to fp32.

    Survives no liar: one row moves the mean anywhere. With f >= 1 a weight counts for at most Σ w / (n - f), n rows
    having weight > 0, so that no member outweighs 1 / (n - f); what is cut off is zero update. A row with a value that
    is not finite is left out whole (ANOMALY) and counts as zero: the divisor stays the weight of all rows.
    Shares are w_i / Σ w, so capped. Reads every row once, in windows; twice more if one is not finite. `rows.window` is
    called from `context.threads` threads at once. Raises TooFewPeers if fewer than 2 f + 1 rows have weight.
    """
    weights = checked_weights(weight_n, rows.n, f)
    total = sum_in_order(weights)
    capped = _cap(weights, total, f)
    out_d = torch.empty(rows.d) if context.out_d is None else context.out_d
    window = window or _window_of(rows)
    wild: frozenset[int] = frozenset()
    if not _combine(rows, capped, total, out_d, context=context, window=window):
        wild = find_wild(rows, capped, context, window)
        kept = [0.0 if i in wild else weight for i, weight in enumerate(capped)]
        if not _combine(rows, kept, total, out_d, context=context, window=window):
            raise LocalError(f"the mean of finite rows is not finite, without rows {sorted(wild)}")
    verdicts = judge([weight / total for weight in capped], weights, wild)
    return Aggregate(out_d, verdicts, {"weight_total": total, "rows_left_out": float(len(wild))})


def _window_of(rows: Rows[Tensor]) -> int:
    first = rows.window(0, min(WINDOW_ALIGN, rows.d)) if rows.d > SPARSE_WINDOW else ()
    return SPARSE_WINDOW if first and all(isinstance(row, SparseRow) for row in first) else WINDOW


def _cap(weights: Sequence[float], total: float, f: int) -> list[float]:
    if f == 0:
        return list(weights)
    most = total / (sum(weight > 0 for weight in weights) - f)
    return [min(weight, most) for weight in weights]


def _combine(
    rows: Rows[Tensor], weights: Sequence[float], total: float, out_d: Tensor, *, context: Context, window: int
) -> bool:
    """Write the mean. False if some row of weight > 0 is not finite."""
    from farflung.aggregation.kernels import native

    out = array_of(out_d, rows.d)

    def make_visit() -> Visit[bool]:
        dense_w, sparse_w = np.empty(min(window, rows.d)), np.zeros(min(window, rows.d))  # touched only where needed

        def visit(start: int, stop: int) -> bool:
            weighted = [(row, w) for row, w in zip(rows.window(start, stop), weights, strict=True) if w]
            sparse = [row for row, _ in weighted if isinstance(row, SparseRow)]
            if len(sparse) == len(weighted):
                sum_w = sparse_w[: stop - start]
                _add_rows(sum_w, weighted)
                if context.entries is not None:
                    pieces, finite = _divide_entries(sum_w, sparse, total)
                    context.entries(start, stop, pieces)
                    return finite
                out_w, finite = out[start:stop], True
                out_w.fill(0)
                for row in sparse:
                    finite &= native.divide_sparse(out_w, sum_w, arrays_of(row, stop - start)[0], total)
            else:
                sum_w = dense_w[: stop - start]
                sum_w.fill(0)
                _add_rows(sum_w, weighted)
                finite = native.divide(out[start:stop], sum_w, total)
            if context.finish is not None:
                context.finish(start, stop)
            return finite

        return visit

    finite = map_windows(rows.d, make_visit, threads=context.threads, cancelled=context.cancelled, window=window)
    return all(finite)


def _divide_entries(
    sum_w: NDArray[np.float64], sparse: Sequence[SparseRow[Tensor]], total: float
) -> tuple[list[Entries], bool]:
    """The mean where the rows have entries, each index in the first row that has it; whether all sums were finite."""
    from farflung.aggregation.kernels import native

    pieces, finite = list[Entries](), True
    for row in sparse:
        index_k, _ = arrays_of(row, len(sum_w))
        value_k, place_k = np.empty(len(index_k), np.float32), np.empty(len(index_k), np.int32)
        count, fine = native.take_sparse(value_k, place_k, sum_w, index_k, total)
        pieces.append((place_k[:count], value_k[:count]))
        finite &= fine
    return pieces, finite


def _add_rows(sum_w: NDArray[np.float64], weighted: Sequence[tuple[Row, float]]) -> None:
    """Add the rows in order; four dense neighbours at a time, which is the same sum with less memory traffic."""
    from farflung.aggregation.kernels import native

    size, position = len(sum_w), 0
    while position < len(weighted):
        four = weighted[position : position + 4]
        dense = [array_of(row.value_d, size) for row, _ in four if isinstance(row, DenseRow)]
        if len(dense) == 4:
            native.add_four(sum_w, dense[0], dense[1], dense[2], dense[3], np.array([weight for _, weight in four]))
            position += 4
            continue
        row, weight = weighted[position]
        position += 1
        if isinstance(row, DenseRow):
            native.add_dense(sum_w, array_of(row.value_d, size), weight)
        elif not native.add_sparse(sum_w, *arrays_of(row, size), weight):
            raise LocalError(f"the indices of a sparse row do not strictly increase below {size}")
