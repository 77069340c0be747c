"""Tiles: square pieces of matrices side by side, so that a chunk of the vector is a piece of one matrix."""

from __future__ import annotations

from functools import cache, lru_cache
from math import isqrt, prod
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from farflung.compression.codec import Codec, Row
from farflung.compression.formats.sparse import refuse_infinite
from farflung.compression.grammar import Arguments
from farflung.compression.kernels import ABS_MAX_BITS, fastest
from farflung.compression.scheme import Floats, require_update
from farflung.compression.source import Vector, numbers_of
from farflung.compression.stage import Body, Stage, require
from farflung.compression.transforms.derived import dense_row, inner_codec
from farflung.compression.transforms.transform import Carried
from farflung.compression.transforms.units import UNIT, Plan, Unit, by_units
from farflung.protocol.errors import LocalError
from farflung.protocol.limits import PAYLOAD_ABS_MAX
from farflung.protocol.rows import SparseRow
from farflung.protocol.schema import Schema, TensorSpec

Places = NDArray[np.int64]

NOTHING: Floats = np.empty(0, np.float32)

SIDE_MAX = 128
"""A tile is then as long as a window: 2**14 coordinates."""


@cache
def kernels() -> ModuleType:
    """The numba kernel; imports numba on the first call."""
    from farflung.compression.kernels import tiling

    return tiling


def largest_divisor(n: int, at_most: int) -> int:
    """The largest divisor of n that is at most `at_most`: how SparseLoCo and DeMo cut what 64 does not divide."""
    if at_most >= n:
        return n
    if at_most <= isqrt(n):
        return next(k for k in range(at_most, 0, -1) if n % k == 0)
    small = [k for k in range(1, isqrt(n) + 1) if n % k == 0]
    return max(k for low in small for k in (low, n // low) if k <= at_most)


class _Shape(NamedTuple):
    """A tensor as rows x columns in tiles; rank 0: whole squares, 1: smaller tiles, 2: a vector."""

    rank: int
    start: int
    name: str
    rows: int
    columns: int
    tile_rows: int
    tile_columns: int


@lru_cache(maxsize=16)
def plan_of(schema: Schema, side: int, vector_side: int) -> Plan:
    """Where every tile goes: tensors of side x side tiles first, then tensors of smaller tiles, then vectors.

    A tensor of two or more dimensions is a matrix [first dimension, all others]; its tiles have the largest divisors of
    both at most `side` as sides, in row order. A vector's are runs of its largest divisor at most `vector_side`.
    """
    derived, units, source = [], [], 0
    for number, shape in enumerate(_ordered(schema, side, vector_side)):
        size, tile = shape.rows * shape.columns, shape.tile_rows * shape.tile_columns
        derived.append(TensorSpec(f"{number:04d}.{shape.name}", (size // tile, tile), "float32"))
        step = max(UNIT // (shape.tile_rows * shape.columns), 1) * shape.tile_rows
        for row in range(0, shape.rows, step):
            at, rows = row * shape.columns, min(step, shape.rows - row)
            place = (shape.start + at, source + at)
            units.append(Unit(*place, rows, shape.columns, shape.tile_rows, shape.tile_columns))
        source += size
    units.sort()
    return Plan(Schema(tuple(derived)), tuple(units), tuple(unit.start for unit in units))


def _ordered(schema: Schema, side: int, vector_side: int) -> list[_Shape]:
    """The tensors as they come in the derived vector."""
    pairs = zip(schema.tensors, schema.offsets, strict=True)
    return sorted(_shape(tensor, start, side, vector_side) for tensor, start in pairs)


def _shape(tensor: TensorSpec, start: int, side: int, vector_side: int) -> _Shape:
    if len(tensor.shape) < 2:
        tile = largest_divisor(tensor.numel, vector_side)
        return _Shape(2, start, tensor.name, tensor.numel // tile, tile, 1, tile)
    rows, columns = tensor.shape[0], prod(tensor.shape[1:])
    tile_rows, tile_columns = largest_divisor(rows, side), largest_divisor(columns, side)
    rank = 0 if tile_rows == tile_columns == side else 1
    return _Shape(rank, start, tensor.name, rows, columns, tile_rows, tile_columns)


@lru_cache(maxsize=16)
def shapes_of(schema: Schema, side: int) -> Places:
    """The tensors in the order of the derived vector, as `kernels.tiling.take_tiles` reads them."""
    rows, first = [], 0
    for shape in _ordered(schema, side, 1):
        rows.append((first, shape.start, *shape[3:]))
        first += shape.rows * shape.columns
    return np.array(rows, np.int64)


class Tiled(NamedTuple):
    """The source (see `source.Source`) of a vector's tiles, or of those of beta error + vector, made in error."""

    shape_t6: Places
    update_d: Floats
    error_d: Floats | None
    beta: np.float32

    @property
    def listens(self) -> bool:
        """See `Source`."""
        return self.error_d is not None

    def take(self, start: int, stop: int) -> Floats:
        """See `Source`. Raises LocalError if a number is not finite."""
        out_n = np.empty(stop - start, np.float32)
        error_d = NOTHING if self.error_d is None else self.error_d
        kernels().take_tiles(self.shape_t6, self.update_d, error_d, self.beta, start, out_n)
        top = fastest().top_bits(out_n)
        refuse_infinite(top)
        return out_n if top <= ABS_MAX_BITS else np.clip(out_n, -PAYLOAD_ABS_MAX, PAYLOAD_ABS_MAX)

    def give(self, start: int, stop: int, row: Row) -> None:
        """See `Source`."""
        if self.error_d is None:
            return
        if isinstance(row, SparseRow):
            index_k, value_k = row.index_k.numpy(), row.value_k.numpy()
        else:
            index_k, value_k = np.arange(stop - start), row.value_d.numpy()
        kernels().take_away_tiles(self.shape_t6, self.error_d, start, index_k, value_k)


def tiles(side: int, inner: Codec) -> Codec:
    """Reorder the vector so that each side x side tile of a matrix is contiguous, and encode that.

    `tiles(64)|topk(64/4096)|...` then selects within tiles, as SparseLoCo does (arXiv:2508.15706). Where `side` does
    not divide a dimension its largest divisor below takes its place; such a tile is smaller than a chunk, and chunks
    span tiles there. These tensors come after all whole tiles, so that they shift no other; vectors come last, as they
    are. A permutation: nothing is lost, sparse rows stay sparse, with indices in order. No bits, no state. A window
    costs its band of tiles (`side` rows of the matrix), which the reader keeps.
    """

    def forward(values: Floats, unit: Unit, round_index: int, out: Floats) -> None:
        bands, across = unit.rows // unit.tile_rows, unit.columns // unit.tile_columns
        tiled = values.reshape(bands, unit.tile_rows, across, unit.tile_columns).swapaxes(1, 2)
        out.reshape(bands, across, unit.tile_rows, unit.tile_columns)[:] = tiled

    def backward(row: Row, unit: Unit, round_index: int) -> Row:
        if unit.tile_rows == 1:
            return row
        bands, across = unit.rows // unit.tile_rows, unit.columns // unit.tile_columns
        if not isinstance(row, SparseRow):
            tiled = row.value_d.numpy().reshape(bands, across, unit.tile_rows, unit.tile_columns)
            return dense_row(tiled.swapaxes(1, 2).reshape(-1))
        index_k = row.index_k.numpy().astype(np.int64)
        first_r, order_k = np.zeros(unit.rows + 1, np.int64), np.empty(len(index_k), np.int64)
        kernels().untile(index_k, unit.columns, unit.tile_rows, unit.tile_columns, first_r, order_k)
        return SparseRow(row.size, torch.from_numpy(index_k), row.value_k[torch.from_numpy(order_k)])

    require(1 < side <= SIDE_MAX and side & (side - 1) == 0, f"a side is a power of two to {SIDE_MAX}, got {side}")
    codec = by_units(f"tiles({side})", lambda schema: plan_of(schema, side, 1), forward, backward, inner)
    if inner.stream is None or inner.scheme is None:
        return codec
    write_inner = inner.stream

    def stream(source: Vector, schema: Schema, round_index: int) -> bytes:
        update_d = source.numbers(0, schema.numel)
        tiled = Tiled(shapes_of(schema, side), update_d, source.error_d, source.beta)
        return write_inner(tiled, plan_of(schema, side, 1).derived, round_index)

    def encode(update_d: Tensor, private: Carried, shared: Any, round_index: int) -> tuple[bytes, Carried]:
        require_update(update_d)
        if len(update_d) != private.schema.numel:
            raise LocalError(f"an update has {private.schema.numel} fp32 here, got {len(update_d)}")
        return stream(Vector(numbers_of(update_d)), private.schema, round_index), private

    return codec._replace(encode=encode, stream=stream)


def _build(arguments: Arguments, inner: Body | None, parse: Any) -> Body:
    side = arguments.integer("side", 2, SIDE_MAX, 64, power_of_two=True)
    arguments.end()
    return tiles(side, inner_codec(inner, arguments.stage, fixed=True))


STAGES = (
    Stage(
        "tiles",
        "transform",
        "tiles(side=64)",
        "Square tiles of matrices side by side, so that a chunk is a tile.",
        "0",
        "none",
        "arXiv:2508.15706; arXiv:2411.19870",
        _build,
        ("tiles(64)|topk(64/4096)|q2", "tiles(16)|int8", "ef(0.95)|tiles(64)|topk(64/4096)|q2"),
    ),
)
