"""rANS, its tables, and whole pieces in plain Python with whole numbers of any size: slow, and what is meant."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from farflung.compression.entropy.layout import CODABLE_MIN, CODES, ELIAS, PLANE, PLANES, RICE, Plan
from farflung.compression.kernels import Octets
from farflung.compression.kernels.rice_reference import elias_fano, number_bits, rice, to_bytes

LOW = 1 << 15
"""The least state, and every state's first value."""

PRECISION_MAX = 12
"""Frequencies sum to 2^12 at most: 15 bits of state keep three to spare."""

UNITS = 1 << 16
"""Lengths of codes are counted in 2^-16 bits."""


def _log2_table() -> NDArray[np.int64]:
    """log2(n) in UNITS, rounded down bit by bit in integers, for n = 1..4097, where the last line ends (0 at 0)."""
    log_n = np.zeros((1 << PRECISION_MAX) + 2, np.int64)
    for n in range(1, len(log_n)):
        whole = n.bit_length() - 1
        mantissa, found = (n << 31) >> whole, whole
        for _ in range(16):
            mantissa = mantissa * mantissa >> 31
            found = found * 2 + (mantissa >> 32)
            mantissa >>= mantissa >> 32
        log_n[n] = found
    return log_n


LOG2 = _log2_table()


def log2(n: int) -> int:
    """log2(n) in UNITS: the table, and between its points a straight line."""
    shift = max(0, n.bit_length() - 13)
    shift += n >> shift > 4096
    base, rest = n >> shift, n & (1 << shift) - 1
    slope = int(LOG2[base + 1] - LOG2[base]) if rest else 0
    return int(LOG2[base]) + (slope * rest >> shift) + shift * UNITS


def precision(bits: int, n: int) -> int:
    """Frequencies of n symbols sum to 2^this."""
    return min(max(n.bit_length() - 2, 8 if bits < 8 else 10), PRECISION_MAX)


def lanes(n: int) -> int:
    """States that take turns."""
    return 4 if n >= 4096 else 1


class Node:
    """A run of symbols: how often they occur, and whether naming the halves' shares pays."""

    def __init__(self, count_c: Sequence[int], s: int) -> None:
        self.total, self.size = sum(count_c), len(count_c)
        self.halves: tuple[Node, Node] | None = None
        self.split, self.least, self.cost = False, min(self.total, 1), 0
        if self.size == 1:
            return
        half = self.size // 2
        self.halves = left, right = Node(count_c[:half], s), Node(count_c[half:], s)
        if not self.total:
            return
        even = self.total * (self.size.bit_length() - 1) * UNITS
        parted = left.cost + right.cost + s * UNITS
        if left.total and right.total:
            parted += self.total * log2(self.total) - left.total * log2(left.total) - right.total * log2(right.total)
        self.split = parted < even
        self.least = left.least + right.least if self.split else self.size
        self.cost = min(parted, even) + UNITS

    def write(self, frequency: int) -> tuple[list[int], list[int]]:
        """(bits of the table, frequencies) of the symbols under this node."""
        if self.halves is None or not frequency:
            return [], [frequency] * self.size if self.size == 1 else [0] * self.size
        if not self.split:
            each, over = divmod(frequency, self.size)
            return [0], [each + (symbol < over) for symbol in range(self.size)]
        left, right = self.halves
        share = (2 * frequency * left.total + self.total) // (2 * self.total)
        share = min(max(share, left.least), frequency - right.least)
        share = 0 if not left.total else frequency if not right.total else share
        bits_left, freq_left = left.write(share)
        bits_right, freq_right = right.write(frequency - share)
        return [1, *number_bits(share, frequency.bit_length()), *bits_left, *bits_right], freq_left + freq_right


def encode(symbols: Sequence[int], freq_c: Sequence[int], s: int) -> bytes:
    """Final states, then 16-bit words in the order in which a decoder wants them."""
    start_c = [sum(freq_c[:c]) for c in range(len(freq_c))]
    states, words = [LOW] * lanes(len(symbols)), []
    for i in reversed(range(len(symbols))):
        c, lane = symbols[i], i % len(states)
        if states[lane] >= freq_c[c] << (31 - s):
            words.append(states[lane] & 0xFFFF)
            states[lane] >>= 16
        quotient, rest = divmod(states[lane], freq_c[c])
        states[lane] = (quotient << s) + start_c[c] + rest
    return b"".join(x.to_bytes(4, "little") for x in states) + b"".join(
        w.to_bytes(2, "little") for w in reversed(words)
    )


def code_symbols(symbols: Sequence[int], bits: int, octets: int) -> bytes | None:
    """Table and stream, or None if the part stays as it is, of so many bytes."""
    n = len(symbols)
    if n < CODABLE_MIN:
        return None
    s, count_c = precision(bits, n), [symbols.count(c) for c in range(1 << bits)]
    table_bits, freq_c = Node(count_c, s).write(1 << s)
    table = to_bytes(table_bits)
    units = sum(count * (s * UNITS - int(LOG2[freq])) for count, freq in zip(count_c, freq_c, strict=True) if count)
    if len(table) + 4 * lanes(n) + (units // UNITS + 8) // 8 >= octets:
        return None
    found = table + encode(symbols, freq_c, s)
    return found if len(found) < octets else None


def encode_piece(records_br: Octets, cut: Plan) -> bytes:
    """A piece as `rans_pieces.encode_piece` writes it."""
    flags, body = 0, b""
    for p, (kind, bits, first, rows, plane) in enumerate(cut.part_p5.tolist()):
        kept, numbers, lists = b"", [], []
        for offset, length, width, limit, octets, low in cut.field_f6[first : first + rows].tolist():
            for record in records_br[:, offset : offset + octets].tolist():
                part = record[plane::PLANES] if kind == PLANE else record
                kept += bytes(part)
                if kind == PLANE:
                    numbers += part
                elif kind == CODES:
                    numbers += [byte >> slot & (1 << bits) - 1 for slot in range(0, 8, bits) for byte in record][
                        :length
                    ]
                elif kind in (RICE, ELIAS):
                    whole = int.from_bytes(bytes(record), "little")
                    index_k = [whole >> i * width & (1 << width) - 1 for i in range(length)]
                    lists += rice(index_k, low) if kind == RICE else elias_fano(index_k, limit, low)
        coded = code_symbols(numbers, bits, len(kept)) if kind in (PLANE, CODES) else None
        if kind in (RICE, ELIAS) and -(-len(lists) // 8) < len(kept):
            coded = to_bytes(lists)
        flags |= (coded is not None) << p
        body += kept if coded is None else coded
    return flags.to_bytes(cut.flag_bytes, "little") + body
