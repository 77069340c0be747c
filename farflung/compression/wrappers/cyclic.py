"""Cyclic fragments: every round another part of the vector, known from the round number, so that no index is sent."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from farflung.compression.codec import Row
from farflung.compression.grammar import Arguments
from farflung.compression.scheme import STRIDE, Field, Floats, Piece, Scheme, absmax_per_block, pieces
from farflung.compression.stage import Body, Coded, Stage, over, require
from farflung.protocol.rows import DenseRow, SparseRow

STRIPE = 1024
"""Coordinates in a row that are sent together: a model's matrices all have some in every round."""


def cyclic(parts: int, inner: Scheme) -> Scheme:
    """Round r sends the stripes whose number is r modulo `parts` in the format inside, and nothing of the others.

    A stripe is 1024 coordinates, or one block of the format inside if that is longer; `parts` is a power of two of at
    most 65536 / stripe. What is left at the end, n coordinates, has stripes of ceil(n / parts), the last ones moved
    back to fit, so that every round sends as much. Payload: the records of the sent stripes, as if they stood side by
    side. Bits: inner / parts. Sparse rows, zero where nothing was sent. Over `parts` rounds everything has its turn; it
    needs error feedback, and at 1 bit lookahead, to learn (Streaming DiLoCo's fragments, arXiv:2501.18512, §3, finer).
    """
    stripe = stripe_of(inner)
    require(parts >= 2 and not parts & (parts - 1) and parts * stripe <= STRIDE, f"no {parts} parts of {stripe}")
    return _at(0, parts, inner)._replace(
        in_round=lambda round_index: _at(round_index % parts, parts, inner.of(round_index))
    )


def stripe_of(inner: Scheme) -> int:
    """Coordinates in a stripe over this format."""
    return max(STRIPE, inner.block)


def _at(turn: int, parts: int, inner: Scheme) -> Scheme:
    """The format of the rounds in which stripe `turn` of every `parts` is sent; its records are as long in all."""
    block = parts * stripe_of(inner)

    def sent(n: int) -> int:
        return -(-n // parts)

    def first_of(n: int) -> int:
        return min(turn * sent(n), n - sent(n))

    def fields(n: int) -> tuple[Field, ...]:
        full, short = divmod(sent(n), inner.block)
        return full * inner.fields(inner.block) + (inner.fields(short) if short else ())

    def inside(piece: Piece, octets: Any) -> list[Piece]:
        start = piece.start // parts
        return list(pieces(inner, octets, start, start + len(piece.records_br) * sent(piece.n), base=start))

    def write(x_bn: Floats, piece: Piece, salt: int) -> None:
        absmax_per_block(x_bn)  # what is not sent must be finite, too
        octets = np.empty(piece.records_br.size, np.uint8)
        x_c = np.ascontiguousarray(x_bn[:, first_of(piece.n) :][:, : sent(piece.n)]).reshape(-1)
        for part in inside(piece, octets):
            first = part.start - piece.start // parts
            inner.write(x_c[first : first + part.size].reshape(-1, part.n), part, salt)
        piece.records_br[:] = octets.reshape(piece.records_br.shape)

    def check(piece: Piece) -> None:
        for part in inside(piece, piece.records_br.reshape(-1)):
            inner.check(part)

    def read(found: list[Piece], size: int) -> Row:
        row = inner.read(
            [part for piece in found for part in inside(piece, piece.records_br.reshape(-1))], count(found)
        )
        place_c, first = [], 0
        for piece in found:
            start_b = np.arange(first, first + piece.size, piece.n) + first_of(piece.n)
            place_c.append((start_b[:, None] + np.arange(sent(piece.n))).reshape(-1))
            first += piece.size
        index_c = torch.from_numpy(np.concatenate(place_c))
        if isinstance(row, DenseRow):
            return SparseRow(size, index_c, row.value_d)
        return SparseRow(size, index_c[row.index_k.long()], row.value_k)

    def count(found: list[Piece]) -> int:
        return sum(len(piece.records_br) * sent(piece.n) for piece in found)

    return Scheme(f"cyclic({parts})|{inner.spec}", block, fields, write, check, read, inner.salted, sparse=True)


def _build(arguments: Arguments, inner: Body | None, parse: Any) -> Body:
    scheme = inner.scheme if isinstance(inner, Coded) else inner
    if isinstance(scheme, Scheme) and "cyclic(" in scheme.spec:
        arguments.stage.refuse("both would take their turn from the same round: some parts would never be sent")
    parts_max = STRIDE // stripe_of(scheme) if isinstance(scheme, Scheme) else STRIDE // STRIPE
    if parts_max < 2:
        arguments.stage.refuse(f"needs blocks of at most {STRIDE // 2} after it")
    parts = arguments.integer("parts", 2, parts_max, power_of_two=True)
    arguments.end()
    return over(inner, arguments.stage, lambda value: cyclic(parts, value))


STAGES = (
    Stage(
        "cyclic",
        "sparsifier",
        "cyclic(parts)",
        "Every round another of so many parts, in stripes; the round number says which, so no index is sent.",
        "value/parts",
        "none",
        "cf. arXiv:2501.18512, §3",
        _build,
        ("ef(1)|cyclic(8)|q2", "cyclic(2)|topk(64/4096)|q2", "ef(1)|cyclic(8)|sign", "cyclic(2)|int8"),
    ),
)
