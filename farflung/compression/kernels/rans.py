"""Range coding by asymmetric numeral systems in numba: the table of frequencies, the symbols, and their checks.

rANS (Duda 2013, arXiv:1311.2540, §2-3) with states in [2^15, 2^31), 16-bit renormalisation and states that take turns
(Giesen 2014, arXiv:1402.3392). Frequencies sum to 2^s, s <= 12, so 2^15 is a multiple of it and the code is
b-unique: a stream that starts from legal states, returns every one of them to 2^15 and ends there is the only one of
its symbols. `rans_reference` is the plain form. Only integers are used: every machine makes the same bytes.

Table: a binary tree over the symbols, from the root down, left before right. A node of frequency F > 0 and more than
one symbol has a bit: 0, its symbols share F evenly (the first ones get what is left over); 1, it is split, and the left
half's frequency follows, in as many bits as F has. Which nodes are split, and how F is shared, follows from the counts.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from farflung.compression.kernels import Octets
from farflung.compression.kernels.numba_cpu import jit
from farflung.compression.kernels.rans_reference import LOG2, LOW, PRECISION_MAX
from farflung.compression.kernels.rice import BAD_STATE, BAD_TABLE, ENDS_EARLY, NOT_SMALLER, signed

Words = NDArray[np.uint32]
Counts = NDArray[np.int64]

TABLE_BYTES_MAX = 512
"""255 splits of 1 + 13 bits."""


@jit
def log2(n: int) -> int:
    """log2(n) in units of 2^-16, n >= 1: the table (to 4097), and between its points a straight line."""
    shift = 0
    while n >> shift > 4096:
        shift += 1
    base = n >> shift
    rest = n - (base << shift)
    found = LOG2[base]
    if rest:
        found += ((LOG2[base + 1] - found) * rest) >> shift
    return signed(found + (shift << 16))


@jit
def precision(bits: int, n: int) -> int:
    """s for n symbols: finer for more of them, since a coarse share costs each symbol and a fine table costs once."""
    s = 8 if bits < 8 else 10
    while s < PRECISION_MAX and n >> (s + 2) > 0:
        s += 1
    return s


@jit
def lanes(n: int) -> int:
    """States that take turns, a power of two: each costs about 3 bytes, more of them overlap better."""
    return 4 if n >= 1 << 12 else 1


@jit
def _shape(count_c: Counts, s: int) -> tuple[Counts, Counts, Counts]:
    """Counts, least frequencies and whether split, by node: 1 is the root, 2i and 2i + 1 the halves of i."""
    size = len(count_c)
    total_t = np.zeros(2 * size, np.int64)
    least_t = np.zeros(2 * size, np.int64)
    split_t = np.zeros(2 * size, np.int64)
    cost_t = np.zeros(2 * size, np.int64)
    for c in range(size):
        total_t[size + c] = count_c[c]
        least_t[size + c] = 1 if count_c[c] else 0
    width, level, node = 1, 0, size - 1
    while node > 0:
        width, level = width * 2, level + 1
        for at in range(node, node // 2, -1):
            left, right = 2 * at, 2 * at + 1
            total = total_t[left] + total_t[right]
            total_t[at] = total
            if total == 0:
                continue
            even = total * level << 16
            parted = cost_t[left] + cost_t[right] + (s << 16)
            if total_t[left] and total_t[right]:
                parted += total * log2(total)
                parted -= total_t[left] * log2(total_t[left]) + total_t[right] * log2(total_t[right])
            split_t[at] = parted < even
            least_t[at] = least_t[left] + least_t[right] if split_t[at] else width
            cost_t[at] = min(parted, even) + (1 << 16)
        node //= 2
    return total_t, least_t, split_t


@jit
def _bit_width(number: int) -> int:
    width = 0
    while number >> width:
        width += 1
    return width


@jit
def _spread(freq_c: Words, node: int, frequency: int) -> None:
    """Share a frequency evenly among the symbols under a node."""
    first, size = node, 1
    while first < len(freq_c):
        first, size = first * 2, size * 2
    first -= len(freq_c)
    each, over = frequency // size, frequency % size
    for c in range(size):
        freq_c[first + c] = each + (1 if c < over else 0)


@jit
def build(count_c: Counts, s: int, freq_c: Words, table_r: Octets) -> int:
    """Frequencies of sum 2^s from counts (not all 0), and the table that says so; return its length in bytes."""
    total_t, least_t, split_t = _shape(count_c, s)
    share_t = np.zeros(len(total_t), np.int64)
    pending = np.empty(64, np.int64)
    pending[0], depth, at = 1, 1, 0
    share_t[1] = 1 << s
    table_r[:] = 0
    while depth:
        depth -= 1
        node = pending[depth]
        frequency = share_t[node]
        if node >= len(freq_c) or frequency == 0 or not split_t[node]:
            _spread(freq_c, node, frequency)
            at += node < len(freq_c) and frequency > 0
            continue
        left, right = 2 * node, 2 * node + 1
        share = (2 * frequency * total_t[left] + total_t[node]) // (2 * total_t[node])
        share = min(max(share, least_t[left]), frequency - least_t[right])
        share = 0 if total_t[left] == 0 else frequency if total_t[right] == 0 else share
        share_t[left], share_t[right] = share, frequency - share
        code = share << 1 | 1
        for bit in range(1 + _bit_width(frequency)):
            table_r[at >> 3] |= np.uint8((code >> bit & 1) << (at & 7))
            at += 1
        pending[depth], pending[depth + 1] = right, left
        depth += 2
    return signed((at + 7) >> 3)


@jit
def parse(in_r: Octets, first: int, s: int, freq_c: Words) -> int:
    """Frequencies of the table that starts at byte `first`; its end, or a fault. What it reads sums to 2^s."""
    share_t = np.zeros(2 * len(freq_c), np.int64)
    pending = np.empty(64, np.int64)
    pending[0], depth, at, end = 1, 1, 8 * first, 8 * len(in_r)
    share_t[1] = 1 << s
    while depth:
        depth -= 1
        node = pending[depth]
        frequency = share_t[node]
        if node < len(freq_c) and frequency > 0:
            width = _bit_width(frequency)
            if at >= end:
                return ENDS_EARLY
            split = in_r[at >> 3] >> (at & 7) & 1
            at += 1
            if split:
                if at + width > end:
                    return ENDS_EARLY
                share = 0
                for bit in range(width):
                    share |= signed(in_r[at >> 3] >> (at & 7) & 1) << bit
                    at += 1
                if share > frequency:
                    return BAD_TABLE
                share_t[2 * node], share_t[2 * node + 1] = share, frequency - share
                pending[depth], pending[depth + 1] = 2 * node + 1, 2 * node
                depth += 2
                continue
        _spread(freq_c, node, frequency)
    return signed((at + 7) >> 3)


@jit
def tally(symbol_n: Octets, count_c: Counts) -> None:
    """Count symbols, in four tables so that runs of one symbol do not wait for each other."""
    size = len(count_c)
    part_4c = np.zeros((4, size), np.int32)
    n = len(symbol_n)
    for i in range(0, n - 3, 4):
        part_4c[0, symbol_n[i]] += 1
        part_4c[1, symbol_n[i + 1]] += 1
        part_4c[2, symbol_n[i + 2]] += 1
        part_4c[3, symbol_n[i + 3]] += 1
    for i in range(n // 4 * 4, n):
        part_4c[0, symbol_n[i]] += 1
    for c in range(size):
        count_c[c] = signed(part_4c[0, c]) + part_4c[1, c] + part_4c[2, c] + part_4c[3, c]


@jit
def estimate(count_c: Counts, freq_c: Words, s: int, table_bytes: int, n: int) -> int:
    """Bytes that a coded part will have, within a few of each state: rounded up from the code lengths."""
    units = 0
    for c in range(len(count_c)):
        if count_c[c]:
            units += count_c[c] * ((s << 16) - LOG2[freq_c[c]])
    return signed(table_bytes + 4 * lanes(n) + (((units >> 16) + 8) >> 3))


@jit
def encode(symbol_n: Octets, freq_c: Words, s: int, out_r: Octets, at: int, limit: int) -> int:
    """Write the final states and the words; return the end, or NOT_SMALLER where that would be `limit` or more."""
    size, n, turns = len(freq_c), len(symbol_n), lanes(len(symbol_n))
    step_c4 = np.empty((size, 4), np.uint64)
    start = 0
    for c in range(size):
        frequency = signed(freq_c[c])
        shift = 31 + _bit_width(max(frequency - 1, 0))
        step_c4[c, 0] = np.uint64(frequency)
        step_c4[c, 1] = np.uint64(((1 << shift) + frequency - 1) // max(frequency, 1))  # exact below 2^31
        step_c4[c, 2] = np.uint64(shift)
        step_c4[c, 3] = np.uint64(start)
        start += frequency
    word_n = np.empty(n + 1, np.uint16)
    first = n + 1
    state_l = np.full(4, LOW, np.uint64)
    top, precision_s, low16 = np.uint64(31 - s), np.uint64(s), np.uint64(0xFFFF)
    for i in range(n - 1, -1, -1):
        c, lane = symbol_n[i], i & (turns - 1)
        state, frequency = state_l[lane], step_c4[c, 0]
        word_n[first - 1] = np.uint16(state & low16)
        full = state >= frequency << top
        first -= signed(full)
        state = state >> np.uint64(16) if full else state
        quotient = state * step_c4[c, 1] >> step_c4[c, 2]
        state_l[lane] = (quotient << precision_s) + (state - quotient * frequency) + step_c4[c, 3]
    if at + 4 * turns + 2 * (n + 1 - first) >= limit:
        return NOT_SMALLER
    for lane in range(turns):
        for byte in range(4):
            out_r[at + byte] = np.uint8(state_l[lane] >> np.uint64(8 * byte) & np.uint64(255))
        at += 4
    for j in range(first, n + 1):
        out_r[at] = np.uint8(word_n[j] & 255)
        out_r[at + 1] = np.uint8(word_n[j] >> 8)
        at += 2
    return at


@jit
def _slots(freq_c: Words, s: int) -> Words:
    """By slot: symbol, frequency - 1 and distance from the symbol's first slot, in 8, 12 and 12 bits."""
    slot_m = np.empty(1 << s, np.uint32)
    at = 0
    for c in range(len(freq_c)):
        for j in range(freq_c[c]):
            slot_m[at] = np.uint32(c | (signed(freq_c[c]) - 1) << 8 | j << 20)
            at += 1
    return slot_m


@jit
def decode(in_r: Octets, at: int, freq_c: Words, s: int, symbol_n: Octets) -> int:
    """Fill symbol_n; the end, or a fault. Reads at most two bytes per symbol."""
    n, turns, end = len(symbol_n), lanes(len(symbol_n)), len(in_r)
    slot_m = _slots(freq_c, s)
    state_l = np.full(4, LOW, np.uint64)
    if at + 4 * turns > end:
        return ENDS_EARLY
    for lane in range(turns):
        state = signed(0)
        for byte in range(4):
            state |= signed(in_r[at + byte]) << (8 * byte)
        if not LOW <= state < LOW << 16:
            return BAD_STATE
        state_l[lane] = np.uint64(state)
        at += 4
    mask, precision_s, low = np.uint64((1 << s) - 1), np.uint64(s), np.uint64(LOW)
    for i in range(n):
        lane = i & (turns - 1)
        state = state_l[lane]
        slot = np.uint64(slot_m[state & mask])
        symbol_n[i] = np.uint8(slot & np.uint64(255))
        state = ((slot >> np.uint64(8) & np.uint64(0xFFF)) + np.uint64(1)) * (state >> precision_s) + (
            slot >> np.uint64(20)
        )
        if state < low:
            if at + 2 > end:
                return ENDS_EARLY
            state = state << np.uint64(16) | np.uint64(in_r[at]) | np.uint64(in_r[at + 1]) << np.uint64(8)
            at += 2
        state_l[lane] = state
    for lane in range(turns):
        if state_l[lane] != low:
            return BAD_STATE
    return at
