"""Cosine transform of tiles: what DeMo and DisTrO sparsify."""

from __future__ import annotations

from functools import cache, lru_cache
from math import isqrt
from types import ModuleType
from typing import Any

import numpy as np

from farflung.compression.codec import Codec, Row
from farflung.compression.grammar import Arguments
from farflung.compression.scheme import Floats
from farflung.compression.stage import Body, Stage, require
from farflung.compression.transforms.derived import Doubles, dense_row, fill_dense, inner_codec
from farflung.compression.transforms.tiles import SIDE_MAX, plan_of
from farflung.compression.transforms.units import Unit, by_units
from farflung.protocol.limits import PAYLOAD_ABS_MAX

_ONE = 1 << 192
"""Fixed point of 192 bits: far beyond what rounding once to fp64 needs."""


@cache
def kernels() -> ModuleType:
    """The numba kernels; imports numba on the first call."""
    from farflung.compression.kernels import dct as numba_dct

    return numba_dct


@lru_cache(maxsize=SIDE_MAX + 1)
def dct_table(n: int) -> Doubles:
    """[u, i] -> the orthonormal DCT-II of n points: sqrt(2 / n) cos(pi (2 i + 1) u / (2 n)), sqrt(1 / n) for u = 0.

    Computed in integers and rounded once to fp64, so that no library's cosine matters. Read-only.
    """
    quarter = [_cosine(a, n) for a in range(n + 1)]  # of a x pi / (2 n)

    def cosine(a: int) -> int:
        a %= 4 * n
        a = 4 * n - a if a > 2 * n else a
        return quarter[a] if a <= n else -quarter[2 * n - a]

    first, others = isqrt(_ONE * _ONE // n), isqrt(2 * _ONE * _ONE // n)
    rows = [[(others if u else first) * cosine((2 * i + 1) * u) / (_ONE * _ONE) for i in range(n)] for u in range(n)]
    table = np.array(rows)
    table.setflags(write=False)
    return table


def _cosine(a: int, n: int) -> int:
    """cos(a pi / (2 n)) x _ONE for 0 <= a <= n, by its series."""
    angle = a * _pi() // (2 * n)
    square = angle * angle // _ONE
    total, term, k = 0, _ONE, 0
    while term:
        total += term
        k += 2
        term = (
            -(abs(term) * square // _ONE // (k * (k - 1))) if term > 0 else abs(term) * square // _ONE // (k * (k - 1))
        )
    return total


@cache
def _pi() -> int:
    """pi x _ONE: 16 arctan(1/5) - 4 arctan(1/239)."""

    def arctan_of_inverse(x: int) -> int:
        total, power, k, sign = 0, _ONE // x, 1, 1
        while power:
            total += sign * (power // k)
            power, k, sign = power // (x * x), k + 2, -sign
        return total

    return 16 * arctan_of_inverse(5) - 4 * arctan_of_inverse(239)


@lru_cache(maxsize=SIDE_MAX + 1)
def _turned(n: int) -> Doubles:
    turned = np.ascontiguousarray(dct_table(n).T)
    turned.setflags(write=False)
    return turned


def dct(side: int, inner: Codec) -> Codec:
    """Encode the orthonormal two-dimensional DCT-II of every side x side tile of a matrix (arXiv:2411.19870, §3).

    Tiles, their order and the rule for other dimensions are those of `tiles`; a vector is cut into runs of its largest
    divisor at most `side`. Coefficients of a tile lie in row order, so that `dct(64)|topk(32/4096)|...` keeps the
    largest of each whole tile. Orthonormal: errors have the same size in both bases. Sums are in fp64, rounded to fp32
    once each way; coefficients saturate at PAYLOAD_ABS_MAX. No bits, no state; decoded rows are dense. A window costs
    its band of tiles, which the reader keeps.
    """

    def forward(values: Floats, unit: Unit, round_index: int, out: Floats) -> None:
        _transform(values, unit, out, inverse=False)

    def backward(row: Row, unit: Unit, round_index: int) -> Row:
        coefficients, out = np.zeros(unit.size, np.float32), np.empty(unit.size, np.float32)
        fill_dense(row, coefficients)
        _transform(out, unit, coefficients, inverse=True)
        return dense_row(out)

    require(1 < side <= SIDE_MAX and side & (side - 1) == 0, f"a side is a power of two to {SIDE_MAX}, got {side}")
    return by_units(f"dct({side})", lambda schema: plan_of(schema, side, side), forward, backward, inner)


def _transform(values: Floats, unit: Unit, coefficients: Floats, *, inverse: bool) -> None:
    """Values to coefficients, or back."""
    table_of = _turned if inverse else dct_table
    columns = table_of(unit.tile_columns)
    if unit.tile_rows == 1:  # tile after tile is then the vector itself
        runs, out = (coefficients, values) if inverse else (values, coefficients)
        shape = (-1, unit.tile_columns)
        kernels().transform_runs(runs.reshape(shape), columns, PAYLOAD_ABS_MAX, inverse, out.reshape(shape))
        return
    tile_tp = coefficients.reshape(-1, unit.tile_rows * unit.tile_columns)
    matrix_mn = values.reshape(unit.rows, unit.columns)
    kernels().transform(matrix_mn, table_of(unit.tile_rows), columns, PAYLOAD_ABS_MAX, inverse, tile_tp)


def _build(arguments: Arguments, inner: Body | None, parse: Any) -> Body:
    side = arguments.integer("side", 2, SIDE_MAX, 64, power_of_two=True)
    arguments.end()
    return dct(side, inner_codec(inner, arguments.stage, fixed=True))


STAGES = (
    Stage(
        "dct",
        "transform",
        "dct(side=64)",
        "Orthonormal cosine transform of square tiles.",
        "0",
        "none",
        "arXiv:2411.19870, §3",
        _build,
        ("dct(64)|topk(32/4096)|bf16", "dct(16)|fp32", "ef(0.999)|dct(64)|topk(32/4096)|q2"),
    ),
)
