"""The inner loops of `global-topk`, in numba: histograms over the whole vector, and Elias-Fano lists of places."""

from __future__ import annotations

import numpy as np

from farflung.compression.kernels import Floats, Integers, Octets
from farflung.compression.kernels.numba_cpu import jit
from farflung.compression.kernels.selection import Places


@jit
def histogram(x_n: Floats, prefix: int, shift: int, width: int, count_h: Integers) -> None:
    """Count the `width` bits above `shift` of each magnitude whose bits above those are `prefix`."""
    bits_n, mask = x_n.view(np.int32), np.int32((1 << width) - 1)
    above, low, wanted = np.int32(shift + width), np.int32(shift), np.int32(prefix)
    for j in range(len(bits_n)):
        magnitude = bits_n[j] & np.int32(0x7FFFFFFF)
        if shift + width >= 31 or magnitude >> above == wanted:
            count_h[(magnitude >> low) & mask] += 1


@jit
def take_from(x_n: Floats, kth: int, ties: int, place_k: Places, value_k: Floats) -> tuple[int, int]:
    """Places and values of the magnitudes above `kth`, and of the first `ties` equal to it -> (how many, ties left)."""
    bits_n, limit, found = x_n.view(np.int32), np.int32(kth), 0
    for j in range(len(bits_n)):
        magnitude = bits_n[j] & np.int32(0x7FFFFFFF)
        if magnitude >= limit:
            if magnitude == limit:
                if ties == 0:
                    continue
                ties -= 1
            place_k[found] = j
            value_k[found] = x_n[j]
            found += 1
    return found, ties


@jit
def elias_write(place_k: Places, low_bits: int, out_r: Octets) -> None:
    """The low bits of each place, packed from the low bits of the first byte; then from a new byte on, for the p-th
    place a 1 at bit p + place >> low_bits, and 0 elsewhere."""
    out_r[:] = 0
    upper = 8 * ((len(place_k) * low_bits + 7) // 8)
    for p in range(len(place_k)):
        place = int(place_k[p])
        for bit in range(low_bits):
            at = p * low_bits + bit
            out_r[at >> 3] |= np.uint8(((place >> bit) & 1) << (at & 7))
        at = upper + p + (place >> low_bits)
        out_r[at >> 3] |= np.uint8(1 << (at & 7))


@jit
def elias_read(packed_r: Octets, low_bits: int, n: int, place_k: Integers) -> bool:
    """The inverse of `elias_write` for places below n: whether it could have written these bytes."""
    count = len(place_k)
    used = count * low_bits
    upper = 8 * ((used + 7) // 8)
    for at in range(used, upper):
        if packed_r[at >> 3] >> (at & 7) & 1:
            return False
    p, last = 0, -1
    for at in range(upper, 8 * len(packed_r)):
        if packed_r[at >> 3] >> (at & 7) & 1:
            if p == count:
                return False
            place = (at - upper - p) << low_bits
            for bit in range(low_bits):
                low = p * low_bits + bit
                place |= int(packed_r[low >> 3] >> (low & 7) & 1) << bit
            if place <= last or place >= n:
                return False
            place_k[p], last = place, place
            p += 1
    return p == count
