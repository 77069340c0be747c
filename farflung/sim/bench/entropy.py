"""How short a payload could be: the entropy of its records' parts, counted apart from any coder."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from farflung.compression.codec import Codec
from farflung.compression.scheme import Field, Piece, Scheme, pieces, strides
from farflung.protocol.schema import Schema

Octets = NDArray[np.uint8]


def bound_bits(codec: Codec, payload: bytes, schema: Schema, round_index: int) -> float | None:
    """Bits per parameter that a perfect coder of this payload's records needs; None if the codec has no records.

    Raw bytes (scales) count in full, an index list log2 C(limit, length), codes their zero-order entropy per payload.
    """
    if codec.records is None:
        return None
    bits = 0.0
    for scheme, octets, d in codec.records(payload, schema, round_index):
        records, counts = np.frombuffer(octets, np.uint8), {width: np.zeros(1 << width) for width in (1, 2, 4, 8)}
        for start, stop in strides(0, d):
            for piece in pieces(scheme, records, start, stop):
                bits += _piece_bits(scheme, piece, counts)
        bits += sum(entropy(count_s) for count_s in counts.values())
    return bits / schema.numel


def _piece_bits(scheme: Scheme, piece: Piece, counts: dict[int, NDArray[np.float64]]) -> float:
    """Bits of a piece without its codes, which are added to the counts."""
    offset, bits = 0, 0.0
    for field in scheme.fields(piece.n):
        part_br = piece.records_br[:, offset : offset + field.nbytes]
        offset += field.nbytes
        if field.kind == "raw":
            bits += 8.0 * part_br.size
        elif field.kind == "index":
            bits += len(part_br) * log2_choose(field.limit, field.length)
        else:
            counts[field.bits] += np.bincount(symbols(part_br, field), minlength=1 << field.bits)
    return bits


def symbols(part_br: Octets, field: Field) -> NDArray[np.intp]:
    """The codes of b records, one after the other, in whatever order: [b x length]."""
    slots = 8 // field.bits
    mask = (1 << field.bits) - 1
    lanes = [part_br >> (field.bits * slot) & mask for slot in range(slots)]
    return np.concatenate(lanes, axis=1)[:, : field.length].reshape(-1).astype(np.intp)


def entropy(count_s: NDArray[np.float64]) -> float:
    """Bits of a message with these counts of symbols, without the counts themselves."""
    total, used_s = count_s.sum(), count_s[count_s > 0]
    return float(-(used_s * np.log2(used_s / total)).sum()) if total else 0.0


def log2_choose(n: int, k: int) -> float:
    """log2 of the number of ways to choose k of n."""
    return (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)) / math.log(2)
