"""Sorted indices as Golomb-Rice codes of their gaps and as Elias-Fano, in plain Python: lists of bits."""

from __future__ import annotations

from collections.abc import Sequence


def number_bits(number: int, width: int) -> list[int]:
    """The bits of a number from the low end."""
    return [number >> bit & 1 for bit in range(width)]


def to_bytes(bits: Sequence[int]) -> bytes:
    """Bits from the low end of each byte, zeros to the end of the last one."""
    whole = sum(bit << place for place, bit in enumerate(bits))
    return whole.to_bytes(-(-len(bits) // 8), "little")


def rice(index_k: Sequence[int], low: int) -> list[int]:
    """Each gap as its quotient by 2^low in zeros, a one, and the low bits (Golomb 1966; Rice 1979)."""
    bits: list[int] = []
    last = -1
    for index in index_k:
        gap = index - last - 1
        bits += [0] * (gap >> low) + [1] + number_bits(gap, low)
        last = index
    return bits


def elias_fano(index_k: Sequence[int], limit: int, low: int) -> list[int]:
    """Low bits of all, then a bit vector of fixed length with a one at high part + position (Elias 1974; Fano 1971)."""
    if not index_k:
        return []
    bits = [bit for index in index_k for bit in number_bits(index, low)]
    ones = {(index >> low) + position for position, index in enumerate(index_k)}
    return bits + [int(place in ones) for place in range(len(index_k) + (limit - 1 >> low))]
