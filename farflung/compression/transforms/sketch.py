"""Count sketch: a linear summary from which the largest coordinates can be read."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, lru_cache
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch

from farflung.compression.codec import Codec, Reader, Row
from farflung.compression.grammar import Arguments
from farflung.compression.kernels import fastest
from farflung.compression.parts import read_span
from farflung.compression.scheme import Floats, require_window
from farflung.compression.stage import Body, Stage, require
from farflung.compression.transforms.derived import (
    dense_row,
    fill_dense,
    inner_codec,
    seed_of,
    to_floats,
)
from farflung.compression.transforms.transform import Transform, transformed
from farflung.protocol.rows import WINDOW_ALIGN, SparseRow
from farflung.protocol.schema import Schema, TensorSpec

ROWS_MAX = 15
CHUNK_MIN = 256


@cache
def kernels() -> ModuleType:
    """The numba kernels; imports numba on the first call."""
    from farflung.compression.kernels import sketch as numba_sketch

    return numba_sketch


def sketch(rows: int, cols: int, chunk: int, keep: int, inner: Codec) -> Codec:
    """Send rows x cols cells for every `chunk` coordinates through the inner codec (Charikar et al. 2002, §3).

    In each row, every coordinate adds its value, with a random sign, to a random cell; both are hashes of the round and
    of the coordinate's place, the same for all members. Linear: the sum of members' cells is the cells of their sum, so
    payloads of a linear inner codec merge. A coordinate is estimated by the median over the rows of its cells; one
    row's estimate is unbiased with variance at most ||x||^2 / cols, ||x|| that of its chunk. keep = 0 decodes all
    estimates, which err by more than ||x|| in all: for counting, not behind `ef`. keep = k decodes the k largest of
    every chunk and zeros (as in FetchSGD, arXiv:2007.07682, §3): for `ef`, if few coordinates hold most of the energy.
    A last chunk of n has ceil(cols n / chunk) cells in a row and keeps ceil(keep n / chunk). Cells saturate at
    PAYLOAD_ABS_MAX. Costs rows x cols / chunk inner parameters per parameter; no state. Biased when k are kept.
    """

    fits = CHUNK_MIN <= chunk <= WINDOW_ALIGN and chunk & (chunk - 1) == 0 and max(cols, keep) <= chunk
    require(fits and 1 <= rows <= ROWS_MAX and cols >= 1 and keep >= 0, f"no sketch: {rows} x {cols}, {chunk}, {keep}")
    table = _Table(rows, cols, chunk, keep)

    @lru_cache(maxsize=16)
    def derived(schema: Schema) -> Schema:
        return Schema((TensorSpec("sketch", (table.cells_before(schema.numel),), "float32"),))

    def forward(update_d: Floats, schema: Schema, own: Any, round_index: int) -> tuple[Floats, Any]:
        cells = np.empty(table.cells_before(len(update_d)), np.float32)
        for start, stop in table.chunks(0, len(update_d)):
            cell_rc = np.zeros((rows, table.portion(stop - start, cols)))
            kernels().add_up(update_d[start:stop], seed_of("sketch", round_index, start), cell_rc)
            cells[table.cells_before(start) : table.cells_before(stop)] = to_floats(cell_rc).reshape(-1)
        return cells, own

    def reader(inner_read: Reader, schema: Schema, round_index: int) -> Reader:
        def read(start: int, stop: int) -> Row:
            require_window(start, stop, schema.numel)
            first, last = table.cells_before(start), table.cells_before(stop)
            cells = np.zeros(last - first, np.float32)
            fill_dense(read_span(inner_read, first, last, derived(schema).numel), cells)
            return _estimates(table, cells, start, stop, round_index)

        return read

    name = f"sketch(rows={rows}, cols={cols}, chunk={chunk}, keep={keep})"
    return transformed(Transform(name, derived, forward, reader), inner)


class _Table(NamedTuple):
    """Sizes of a sketch."""

    rows: int
    cols: int
    chunk: int
    keep: int

    def portion(self, n: int, of: int) -> int:
        """What a chunk of n has of something of which a whole one has `of`."""
        return -(-of * n // self.chunk)

    def cells_before(self, position: int) -> int:
        """Cells of all coordinates before a position: a chunk's edge, or d."""
        whole, rest = divmod(position, self.chunk)
        return self.rows * (whole * self.cols + self.portion(rest, self.cols))

    def chunks(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """The chunks of a window."""
        for first in range(start, stop, self.chunk):
            yield first, min(first + self.chunk, stop)


def _estimates(table: _Table, cells: Floats, start: int, stop: int, round_index: int) -> Row:
    """The row of a window from its cells."""
    out_d, kept, base = np.empty(stop - start, np.float32), [], table.cells_before(start)
    for low, high in table.chunks(start, stop):
        cell_rc = cells[table.cells_before(low) - base : table.cells_before(high) - base].reshape(table.rows, -1)
        out_n = out_d[low - start : high - start]
        kernels().estimate(cell_rc, seed_of("sketch", round_index, low), out_n)
        if table.keep:
            kept.append(_largest(out_n, table.portion(high - low, table.keep)) + (low - start))
    if not table.keep:
        return dense_row(out_d)
    index_k = np.concatenate(kept)
    return SparseRow(stop - start, torch.from_numpy(index_k), torch.from_numpy(out_d[index_k]))


def _largest(out_n: Floats, k: int) -> Any:
    """Places of the k largest magnitudes, ascending; the lowest wins a tie."""
    return fastest().topk_select(out_n.reshape(1, -1), k)[0]


def _build(arguments: Arguments, inner: Body | None, parse: Any) -> Body:
    rows = arguments.integer("rows", 1, ROWS_MAX, 5)
    cols = arguments.integer("cols", 1, WINDOW_ALIGN, 512)
    chunk = arguments.integer("chunk", CHUNK_MIN, WINDOW_ALIGN, WINDOW_ALIGN, power_of_two=True)
    keep = arguments.integer("keep", 0, WINDOW_ALIGN, 0)
    arguments.end()
    if cols > chunk or keep > chunk:
        arguments.stage.refuse("cols and keep are at most the chunk", "sketch(rows=5, cols=512, chunk=16384, keep=64)")
    return sketch(rows, cols, chunk, keep, inner_codec(inner, arguments.stage, fixed=False))


STAGES = (
    Stage(
        "sketch",
        "transform",
        "sketch(rows=5, cols=512, chunk=16384, keep=0)",
        "Count sketch of every chunk: linear, mergeable; keep=k decodes the k largest coordinates of a chunk only.",
        "inner x rows x cols / chunk",
        "none",
        "Charikar, Chen, Farach-Colton 2002; arXiv:2007.07682",
        _build,
        ("sketch(rows=5, cols=512)|fp32", "sketch(rows=3, cols=256, chunk=4096, keep=16)|int8"),
    ),
)
