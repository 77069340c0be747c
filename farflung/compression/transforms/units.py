"""Transforms that work in place, stretch by stretch: a stretch of the vector from a stretch of the derived one.

A unit is such a stretch, long enough that reading it costs little more than itself. Readers keep the last few units, so
that windows in order undo each unit once.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch

from farflung.compression.codec import Codec, Reader, Row
from farflung.compression.parts import read_span
from farflung.compression.scheme import STRIDE, Floats, cut, require_window
from farflung.compression.transforms.transform import Transform, transformed
from farflung.protocol.rows import DenseRow, SparseRow
from farflung.protocol.schema import Schema

UNIT = 4 * STRIDE
"""Coordinates of a unit, where tensors are large enough: aligned windows around it cost 6 % more on average."""

UNITS_KEPT = 2
"""Units a reader keeps: the one that a window ends in, and the one before it for a second thread."""


class Unit(NamedTuple):
    """`rows` x `columns` coordinates from `start` of the vector, and from `source` of the derived one, in tiles."""

    start: int
    source: int
    rows: int
    columns: int
    tile_rows: int
    tile_columns: int

    @property
    def size(self) -> int:
        """Coordinates."""
        return self.rows * self.columns


class Plan(NamedTuple):
    """The derived schema, of the same length, and units in order of the vector, without gaps."""

    derived: Schema
    units: tuple[Unit, ...]
    starts: tuple[int, ...]


Forward = Callable[[Floats, Unit, int, Floats], None]
"""(values, unit, round, out): the derived stretch of a unit."""

Backward = Callable[[Row, Unit, int], Row]
"""(derived row, unit, round) -> the unit's row."""


def by_units(name: str, plan_of: Callable[[Schema], Plan], forward: Forward, backward: Backward, inner: Codec) -> Codec:
    """The codec of a transform that keeps the number of coordinates."""

    def go(update_d: Floats, schema: Schema, own: Any, round_index: int) -> tuple[Floats, Any]:
        derived_d = np.empty(len(update_d), np.float32)
        for unit in plan_of(schema).units:
            values, out = update_d[unit.start :][: unit.size], derived_d[unit.source :][: unit.size]
            forward(values, unit, round_index, out)
        return derived_d, own

    def reader(read: Reader, schema: Schema, round_index: int) -> Reader:
        def undo(unit: Unit) -> Row:
            row = read_span(read, unit.source, unit.source + unit.size, schema.numel)
            return backward(row, unit, round_index)

        return _reader(plan_of(schema), schema.numel, undo)

    return transformed(Transform(name, lambda schema: plan_of(schema).derived, go, reader), inner)


def _reader(plan: Plan, d: int, undo: Callable[[Unit], Row]) -> Reader:
    """Windows joined from units."""
    undone = lru_cache(maxsize=UNITS_KEPT)(undo)

    def read(start: int, stop: int) -> Row:
        require_window(start, stop, d)
        parts: list[tuple[int, Row]] = []
        number = bisect_right(plan.starts, start) - 1
        while number < len(plan.units) and plan.starts[number] < stop:
            unit = plan.units[number]
            first, last = max(start, unit.start), min(stop, unit.start + unit.size)
            parts.append((first - start, cut(undone(unit), first - unit.start, last - unit.start)))
            number += 1
        return _join(parts, stop - start)

    return read


def _join(parts: list[tuple[int, Row]], size: int) -> Row:
    """Rows of neighbouring stretches as one that owns its memory: sparse if all are."""
    sparse = [(first, row) for first, row in parts if isinstance(row, SparseRow)]
    if len(sparse) == len(parts):
        index_k = torch.cat([row.index_k + first for first, row in sparse])
        return SparseRow(size, index_k, torch.cat([row.value_k for _, row in sparse]))
    out_d = torch.zeros(size)
    for first, row in parts:
        if isinstance(row, DenseRow):
            out_d[first : first + len(row.value_d)] = row.value_d
        else:
            out_d[row.index_k.long() + first] = row.value_k
    return DenseRow(out_d)
