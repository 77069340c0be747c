"""The inner loops of the sparsifiers, in numba: the k largest magnitudes of every chunk, their places and values.

Selection in one chunk of n: the maxima of at least k disjoint groups are k different entries, so the k-th largest of
them is a lower bound of the k-th largest of all. It is found by halving an interval, approximately, which keeps it a
bound; few entries reach it, and the same halving among those is exact. Nothing depends on a guess.

`select_reference` says the same in numpy; tests hold the two equal byte for byte.
"""

from __future__ import annotations

import numpy as np

from farflung.compression.kernels import Floats, Integers, Octets
from farflung.compression.kernels.numba_cpu import jit
from farflung.compression.kernels.selection import Places, Selection

MAGNITUDE = np.int32(0x7FFFFFFF)
"""All of a float's bits but its sign: as integers they order like the magnitudes."""

COARSE = 1 << 13
"""The bound from group maxima is 2**13 units in the last place wide at most, a thousandth: halving on gains nothing."""

PAD = 64
"""Slack behind scratch arrays, so that loops over whole vectors may run past the end."""


@jit
def _count(bits_n: Places, least: int) -> int:
    """How many are at least `least`."""
    count, limit = np.int32(0), np.int32(least)
    for j in range(len(bits_n)):
        count = np.int32(count + (bits_n[j] >= limit))
    return int(count)


@jit
def _bound(bits_n: Places, low: int, high: int, k: int, width: int) -> int:
    """A number that at least k reach: exactly k if the answer is below 2**32, else as close as `width` to the k-th.

    At least k reach `low`, fewer than k reach `high`. The second form is returned plus 2**32.
    """
    while high - low > width:
        middle = (low + high) >> 1
        count = _count(bits_n, middle)
        if count == k:
            return middle
        if count > k:
            low = middle
        else:
            high = middle
    return low + (1 << 32)


@jit
def _group_maxima(bits_n: Places, maximum_w: Places) -> None:
    """Largest magnitude of the entries j, j + w, j + 2w, ... for each j below w."""
    n, w = len(bits_n), len(maximum_w)
    head_w = bits_n[:w]
    for j in range(w):
        maximum_w[j] = head_w[j] & MAGNITUDE
    for first in range(w, n, w):
        row = bits_n[first : min(first + w, n)]
        for j in range(len(row)):
            magnitude = row[j] & MAGNITUDE
            maximum_w[j] = magnitude if magnitude > maximum_w[j] else maximum_w[j]


@jit
def _flagged(flag_n: Octets, n: int, word_w: Places, place_c: Places) -> int:
    """Places of the first n flags that are 1, ascending; returns their number.

    Flags are looked at eight together, so that most cost little, and no branch can be guessed wrong.
    """
    words, hits, found = (n + 7) // 8, 0, 0
    flag_n[n : 8 * words] = 0
    eight_w = flag_n[: 8 * words].view(np.uint64)
    for word in range(words):
        word_w[hits] = word
        hits += eight_w[word] != 0
    for hit in range(hits):
        first = 8 * np.int64(word_w[hit])
        for j in range(first, first + 8):
            place_c[found] = j
            found += flag_n[j]
    return found


@jit
def _candidates(
    bits_n: Places, least: int, flag_n: Octets, word_w: Places, place_c: Places, magnitude_c: Places
) -> int:
    """Places and magnitudes of the entries of at least `least`, in order; returns their number."""
    n, limit = len(bits_n), np.int32(least)
    for j in range(n):
        flag_n[j] = (bits_n[j] & MAGNITUDE) >= limit
    found = _flagged(flag_n, n, word_w, place_c)
    for c in range(found):
        magnitude_c[c] = bits_n[place_c[c]] & MAGNITUDE
    return found


@jit
def _exact(magnitude_c: Places, high: int, k: int) -> tuple[int, int]:
    """A magnitude, and how many equal to it belong to the k largest, besides all larger ones. Fewer than all."""
    low = magnitude_c[0]
    for c in range(len(magnitude_c)):
        low = min(low, magnitude_c[c])
    above = _count(magnitude_c, low + 1)
    if above <= k:  # often so in a chunk of few different values, most of them 0
        return low, k - above
    kth = _bound(magnitude_c, low, high + 1, k, 1)
    if kth >> 32 == 0:
        return kth, len(magnitude_c)
    kth &= 0xFFFFFFFF
    return kth, k - _count(magnitude_c, kth + 1)


@jit
def _select(bits_n: Places, k: int, maximum_n: Places, flag_n: Octets, place_n: Places, magnitude_n: Places) -> int:
    """Leave the places of the k largest magnitudes in `place_n`, ascending; ties go to the lowest. Returns the largest.

    The scratch arrays have n + PAD entries each.
    """
    n = len(bits_n)
    w = n
    while w >= 5 * k:
        w //= 2
    maximum_w = maximum_n[:w]
    _group_maxima(bits_n, maximum_w)
    low, high = maximum_w[0], maximum_w[0]
    for j in range(w):
        low, high = min(low, maximum_w[j]), max(high, maximum_w[j])
    bound = _bound(maximum_w, low, high + 1, k, COARSE) & 0xFFFFFFFF
    found = _candidates(bits_n, bound, flag_n, maximum_n, place_n, magnitude_n)
    if found > k:
        kth, ties = _exact(magnitude_n[:found], high, k)
        position = 0
        for c in range(found):
            tie = magnitude_n[c] == kth
            take = magnitude_n[c] > kth or (tie and ties > 0)
            ties -= tie
            place_n[position] = place_n[c]
            position += take
    return int(high)


@jit
def _pack(place_k: Places, width: int, out_r: Octets) -> None:
    """Numbers of `width` bits, from the low bits of the first byte on; zero bits to the end of the last byte."""
    waiting, held, position = np.uint64(0), 0, 0
    for p in range(len(place_k)):
        waiting |= np.uint64(place_k[p]) << np.uint64(held)
        held += width
        while held >= 8:
            out_r[position] = np.uint8(waiting & np.uint64(255))
            waiting >>= np.uint64(8)
            held -= 8
            position += 1
    if held:
        out_r[position] = np.uint8(waiting)


@jit
def topk_take(
    x_bn: Floats, k: int, chunk: int, width: int, index_bk: Places, value_bk: Floats, records_br: Octets, first: int
) -> int:
    """Fill the indices within their chunks, the kept values (+0.0 for -0.0), and the records from byte `first` on.

    Returns the largest magnitude as the bits of a float: at least those of infinity if an entry is not finite.
    """
    blocks, total = x_bn.shape
    maximum_n, place_n = np.empty(chunk + PAD, np.int32), np.empty(chunk + PAD, np.int32)
    magnitude_n, flag_n = np.empty(chunk + PAD, np.int32), np.empty(chunk + PAD, np.uint8)
    largest, zero = 0, np.float32(0)
    for b in range(blocks):
        kept, offset = 0, first
        for start in range(0, total, chunk):
            x_n = x_bn[b, start : min(start + chunk, total)]
            count = (k * len(x_n) + chunk - 1) // chunk
            largest = max(largest, _select(x_n.view(np.int32), count, maximum_n, flag_n, place_n, magnitude_n))
            for p in range(count):
                place = place_n[p]
                index_bk[b, kept + p] = place
                value_bk[b, kept + p] = x_n[place] + zero
            length = (count * width + 7) // 8
            _pack(place_n[:count], width, records_br[b, offset : offset + length])
            kept += count
            offset += length
    return largest


@jit
def topk_repack(index_bk: Places, total: int, k: int, chunk: int, width: int, records_br: Octets, first: int) -> None:
    """Write the indices of records of `total` coordinates into their bytes from `first` on."""
    for b in range(len(index_bk)):
        kept, offset = 0, first
        for start in range(0, total, chunk):
            count = (k * min(chunk, total - start) + chunk - 1) // chunk
            length = (count * width + 7) // 8
            _pack(index_bk[b, kept : kept + count], width, records_br[b, offset : offset + length])
            kept += count
            offset += length


FINE, LOOSE_BIT, PAST_END, NOT_RISING, STRAY_ZERO = range(5)
"""What `topk_open` found wrong."""


@jit
def _unpack_into(
    packed_r: Octets, count: int, width: int, n: int, start: int, index_k: Integers, value_k: Floats
) -> int:
    """The indices of one chunk, plus `start`; says what is wrong. A kept zero is +0.0 and stands at index p."""
    waiting, held, position, last, wrong = np.uint64(0), 0, 0, -1, 0
    mask, sign_k = np.uint64((1 << width) - 1), value_k.view(np.int32)
    for p in range(count):
        while held < width:
            waiting |= np.uint64(packed_r[position]) << np.uint64(held)
            held += 8
            position += 1
        index = int(waiting & mask)
        waiting >>= np.uint64(width)
        held -= width
        wrong |= (index <= last) | ((value_k[p] == 0) & ((index != p) | (sign_k[p] != 0)))
        index_k[p] = index + start
        last = index
    if waiting:
        return LOOSE_BIT
    if last >= n:
        return PAST_END
    if not wrong:
        return FINE
    for p in range(1, count):
        if index_k[p] <= index_k[p - 1]:
            return NOT_RISING
    return STRAY_ZERO


@jit
def topk_open(
    records_br: Octets, first: int, total: int, k: int, chunk: int, width: int, index_bk: Integers, value_bk: Floats
) -> int:
    """Read the indices of records of `total` coordinates, counted from the first record's start, and check them.

    Returns FINE, or what is wrong plus 8 times the record's number.
    """
    for b in range(len(records_br)):
        kept, offset = 0, first
        for start in range(0, total, chunk):
            n = min(chunk, total - start)
            count = (k * n + chunk - 1) // chunk
            length = (count * width + 7) // 8
            index_k, value_k = index_bk[b, kept : kept + count], value_bk[b, kept : kept + count]
            packed_r = records_br[b, offset : offset + length]
            wrong = _unpack_into(packed_r, count, width, n, b * total + start, index_k, value_k)
            if wrong:
                return wrong + 8 * b
            kept += count
            offset += length
    return FINE


@jit
def settle_zeros(index_bk: Places, value_bk: Floats, count_c: Integers, order_bk: Places) -> bool:
    """Move the zeros of each chunk to its lowest free places: new indices, and which kept value now comes where.

    Chunks of a record keep `count_c` values each. Returns whether anything moved or a zero had a sign.
    """
    moved, sign_bk = False, value_bk.view(np.int32)
    for b in range(len(index_bk)):
        begin = 0
        for count in count_c:
            end = begin + count
            zeros, stray = 0, False
            for p in range(begin, end):
                if value_bk[b, p] == 0:
                    zeros += 1
                    stray |= (index_bk[b, p] != p - begin) | (sign_bk[b, p] != 0)
                order_bk[b, p] = p
            if stray:
                moved = True
                _settle(index_bk[b, begin:end], value_bk[b, begin:end], order_bk[b, begin:end], begin)
            begin = end
    return moved


@jit
def _settle(index_k: Places, value_k: Floats, order_k: Places, begin: int) -> None:
    """`settle_zeros` for one chunk: p-th comes the number whose index is p, or else a zero while there is one."""
    count = len(index_k)
    zero_k, number_k = np.empty(count, np.int32), np.empty(count, np.int32)
    zeros, numbers = 0, 0
    for p in range(count):
        if value_k[p] == 0:
            zero_k[zeros] = p
            zeros += 1
        else:
            number_k[numbers] = p
            numbers += 1
    before_k = index_k.copy()
    zero, number = 0, 0
    for p in range(count):
        if zero == zeros or (number < numbers and before_k[number_k[number]] == p):
            index_k[p] = before_k[number_k[number]]
            order_k[p] = begin + number_k[number]
            number += 1
        else:
            index_k[p] = p
            order_k[p] = begin + zero_k[zero]
            zero += 1


GOLDEN = np.uint64(0x9E3779B97F4A7C15)
MIX_1, MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


@jit
def _mix(number: np.uint64) -> np.uint64:
    """A bijection of 64 bits that looks random (the finaliser of SplitMix64, doi:10.1145/2714064.2660195, fig. 17)."""
    number = (number ^ (number >> np.uint64(30))) * MIX_1
    number = (number ^ (number >> np.uint64(27))) * MIX_2
    return number ^ (number >> np.uint64(31))


@jit
def _random_places(seed: np.uint64, start: int, total: int, k: int, chunk: int, place_k: Places) -> None:
    flag_n, word_w = np.zeros(chunk + PAD, np.uint8), np.empty(chunk + PAD, np.int32)
    found_n, kept = np.empty(chunk + PAD, np.int32), 0
    for first in range(0, total, chunk):
        n = min(chunk, total - first)
        count = (k * n + chunk - 1) // chunk
        state = _mix(seed ^ _mix(np.uint64(start + first)))
        for j in range(n - count, n):
            state += GOLDEN
            place = np.int64(((_mix(state) >> np.uint64(32)) * np.uint64(j + 1)) >> np.uint64(32))
            flag_n[j if flag_n[place] else place] = 1
        _flagged(flag_n, n, word_w, found_n)
        for p in range(count):
            place_k[kept + p] = first + found_n[p]
            flag_n[found_n[p]] = 0
        kept += count


def random_places(seed: int, start: int, total: int, k: int, chunk: int, place_k: Places) -> None:
    """See `Selection.random_places`."""
    _random_places(np.uint64(seed), start, total, k, chunk, place_k)


LANES = 16
"""Squares are summed in this many interleaved sums, added in order: part of what `dead_zone` means."""


@jit
def dead_zone(x_bn: Floats, t: float, out_bn: Floats) -> bool:
    """See `Selection.dead_zone`."""
    blocks, n = x_bn.shape
    zero, sum_l, finite = np.float32(0), np.empty(LANES, np.float64), True
    for b in range(blocks):
        row_n, out_n = x_bn[b], out_bn[b]
        sum_l[:] = 0
        for first in range(0, n, LANES):
            part = row_n[first : min(first + LANES, n)]
            for lane in range(len(part)):
                sum_l[lane] += np.float64(part[lane]) * np.float64(part[lane])
        total = 0.0
        for lane in range(LANES):
            total += sum_l[lane]
        finite &= total < np.inf
        limit = t * t * (total / n)
        for j in range(n):
            out_n[j] = zero if np.float64(row_n[j]) * np.float64(row_n[j]) < limit else row_n[j]
    return finite


SELECTION = Selection(topk_take, topk_repack, topk_open, settle_zeros, random_places, dead_zone)
