"""Whole pieces of records in numba: cut into parts by a `layout.Plan`, each part coded where that is shorter, and back.

One call per piece and direction: at one value in 64 a stretch holds a thousand of them, and calls would cost more than
they. A piece is its flags (bit i of the first bytes: part i is coded; the rest are 0), then the parts in order, each to
a whole byte. A part is coded if and only if that is strictly shorter than its bytes as they are; symbols also only if
`rans.estimate` says so, which spares both sides the attempt.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from farflung.compression.entropy.layout import BYTES, CODABLE_MIN, CODES, ELIAS, PLANE, PLANES, Cut
from farflung.compression.kernels import Octets
from farflung.compression.kernels.numba_cpu import jit
from farflung.compression.kernels.rans import (
    TABLE_BYTES_MAX,
    build,
    decode,
    encode,
    estimate,
    parse,
    precision,
    tally,
)
from farflung.compression.kernels.rice import (
    BAD_FLAGS,
    ENDS_EARLY,
    NOT_SMALLER,
    NOT_SORTED,
    OTHER_TABLE,
    elias_bits,
    elias_decode,
    elias_encode,
    ended,
    rice_decode,
    rice_encode,
    rice_gaps,
    signed,
    words_of,
)

Lengths = NDArray[np.uint32]

MOVED_MIN = 32
"""From this many bytes on, setting up a vectorised copy pays."""


@jit
def _plane_length(length: int, plane: int) -> int:
    """How many of `length` bytes lie at the plane's place modulo PLANES."""
    return (length - plane + PLANES - 1) // PLANES


@jit
def _numbers(blocks: int, part_5: Any, field_f6: Cut) -> tuple[int, int]:
    """How many symbols or indices a part has, and how many bytes as it stands in the records."""
    numbers, octets = 0, 0
    for f in range(len(field_f6)):
        if part_5[0] == PLANE:
            count = _plane_length(field_f6[f, 1], part_5[4])
            numbers += count
            octets += count
        else:
            numbers += field_f6[f, 1]
            octets += field_f6[f, 4]
    return signed(numbers * blocks), signed(octets * blocks)


@jit
def _gather(records_br: Octets, part_5: Any, field_f6: Cut, symbol_n: Octets) -> None:
    """The symbols of CODES or a PLANE in order."""
    at, bits = 0, part_5[1]
    mask = np.uint8((1 << bits) - 1)
    for f in range(len(field_f6)):
        offset, length, octets = field_f6[f, 0], field_f6[f, 1], field_f6[f, 4]
        for r in range(len(records_br)):
            if part_5[0] == PLANE:
                plane_r = records_br[r, offset + part_5[4] : offset + length : PLANES]
                for j in range(len(plane_r)):
                    symbol_n[at + j] = plane_r[j]
                at += len(plane_r)
                continue
            code_r = records_br[r, offset : offset + octets]
            for slot in range(8 // bits):
                first = slot * octets
                out_n = symbol_n[at + min(first, length) : at + min(first + octets, length)]
                shift = np.uint8(slot * bits)
                for j in range(len(out_n)):
                    out_n[j] = code_r[j] >> shift & mask
            at += length


@jit
def _scatter(symbol_n: Octets, part_5: Any, field_f6: Cut, records_br: Octets) -> None:
    """The inverse of `_gather`; codes past the end of a field become 0."""
    at, bits = 0, part_5[1]
    for f in range(len(field_f6)):
        offset, length, octets = field_f6[f, 0], field_f6[f, 1], field_f6[f, 4]
        for r in range(len(records_br)):
            if part_5[0] == PLANE:
                plane_r = records_br[r, offset + part_5[4] : offset + length : PLANES]
                for j in range(len(plane_r)):
                    plane_r[j] = symbol_n[at + j]
                at += len(plane_r)
                continue
            code_r = records_br[r, offset : offset + octets]
            code_r[:] = 0
            for slot in range(8 // bits):
                first = slot * octets
                in_n = symbol_n[at + min(first, length) : at + min(first + octets, length)]
                shift = np.uint8(slot * bits)
                for j in range(len(in_n)):
                    code_r[j] |= np.uint8(in_n[j] << shift)
            at += length


@jit
def _keep(records_br: Octets, part_5: Any, field_f6: Cut, out_r: Octets, at: int) -> int:
    """Copy a part's bytes to the stream as they are; return the end."""
    for f in range(len(field_f6)):
        offset, octets = field_f6[f, 0], field_f6[f, 4]
        for r in range(len(records_br)):
            byte_r = records_br[r, offset : offset + octets]
            if part_5[0] != PLANE and octets >= MOVED_MIN:
                out_r[at : at + octets] = byte_r
                at += octets
                continue
            if part_5[0] != PLANE:
                for j in range(octets):
                    out_r[at + j] = byte_r[j]
                at += octets
                continue
            for j in range(part_5[4], octets, PLANES):
                out_r[at] = byte_r[j]
                at += 1
    return at


@jit
def _restore(in_r: Octets, at: int, part_5: Any, field_f6: Cut, records_br: Octets) -> int:
    """The inverse of `_keep`."""
    for f in range(len(field_f6)):
        offset, octets = field_f6[f, 0], field_f6[f, 4]
        for r in range(len(records_br)):
            byte_r = records_br[r, offset : offset + octets]
            if part_5[0] != PLANE and octets >= MOVED_MIN:
                byte_r[:] = in_r[at : at + octets]
                at += octets
                continue
            if part_5[0] != PLANE:
                for j in range(octets):
                    byte_r[j] = in_r[at + j]
                at += octets
                continue
            for j in range(part_5[4], octets, PLANES):
                byte_r[j] = in_r[at]
                at += 1
    return at


@jit
def _encode_symbols(symbol_n: Octets, bits: int, octets: int, out_r: Octets, at: int) -> int:
    """Write the table and the stream; NOT_SMALLER if the part stays as it is, of `octets` bytes."""
    if len(symbol_n) < CODABLE_MIN:
        return NOT_SMALLER
    s = precision(bits, len(symbol_n))
    count_c, freq_c = np.zeros(1 << bits, np.int64), np.zeros(1 << bits, np.uint32)
    tally(symbol_n, count_c)
    table_r = np.zeros(TABLE_BYTES_MAX, np.uint8)
    table_bytes = build(count_c, s, freq_c, table_r)
    if estimate(count_c, freq_c, s, table_bytes, len(symbol_n)) >= octets:
        return NOT_SMALLER
    out_r[at : at + table_bytes] = table_r[:table_bytes]
    return encode(symbol_n, freq_c, s, out_r, at + table_bytes, at + octets)


@jit
def _decode_symbols(in_r: Octets, at: int, bits: int, octets: int, symbol_n: Octets) -> int:
    """The inverse: the end, or a fault if any other bytes than these would be written for its symbols."""
    if len(symbol_n) < CODABLE_MIN:
        return BAD_FLAGS
    s = precision(bits, len(symbol_n))
    freq_c = np.zeros(1 << bits, np.uint32)
    after = parse(in_r, at, s, freq_c)
    if after < 0:
        return after
    end = decode(in_r, after, freq_c, s, symbol_n)
    if end < 0:
        return end
    count_c, table_r = np.zeros(1 << bits, np.int64), np.zeros(TABLE_BYTES_MAX, np.uint8)
    tally(symbol_n, count_c)
    table_bytes = build(count_c, s, freq_c, table_r)
    if table_bytes != after - at:
        return OTHER_TABLE
    for j in range(table_bytes):
        if table_r[j] != in_r[at + j]:
            return OTHER_TABLE
    if end - at >= octets or estimate(count_c, freq_c, s, table_bytes, len(symbol_n)) >= octets:
        return NOT_SMALLER
    return end


@jit
def _encode_part(records_br: Octets, part_5: Any, field_f6: Cut, out_r: Octets, at: int) -> int:
    """Write a part's code; NOT_SMALLER (or NOT_SORTED) if it stays as it is."""
    kind, bits = part_5[0], part_5[1]
    numbers, octets = _numbers(len(records_br), part_5, field_f6)
    if kind in (CODES, PLANE):
        symbol_n = np.empty(numbers, np.uint8)
        _gather(records_br, part_5, field_f6, symbol_n)
        return _encode_symbols(symbol_n, bits, octets, out_r, at)
    gap_n = np.empty(numbers, np.int32)
    length = rice_gaps(records_br, field_f6, gap_n)
    if length < 0:
        return length
    if kind == ELIAS:
        length = elias_bits(len(records_br), field_f6)
    octets_coded = (length + 7) >> 3
    if octets_coded >= octets:
        return NOT_SMALLER
    word_w = np.zeros((length >> 6) + 2, np.uint64)
    if kind == ELIAS:
        elias_encode(gap_n, len(records_br), field_f6, word_w)
    else:
        rice_encode(gap_n, len(records_br), field_f6, word_w)
    out_r[at : at + octets_coded] = word_w.view(np.uint8)[:octets_coded]
    return at + octets_coded


@jit
def _decode_part(in_r: Octets, at: int, part_5: Any, field_f6: Cut, records_br: Octets) -> int:
    """The inverse of `_encode_part`: the end, or a fault."""
    kind, bits = part_5[0], part_5[1]
    numbers, octets = _numbers(len(records_br), part_5, field_f6)
    if kind in (CODES, PLANE):
        symbol_n = np.empty(numbers, np.uint8)
        end = _decode_symbols(in_r, at, bits, octets, symbol_n)
        if end >= 0:
            _scatter(symbol_n, part_5, field_f6, records_br)
        return end
    word_w = words_of(in_r, at)
    if kind == ELIAS:
        if elias_bits(len(records_br), field_f6) > 8 * (len(in_r) - at):
            return ENDS_EARLY
        end = elias_decode(word_w, records_br, field_f6)
    else:
        end = rice_decode(word_w, records_br, field_f6)
    if end < 0:
        return end
    end = ended(word_w, end)
    if end < 0:
        return end
    return NOT_SMALLER if end >= octets else ENDS_EARLY if at + end > len(in_r) else at + end


@jit
def encode_piece(records_br: Octets, part_p5: Cut, field_f6: Cut, out_r: Octets, at: int) -> int:
    """Write a piece from byte `at` of out_r, which has room for flags and records; the end, or NOT_SORTED."""
    flags = at
    for _ in range((len(part_p5) + 7) // 8):
        out_r[at] = 0
        at += 1
    for p in range(len(part_p5)):
        part_5 = part_p5[p]
        rows_f6 = field_f6[part_5[2] : part_5[2] + part_5[3]]
        end = NOT_SMALLER
        if part_5[0] != BYTES:
            end = _encode_part(records_br, part_5, rows_f6, out_r, at)
        if end == NOT_SORTED:
            return end
        if end >= 0:
            out_r[flags + (p >> 3)] |= np.uint8(1 << (p & 7))
            at = end
        else:
            at = _keep(records_br, part_5, rows_f6, out_r, at)
    return at


@jit
def decode_piece(in_r: Octets, at: int, part_p5: Cut, field_f6: Cut, records_br: Octets) -> int:
    """Fill records_br from the piece that starts at byte `at`; its end, or a fault unless `encode_piece` makes it."""
    flags = at
    at += (len(part_p5) + 7) // 8
    if at > len(in_r):
        return ENDS_EARLY
    if len(part_p5) & 7 and in_r[at - 1] >> (len(part_p5) & 7):
        return BAD_FLAGS
    scratch_r = np.empty(0, np.uint8)
    for p in range(len(part_p5)):
        part_5 = part_p5[p]
        rows_f6 = field_f6[part_5[2] : part_5[2] + part_5[3]]
        coded = in_r[flags + (p >> 3)] >> (p & 7) & 1
        if coded:
            if part_5[0] == BYTES:
                return BAD_FLAGS
            at = _decode_part(in_r, at, part_5, rows_f6, records_br)
            if at < 0:
                return at
            continue
        octets = _numbers(len(records_br), part_5, rows_f6)[1]
        if at + octets > len(in_r):
            return ENDS_EARLY
        at = _restore(in_r, at, part_5, rows_f6, records_br)
        if part_5[0] != BYTES:
            if len(scratch_r) < octets:
                scratch_r = np.empty(octets + TABLE_BYTES_MAX + 32, np.uint8)
            end = _encode_part(records_br, part_5, rows_f6, scratch_r, 0)
            if end != NOT_SMALLER:
                return NOT_SORTED if end == NOT_SORTED else NOT_SMALLER
    return at


@jit
def encode_sections(
    records_br: Octets, per: int, part_p5: Cut, field_f6: Cut, out_r: Octets, at: int, length_s: Lengths
) -> int:
    """Pieces of `per` records each, the last maybe of fewer, one after the other from byte `at` of out_r on; the end,
    or NOT_SORTED. Adds to their lengths, since a short record makes a second piece in its section."""
    for s in range((len(records_br) + per - 1) // per):
        end = encode_piece(records_br[s * per : (s + 1) * per], part_p5, field_f6, out_r, at)
        if end < 0:
            return end
        length_s[s] += np.uint32(end - at)
        at = end
    return at


@jit
def decode_sections(
    in_r: Octets, end_s: Cut, at_s: Cut, per: int, part_p5: Cut, field_f6: Cut, records_br: Octets
) -> int:
    """The inverse: each piece starts at byte at_s[s], which becomes its end, and no byte from end_s[s] on is read."""
    for s in range((len(records_br) + per - 1) // per):
        section_br = records_br[s * per : (s + 1) * per]
        at = decode_piece(in_r[: end_s[s]], at_s[s], part_p5, field_f6, section_br)
        if at < 0:
            return at
        at_s[s] = at
    return 0
