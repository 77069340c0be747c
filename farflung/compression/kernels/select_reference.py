"""The sparsifiers' inner loops in plain numpy: slow, obvious, and what the fast ones are tested against."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from farflung.compression.kernels import Floats, Integers, Octets
from farflung.compression.kernels.selection import Places, Selection


def _chunks(total: int, k: int, chunk: int) -> Iterator[tuple[int, int, int]]:
    """(start, coordinates, kept values) of each chunk of a record."""
    for start in range(0, total, chunk):
        n = min(chunk, total - start)
        yield start, n, -(-k * n // chunk)


def _packed(place_k: Places, width: int) -> Octets:
    bit_kw = place_k[:, None] >> np.arange(width) & 1
    return np.packbits(bit_kw.astype(np.uint8).reshape(-1), bitorder="little")


def topk_take(
    x_bn: Floats, k: int, chunk: int, width: int, index_bk: Places, value_bk: Floats, records_br: Octets, first: int
) -> int:
    """See `Selection.topk_take`."""
    magnitude_bn = (x_bn.view(np.uint32) & np.uint32(0x7FFFFFFF)).astype(np.int64)
    kept = 0
    for start, n, count in _chunks(x_bn.shape[1], k, chunk):
        best_bk = np.argsort(-magnitude_bn[:, start : start + n], axis=1, kind="stable")[:, :count]
        index_bk[:, kept : kept + count] = np.sort(best_bk, 1)
        value_bk[:, kept : kept + count] = np.take_along_axis(x_bn, start + np.sort(best_bk, 1), 1) + np.float32(0)
        kept += count
    topk_repack(index_bk, x_bn.shape[1], k, chunk, width, records_br, first)
    return int(magnitude_bn.max())


def topk_repack(index_bk: Places, total: int, k: int, chunk: int, width: int, records_br: Octets, first: int) -> None:
    """See `Selection.topk_repack`."""
    for index_k, record_r in zip(index_bk, records_br, strict=True):
        kept, parts = 0, []
        for _, _, count in _chunks(total, k, chunk):
            parts.append(_packed(index_k[kept : kept + count], width))
            kept += count
        record_r[first:] = np.concatenate(parts)


def topk_open(
    records_br: Octets, first: int, total: int, k: int, chunk: int, width: int, index_bk: Integers, value_bk: Floats
) -> int:
    """See `Selection.topk_open`."""
    for b, record_r in enumerate(records_br):
        kept, offset = 0, first
        for start, n, count in _chunks(total, k, chunk):
            part = slice(kept, kept + count)
            length = (count * width + 7) // 8
            bit = np.unpackbits(record_r[offset : offset + length], bitorder="little")
            index_k = bit[: count * width].reshape(count, width).astype(np.int64) @ (1 << np.arange(width))
            index_bk[b, part] = start + index_k + b * total
            stray_k = (value_bk[b, part] == 0) & ((index_k != np.arange(count)) | np.signbit(value_bk[b, part]))
            wrongs = (bit[count * width :].any(), index_k[-1] >= n, (np.diff(index_k) <= 0).any(), stray_k.any())
            for problem, wrong in enumerate(wrongs, 1):
                if wrong:
                    return problem + 8 * b
            kept, offset = kept + count, offset + length
    return 0


def settle_zeros(index_bk: Places, value_bk: Floats, count_c: Integers, order_bk: Places) -> bool:
    """See `Selection.settle_zeros`."""
    moved = False
    order_bk[:] = np.arange(index_bk.shape[1])
    for index_k, value_k, order_k in zip(index_bk, value_bk, order_bk, strict=True):
        begin = 0
        for count in (int(count) for count in count_c):
            part = slice(begin, begin + count)
            numbers = {int(index): p for p, index in enumerate(index_k[part], begin) if value_k[p] != 0}
            zeros = [p for p in range(begin, begin + count) if value_k[p] == 0]
            free = [index for index in range(int(index_k[part][-1]) + 1) if index not in numbers][: len(zeros)]
            placed = sorted({**numbers, **dict(zip(free, zeros, strict=True))}.items())
            moved |= [index for index, _ in placed] != index_k[part].tolist() or bool(np.signbit(value_k[zeros]).any())
            index_k[part] = [index for index, _ in placed]
            order_k[part] = [p for _, p in placed]
            begin += count
    return moved


MASK = (1 << 64) - 1


def _mix(number: int) -> int:
    number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9 & MASK
    number = (number ^ number >> 27) * 0x94D049BB133111EB & MASK
    return number ^ number >> 31


def random_places(seed: int, start: int, total: int, k: int, chunk: int, place_k: Places) -> None:
    """See `Selection.random_places`."""
    kept = 0
    for first, n, count in _chunks(total, k, chunk):
        state, taken = _mix(seed ^ _mix(start + first)), set[int]()
        for j in range(n - count, n):
            state = (state + 0x9E3779B97F4A7C15) & MASK
            place = (_mix(state) >> 32) * (j + 1) >> 32
            taken.add(j if place in taken else place)
        place_k[kept : kept + count] = [first + place for place in sorted(taken)]
        kept += count


def dead_zone(x_bn: Floats, t: float, out_bn: Floats) -> bool:
    """See `Selection.dead_zone`."""
    finite = True
    for row_n, out_n in zip(x_bn, out_bn, strict=True):
        square_n = row_n.astype(np.float64) ** 2
        sums = [0.0] * 16
        for j, square in enumerate(square_n.tolist()):
            sums[j % 16] += square
        total = 0.0
        for lane in sums:
            total += lane
        finite &= total < np.inf
        out_n[:] = np.where(square_n < t * t * (total / len(row_n)), np.float32(0), row_n)
    return finite


SELECTION = Selection(topk_take, topk_repack, topk_open, settle_zeros, random_places, dead_zone)
