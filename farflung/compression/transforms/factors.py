"""What both low-rank codecs share: which tensors are worth factors, where factors lie, and how windows are rebuilt.

A tensor of two or more dimensions counts as a matrix [m, n] = [first dimension, all others]. Its factors are P [r, m]
and Q [r, n], one component after the other, so that a quantiser's blocks run along components. Its derived tensor is
`name.P` or `name.Q` if one of them is sent, and the vector `name.PQ` [r (m + n)], P before Q, if both are: there are
never more derived tensors than the model has. What is not worth it goes along unchanged, after all factors.
"""

from __future__ import annotations

from bisect import bisect_right
from functools import cache, lru_cache
from math import prod
from types import ModuleType
from typing import Literal, NamedTuple

import numpy as np

from farflung.compression.codec import Reader, Row
from farflung.compression.scheme import Floats, require_window
from farflung.compression.transforms.derived import Doubles, dense_row, seeded_uniform
from farflung.protocol.limits import PAYLOAD_ABS_MAX
from farflung.protocol.schema import Schema, TensorSpec

Sends = Literal["PQ", "P", "Q"]

FLOOR = 2.0**-36
"""A component of which less than this fraction is left after projection is rounding noise: fp64 sums err by 2**-50."""

REFILLS_MAX = 8
"""Tries at a random direction that is not in the span already; the first one fails with probability about 0."""


class Part(NamedTuple):
    """One tensor: where it lies in the vector and in the derived one. rows = 0: it goes along unchanged."""

    name: str
    start: int
    size: int
    rows: int
    columns: int
    at: int
    """Its first derived coordinate: P if it is sent, then Q."""


class Layout(NamedTuple):
    """The derived schema of what is sent, and the parts in order of the original vector."""

    derived: Schema
    parts: tuple[Part, ...]
    starts: tuple[int, ...]


class Factors(NamedTuple):
    """left [r, m] and right [r, n] of one matrix: sum over k of left[k, i] x right[k, j]."""

    left_rm: Doubles
    right_rn: Doubles


@cache
def kernels() -> ModuleType:
    """The numba kernels; imports numba on the first call."""
    from farflung.compression.kernels import lowrank

    return lowrank


@lru_cache(maxsize=16)
def layout_of(schema: Schema, rank: int, sends: Sends) -> Layout:
    """Factors first, in order of the tensors, then what goes along. "PQ" needs r (m + n) < m n, one factor r < m, n."""
    tensors: list[TensorSpec] = []
    parts: list[Part] = []
    at = 0

    def add(name: str, shape: tuple[int, ...]) -> None:
        nonlocal at
        tensors.append(TensorSpec(f"{len(tensors):04d}.{name}", shape, "float32"))
        at += prod(shape)

    plain = []
    for tensor, start in zip(schema.tensors, schema.offsets, strict=True):
        rows, columns = (tensor.shape[0], prod(tensor.shape[1:])) if len(tensor.shape) > 1 else (1, tensor.numel)
        smaller = rank * (rows + columns) < rows * columns if sends == "PQ" else rank < min(rows, columns)
        if not smaller:
            plain.append((tensor, start))
            continue
        parts.append(Part(tensor.name, start, tensor.numel, rows, columns, at))
        shapes = {"PQ": (rank * (rows + columns),), "P": (rank, rows), "Q": (rank, columns)}
        add(f"{tensor.name}.{sends}", shapes[sends])
    for tensor, start in plain:
        parts.append(Part(tensor.name, start, tensor.numel, 0, 0, at))
        add(tensor.name, tensor.shape)
    parts.sort(key=lambda part: part.start)
    return Layout(Schema(tuple(tensors)), tuple(parts), tuple(part.start for part in parts))


def matrix_of(part: Part, update_d: Floats) -> Floats:
    """The part's [m, n] view of a vector."""
    return update_d[part.start : part.start + part.size].reshape(part.rows, part.columns)


def reader_of(layout: Layout, factors: list[Factors | Floats]) -> Reader:
    """Windows of the matrices that the factors multiply to, and of what went along; `factors` go with the parts."""
    d = layout.starts[-1] + layout.parts[-1].size
    multiply = kernels().product

    def read(start: int, stop: int) -> Row:
        require_window(start, stop, d)
        out_d = np.empty(stop - start, np.float32)
        number = bisect_right(layout.starts, start) - 1
        while number < len(layout.parts) and layout.starts[number] < stop:
            part, factor = layout.parts[number], factors[number]
            first, last = max(start - part.start, 0), min(stop - part.start, part.size)
            out = out_d[part.start + first - start : part.start + last - start]
            if isinstance(factor, Factors):
                multiply(factor.left_rm, factor.right_rn, first, PAYLOAD_ABS_MAX, out)
            else:
                out[:] = factor[first:last]
            number += 1
        return dense_row(out_d)

    return read


def left_times(matrix_mn: Floats, right_rn: Doubles) -> Doubles:
    """M right, as [r, m]."""
    out_rm = np.empty((len(right_rn), matrix_mn.shape[0]))
    kernels().times(matrix_mn, right_rn, out_rm)
    return out_rm


def right_times(matrix_mn: Floats, left_rm: Doubles) -> Doubles:
    """M^T left, as [r, n]."""
    out_rn = np.empty((len(left_rm), matrix_mn.shape[1]))
    kernels().transposed_times(matrix_mn, left_rm, out_rn)
    return out_rn


def orthonormal_or_zero(basis_rn: Doubles) -> None:
    """Gram-Schmidt in place; components that lie in the span of those before them become zero."""
    done = 0
    while done < len(basis_rn):
        done = kernels().orthonormalise(basis_rn, done, FLOOR) + 1


def orthonormal(basis_rn: Doubles, label: str) -> None:
    """Gram-Schmidt in place; components that lie in the span of those before them become random directions."""
    done = kernels().orthonormalise(basis_rn, 0, FLOOR)
    for attempt in range(REFILLS_MAX * len(basis_rn)):
        if done == len(basis_rn):
            return
        basis_rn[done] = seeded_uniform(f"{label} {done} {attempt}", basis_rn.shape[1])
        done = kernels().orthonormalise(basis_rn, done, FLOOR)
