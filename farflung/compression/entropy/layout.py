"""How an entropy coder cuts records into parts of one kind each; every number here follows from the schema.

A piece (b records of one width) is cut into parts: the bytes that stay as they are, the symbols of each width, the
index lists. A part gathers all fields of its kind, field by field, and within a field record by record, so that short
fields share one table of frequencies. The kernels read the cut as two small arrays of integers.
"""

from __future__ import annotations

from functools import lru_cache
from math import comb
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from farflung.compression.scheme import Field

Cut = NDArray[np.int64]

BYTES, CODES, PLANE, RICE, ELIAS = range(5)
"""Kinds of parts: kept bytes, symbols, every fourth byte of raw fields, gaps by Golomb-Rice, indices by Elias-Fano."""

PLANES = 4
"""Raw fields hold fp32 or bf16 numbers: the bytes at one place modulo 4 are alike (signs with exponents, mantissas)."""

CODABLE_MIN = 64
"""Fewer symbols than this are kept as they are: the table and the final states would eat the gain."""


class Plan(NamedTuple):
    """The parts of a record of n coordinates; rows of small integers, as the kernels take them."""

    part_p5: Cut
    """Per part: kind, bits of a symbol, first row in `field_f6`, number of rows, the plane of a PLANE."""
    field_f6: Cut
    """Per field, grouped by part: offset in the record, length, bits, limit, bytes, low bits of an index code."""
    flag_bytes: int
    """Length of the flags at the head of a piece: one bit for each part."""
    record_bytes: int


@lru_cache(maxsize=1024)
def plan(fields: tuple[Field, ...], *, symbols: bool, index: int) -> Plan:
    """The cut of a record. `symbols`: code them by rANS, else they stay; `index`: RICE, ELIAS or BYTES."""
    rows: dict[tuple[int, int, int], list[tuple[int, ...]]] = {}
    offset = 0
    for field in fields:
        low = _low_bits(field, index) if field.kind == "index" and field.length else 0
        row = (offset, field.length, field.bits, field.limit, field.nbytes, low)
        offset += field.nbytes
        for part in _parts_of(field, symbols, index):
            group = rows.setdefault(part, [])
            if part[0] == BYTES and group and group[-1][0] + group[-1][4] == row[0]:
                group[-1] = (group[-1][0], 0, 0, 0, group[-1][4] + field.nbytes, 0)  # neighbours move as one
            else:
                group.append(row)
    parts: list[tuple[int, ...]] = []
    flat: list[tuple[int, ...]] = []
    for (kind, bits, plane), group in sorted(rows.items()):
        parts.append((kind, bits, len(flat), len(group), plane))
        flat += group
    return Plan(np.array(parts, np.int64), np.array(flat, np.int64), -(-len(parts) // 8), offset)


def _parts_of(field: Field, symbols: bool, index: int) -> list[tuple[int, int, int]]:
    if field.kind == "index":
        return [(index, 0, 0)]
    if not symbols or not field.length:
        return [(BYTES, 0, 0)]
    if field.kind == "codes":
        return [(CODES, field.bits, 0)]
    return [(PLANE, 8, plane) for plane in range(PLANES)]


def _low_bits(field: Field, index: int) -> int:
    if index == ELIAS:
        return elias_bits(field.length, field.limit)
    return rice_bits(field.length, field.limit) if index == RICE else 0


@lru_cache(maxsize=1024)
def rice_bits(k: int, n: int) -> int:
    """The parameter b with the shortest code on average, if all sets of k indices of n are alike; the least of equals.

    A gap is at least j with chance C(n - j, k) / C(n, k), so it costs b + 1 + sum over q >= 1 of C(n - q 2^b, k) /
    C(n, k) bits. In whole numbers, so that every machine agrees; once per format.
    """
    widths = range(n.bit_length() + 1)
    quotients = [0] * len(widths)
    sets = whole = comb(n, k)
    for gap in range(1, n - k + 1):
        sets = sets * (n - gap + 1 - k) // (n - gap + 1)
        for b in range(min(gap & -gap, 1 << n.bit_length()).bit_length()):
            quotients[b] += sets
    return min(widths, key=lambda b: b * whole + quotients[b])


def elias_bits(k: int, n: int) -> int:
    """Low bits of Elias-Fano: floor(log2(n / k)) (Elias 1974; Fano 1971)."""
    return (n // k).bit_length() - 1
