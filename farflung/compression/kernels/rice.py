"""Sorted indices in numba: from records to Golomb-Rice codes of their gaps, or to Elias-Fano, and back.

`rice_reference` is the plain form. A stream is bits from the low end of each byte; here it lies in 64-bit words
(little-endian machines only) with zero words behind it, and `at` counts its bits. What a function returns is that
count, or one of the negative faults. Nothing is read or written outside the given arrays, whatever the bytes are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
from numba.core import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from farflung.compression.kernels import Octets
from farflung.compression.kernels.numba_cpu import jit

ENDS_EARLY, PAST_LIMIT, PADDING, NOT_SMALLER, BAD_TABLE = range(-1, -6, -1)
OTHER_TABLE, BAD_STATE, BAD_FLAGS, NOT_SORTED = range(-6, -10, -1)
"""What a stream is refused for; `coders.FAULTS` has the words."""

signed: Callable[[Any], int] = cast(Any, np.int64)
"""A cast between numba's signed and unsigned words, which would make floats of each other."""

Indices = NDArray[np.int32]
Words = NDArray[np.uint64]

ONE = np.uint64(1)


def _trailing_zeros(context: Any, word: Any) -> Any:
    """Zero bits below the lowest one bit of an unsigned 64-bit word; 64 for 0. One instruction of the processor."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], context.get_constant(types.boolean, 0))

    return types.uint64(types.uint64), generate


trailing_zeros = intrinsic(_trailing_zeros)


@jit
def words_of(in_r: Octets, first: int) -> Words:
    """The bytes from `first` on as words, and two zero words."""
    length = max(len(in_r) - first, 0)
    byte_r = np.zeros((length // 8 + 3) * 8, np.uint8)
    byte_r[:length] = in_r[first:]
    return byte_r.view(np.uint64)


@jit
def window(word_w: Words, at: int) -> Any:
    """The 64 bits from bit `at` on."""
    shift = np.uint64(at & 63)
    return word_w[at >> 6] >> shift | (word_w[(at >> 6) + 1] << ONE) << (np.uint64(63) - shift)


@jit
def put(word_w: Words, at: int, value: Any) -> None:
    """Set bits from bit `at` on, where all are 0."""
    shift = np.uint64(at & 63)
    word_w[at >> 6] |= value << shift
    word_w[(at >> 6) + 1] |= (value >> ONE) >> (np.uint64(63) - shift)


@jit
def load(record_r: Octets, offset: int, width: int, word_w: Words, index_k: Indices) -> None:
    """Fill index_k with the numbers of `width` <= 31 bits packed from byte `offset` on; word_w is scratch."""
    octets = (len(index_k) * width + 7) >> 3
    byte_r = word_w.view(np.uint8)
    for j in range(octets):
        byte_r[j] = record_r[offset + j]
    mask = np.uint64((1 << width) - 1)
    for i in range(len(index_k)):
        index_k[i] = np.int32(window(word_w, i * width) & mask)


@jit
def save(word_w: Words, octets: int, record_r: Octets, offset: int) -> None:
    """Move packed numbers to byte `offset` on, and clear the scratch."""
    byte_r = word_w.view(np.uint8)
    for j in range(octets):
        record_r[offset + j] = byte_r[j]
    word_w[: (octets >> 3) + 1] = 0


@jit
def scratch(field_f6: Any) -> Words:
    """Zero words with room for any one field, and two more."""
    return np.zeros((field_f6[:, 4].max() >> 3) + 3, np.uint64)


@jit
def rice_gaps(records_br: Octets, field_f6: Any, gap_n: Indices) -> int:
    """Fill gap_n with the gaps of all fields' indices; the exact length of their codes in bits, or NOT_SORTED."""
    bits, first, fault = 0, 0, 0
    word_w = scratch(field_f6)
    for f in range(len(field_f6)):
        offset, k, width, limit, low = field_f6[f, 0], field_f6[f, 1], field_f6[f, 2], field_f6[f, 3], field_f6[f, 5]
        for r in range(len(records_br)):
            gap_k = gap_n[first : first + k]
            load(records_br[r], offset, width, word_w, gap_k)
            last, quotients = -1, 0
            for i in range(k):
                index = signed(gap_k[i])
                gap = index - last - 1
                fault |= gap < 0
                gap_k[i] = np.int32(gap)
                quotients += gap >> low
                last = index
            fault |= last >= limit
            bits += quotients + k * (low + 1)
            first += k
    return signed(NOT_SORTED if fault else bits)


@jit
def rice_encode(gap_n: Indices, blocks: int, field_f6: Any, word_w: Words) -> int:
    """Write each gap as its quotient in unary (zeros, then a one) and its low bits."""
    at, first = 0, 0
    for f in range(len(field_f6)):
        low = field_f6[f, 5]
        mask = (1 << low) - 1
        last = first + field_f6[f, 1] * blocks
        for i in range(first, last):
            gap = signed(gap_n[i])
            at += gap >> low
            put(word_w, at, np.uint64((gap & mask) << 1 | 1))
            at += low + 1
        first = last
    return at


@jit
def rice_decode(word_w: Words, records_br: Octets, field_f6: Any) -> int:
    """The inverse of `rice_encode`, into the records."""
    at, end, packed_w = 0, 64 * len(word_w) - 128, scratch(field_f6)
    for f in range(len(field_f6)):
        offset, k, width, limit, low = field_f6[f, 0], field_f6[f, 1], field_f6[f, 2], field_f6[f, 3], field_f6[f, 5]
        mask = np.uint64((1 << low) - 1)
        for r in range(len(records_br)):
            index = -1
            for i in range(k):
                bits = window(word_w, at)
                while bits & np.uint64(0xFFFFFFFF) == 0:
                    at += 32
                    index += 32 << low
                    if at > end or index >= limit:
                        return ENDS_EARLY if at > end else PAST_LIMIT
                    bits = window(word_w, at)
                quotient = signed(trailing_zeros(bits))
                index += 1 + (quotient << low | signed(bits >> np.uint64(quotient + 1) & mask))
                at += quotient + 1 + low
                if at > end or index >= limit:
                    return ENDS_EARLY if at > end else PAST_LIMIT
                put(packed_w, i * width, np.uint64(index))
            save(packed_w, field_f6[f, 4], records_br[r], offset)
    return at


@jit
def elias_bits(blocks: int, field_f6: Any) -> int:
    """Exact length of all fields' indices by Elias-Fano: it does not depend on them."""
    bits = 0
    for f in range(len(field_f6)):
        k, limit, low = field_f6[f, 1], field_f6[f, 3], field_f6[f, 5]
        bits += blocks * (k * low + (k + ((limit - 1) >> low) if k else 0))
    return signed(bits)


@jit
def elias_encode(gap_n: Indices, blocks: int, field_f6: Any, word_w: Words) -> int:
    """Per index list: the low bits of each index, then a one at bit (high part + its position), to a fixed length."""
    at, first = 0, 0
    for f in range(len(field_f6)):
        k, limit, low = field_f6[f, 1], field_f6[f, 3], field_f6[f, 5]
        mask = (1 << low) - 1
        for _ in range(blocks if k else 0):
            index, high = -1, at + k * low
            for i in range(k):
                index += signed(gap_n[first + i]) + 1
                put(word_w, at + i * low, np.uint64(index & mask))
                put(word_w, high + (index >> low) + i, ONE)
            at = high + k + ((limit - 1) >> low)
            first += k
    return at


@jit
def elias_decode(word_w: Words, records_br: Octets, field_f6: Any) -> int:
    """The inverse of `elias_encode`, into the records. The caller has checked that all words are there."""
    at, packed_w = 0, scratch(field_f6)
    for f in range(len(field_f6)):
        offset, k, width, limit, low = field_f6[f, 0], field_f6[f, 1], field_f6[f, 2], field_f6[f, 3], field_f6[f, 5]
        mask = np.uint64((1 << low) - 1)
        for r in range(len(records_br) if k else 0):
            high, last = at + k * low, -1
            one, stop = high, high + k + ((limit - 1) >> low)
            for i in range(k + 1):
                bits = window(word_w, one)
                while bits == 0 and one < stop:
                    one += 64
                    bits = window(word_w, one) if one < stop else np.uint64(0)
                one += signed(trailing_zeros(bits)) if bits else 0
                if i == k:
                    if bits and one < stop:
                        return PADDING
                    break
                if not bits or one >= stop:
                    return ENDS_EARLY
                index = (one - high - i) << low | signed(window(word_w, at + i * low) & mask)
                if index <= last or index >= limit:
                    return NOT_SORTED if index <= last else PAST_LIMIT
                put(packed_w, i * width, np.uint64(index))
                last = index
                one += 1
            at = stop
            save(packed_w, field_f6[f, 4], records_br[r], offset)
    return at


@jit
def ended(word_w: Words, at: int) -> int:
    """Whole bytes of a stream of `at` bits; PADDING if the last one's rest is not 0."""
    left = (8 - (at & 7)) & 7
    return PADDING if window(word_w, at) & np.uint64((1 << left) - 1) else signed((at + 7) >> 3)
