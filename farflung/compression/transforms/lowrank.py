"""Low rank by one warm-started power iteration for every matrix: PowerSGD (arXiv:1905.13727)."""

from __future__ import annotations

from math import frexp, ldexp
from typing import Any

import numpy as np
import torch
from torch import Tensor

from farflung.compression.codec import Codec, Reader
from farflung.compression.grammar import Arguments
from farflung.compression.scheme import Floats
from farflung.compression.stage import Body, Stage, require
from farflung.compression.transforms.derived import (
    Doubles,
    inner_codec,
    read_whole,
    saved_floats,
    seeded_uniform,
    to_floats,
)
from farflung.compression.transforms.factors import (
    Factors,
    Layout,
    Part,
    kernels,
    layout_of,
    left_times,
    matrix_of,
    orthonormal_or_zero,
    reader_of,
    right_times,
)
from farflung.compression.transforms.shared_basis import shared_lowrank
from farflung.compression.transforms.transform import Transform, transformed
from farflung.protocol.schema import Schema

RANK_MAX = 1024
"""Beyond this no known update is of low rank, and Gram-Schmidt costs more than the products."""


def lowrank(rank: int, inner: Codec) -> Codec:
    """Send P = orth(M Q) and M^T P of every matrix M [m, n] through the inner codec; M^ = P (M^T P)^T.

    Q, kept by the member, is the last round's M^T P (arXiv:1905.13727, Alg. 1 with the warm start of §4.2), so that a
    matrix that stays the same is approximated ever better: one power iteration per round. Each matrix by itself; exact
    up to rounding where its rank is at most r. ||M - M^|| <= ||M||, in exact arithmetic of the inner codec.
    Component k of P is sent times 2**a, that of M^T P times 2**-a, such that both have entries of about one size: a
    quantiser's block that reaches across them loses little. (Fitting M^T P to the *decoded* P would take 0.1 % off
    the error at four bits, measured on a spectrum 1/sqrt(k): P's quantisation error is a random direction among m. At
    two bits it would take 8 %; there `shared` is better, which quantises one factor only.)
    A component without anything to say is sent as zeros and starts anew from random numbers in the next round.
    Costs r (m + n) / (m n) inner parameters per parameter. State: Q, r x n numbers per matrix. Opening a payload takes
    one pass and memory of the factors. Biased, so that it belongs behind `ef`: `ef(1)|lowrank(4)|int4` (DiLoCoX).
    """

    def derived(schema: Schema) -> Schema:
        return layout_of(schema, rank, "PQ").derived

    def forward(update_d: Floats, schema: Schema, own: Any, round_index: int) -> tuple[Floats, Any]:
        return _factorise(update_d, layout_of(schema, rank, "PQ"), own, round_index)

    def reader(read: Reader, schema: Schema, round_index: int) -> Reader:
        layout = layout_of(schema, rank, "PQ")
        derived_d = read_whole(read, layout.derived.numel)
        return reader_of(layout, [_factors(part, derived_d, rank) for part in layout.parts])

    def fresh(schema: Schema) -> tuple[Floats, ...]:
        parts = _matrices(schema, rank)
        return tuple(to_floats(seeded_uniform(f"lowrank {part.name}", rank, part.columns)) for part in parts)

    def save(schema: Schema, own: Any) -> dict[str, Tensor]:
        named = zip(_matrices(schema, rank), own, strict=True)
        return {f"own.{part.name}.Q": torch.from_numpy(right_rn) for part, right_rn in named}

    def restore(schema: Schema, tensors: dict[str, Tensor]) -> tuple[Floats, ...]:
        parts = _matrices(schema, rank)
        return tuple(saved_floats(tensors, f"own.{part.name}.Q", (rank, part.columns)) for part in parts)

    require(1 <= rank <= RANK_MAX, f"a rank is from 1 to {RANK_MAX}, got {rank}")
    return transformed(Transform(f"lowrank({rank})", derived, forward, reader, fresh, save, restore), inner)


def _matrices(schema: Schema, rank: int) -> list[Part]:
    return [part for part in layout_of(schema, rank, "PQ").parts if part.rows]


def _factorise(
    update_d: Floats, layout: Layout, own: tuple[Floats, ...], round_index: int
) -> tuple[Floats, tuple[Floats, ...]]:
    """The derived vector, and the next Q of every matrix."""
    derived_d = np.empty(layout.derived.numel, np.float32)
    warm: list[Floats] = []
    for part in layout.parts:
        if not part.rows:
            derived_d[part.at : part.at + part.size] = update_d[part.start : part.start + part.size]
            continue
        matrix_mn, right_rn = matrix_of(part, update_d), own[len(warm)].astype(np.float64)
        silent_r = ~right_rn.any(1)
        if silent_r.any():
            right_rn[silent_r] = seeded_uniform(f"lowrank {part.name} {round_index}", *right_rn.shape)[silent_r]
        left_rm = left_times(matrix_mn, right_rn)
        orthonormal_or_zero(left_rm)
        right_rn = right_times(matrix_mn, left_rm)
        _balance(left_rm, right_rn)
        left, right = to_floats(left_rm), to_floats(right_rn)
        derived_d[part.at : part.at + left.size] = left.reshape(-1)
        derived_d[part.at + left.size : part.at + left.size + right.size] = right.reshape(-1)
        warm.append(right)
    return derived_d, tuple(warm)


def _balance(left_rm: Doubles, right_rn: Doubles) -> None:
    """Move a power of two from each right component to its left one, so that their mean squares differ by < 16 x."""
    dot = kernels().dot
    for k, right_n in enumerate(right_rn):
        size = dot(right_n, right_n) / right_rn.shape[1] * left_rm.shape[1]
        shift = frexp(size)[1] // 4
        left_rm[k] *= ldexp(1.0, shift) if size > 0 else 0.0
        right_rn[k] *= ldexp(1.0, -shift)


def _factors(part: Part, derived_d: Floats, rank: int) -> Factors | Floats:
    if not part.rows:
        return derived_d[part.at : part.at + part.size]
    middle = part.at + rank * part.rows
    left_rm = derived_d[part.at : middle].reshape(rank, part.rows)
    right_rn = derived_d[middle : middle + rank * part.columns].reshape(rank, part.columns)
    return Factors(left_rm.astype(np.float64), right_rn.astype(np.float64))


def _build(arguments: Arguments, inner: Body | None, parse: Any) -> Body:
    rank = arguments.integer("rank", 1, RANK_MAX)
    basis = arguments.word("basis", ("own", "shared"), "own")
    arguments.end()
    codec = inner_codec(inner, arguments.stage, fixed=False)
    return shared_lowrank(rank, codec) if basis == "shared" else lowrank(rank, codec)


STAGES = (
    Stage(
        "lowrank",
        "transform",
        "lowrank(rank, basis=own)",
        "Every matrix as a product of two thin ones by warm-started power iteration; basis=shared: one of them is "
        "known to all and rotates with the aggregate.",
        "inner x rank (m + n) / (m n); shared: inner x rank / n and rank / m in turn",
        "private: rank x n per matrix; shared: rank x m or n per matrix",
        "arXiv:1905.13727, Alg. 1",
        _build,
        (
            "lowrank(4)|fp32",
            "ef(1)|lowrank(2)|int8",
            "lowrank(4, shared)|fp32",
            "ef(1)|lowrank(2, shared)|int8",
        ),
    ),
)
