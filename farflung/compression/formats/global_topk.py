"""Top-k of the whole vector: the largest coordinates wherever they are."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from farflung.compression.codec import Codec, Reader, Row
from farflung.compression.formats.sparse import move_codes, refuse_infinite, values_of
from farflung.compression.grammar import Arguments
from farflung.compression.kernels.selection import Places, fastest_selection
from farflung.compression.scheme import (
    NOBODY,
    STRIDE,
    Floats,
    Octets,
    Piece,
    Scheme,
    cut,
    require_update,
    require_window,
    salt_of,
    strides,
)
from farflung.compression.stage import Body, Stage, require
from farflung.protocol.errors import PeerError
from farflung.protocol.rows import SparseRow
from farflung.protocol.schema import Schema

UNIT_MIN, UNIT_MAX = 64, STRIDE // 2
"""Coordinates in a unit; the largest keeps counts within 16 bits."""

PARTS = 10**7
"""A ratio has at most seven digits behind the point: it is counted in these, so that k is exact."""

DIGITS = ((20, 11), (10, 10), (0, 10))
"""(shift, width) of the three digits of a magnitude's 31 bits."""


class Units(NamedTuple):
    """Where the units of a payload are."""

    count_u: NDArray[np.int64]
    offset_u: NDArray[np.int64]
    """Start of each unit's bytes, and the end of the last."""
    octets: Octets


def global_topk(ratio: float, value: Scheme) -> Codec:
    """Send the ceil(ratio x d) largest magnitudes of the vector; the lowest index wins a tie.

    The vector is cut into units: the largest power of two of coordinates that keep at most one block of `value` on
    average. Payload: the number of values of each unit (2 bytes), then unit by unit its values, as one block of `value`
    of that many, and their indices by Elias-Fano: low = floor(log2(n / count)) bits each, packed; then from a new byte
    on count + ((n - 1) >> low) bits, of which p + (index_p >> low) are set; units without values have no bytes.
    About 2 + log2(1 / ratio) bits per index, half a bit above their entropy. ||x - sent||^2 <= (1 - k / d) ||x||^2
    (arXiv:1809.07599, §2). Canonical: indices strictly increase, and there are at most k. `encode` leaves out what the
    format makes 0, so that no kept value of a unit is 0, unless the format refuses the block without its zeros (`stat`
    lists 0 among its levels): then all stay, each +0.0, and the p-th kept value is at index p, so that zeros take the
    lowest free places, and some value is not 0. Encoding passes four times over the vector, without copying it.
    """
    parts = round(ratio * PARTS)
    require(0 < parts <= PARTS and not value.sparse, f"no global top-k of {ratio} over {value.spec}")
    unit = min(max(1 << (value.block * PARTS // parts).bit_length() - 1, UNIT_MIN), UNIT_MAX)

    def kept(d: int) -> int:
        return -(-parts * d // PARTS)

    def encode(update_d: Tensor, private: Any, shared: Any, round_index: int) -> tuple[bytes, Any]:
        require_update(update_d)
        kth, ties = _kth_magnitude(update_d, kept(len(update_d)))
        counts, bodies = [], []
        for start, window_d in _windows(update_d, unit):
            count, body, ties = _write_unit(value, window_d, start, kth, ties, round_index)
            counts.append(count)
            bodies.append(body)
        return np.array(counts, "<u2").tobytes() + b"".join(bodies), private

    def open_(payload: bytes, schema: Schema, shared: Any, round_index: int) -> Reader:
        units, d = _units_of(payload, schema.numel, kept(schema.numel), unit, value), schema.numel

        def read(start: int, stop: int) -> Row:
            require_window(start, stop, d)
            low, high = start // unit * unit, min(-(-stop // unit) * unit, d)
            index_parts, value_parts = [], []
            for first in range(low, high, unit):
                index_k, value_k = _read_unit(value, units, first // unit, min(unit, d - first))
                index_parts.append(torch.from_numpy(index_k + (first - low)))
                value_parts.append(torch.from_numpy(value_k))
            row = SparseRow(high - low, torch.cat(index_parts), torch.cat(value_parts))
            return row if (low, high) == (start, stop) else cut(row, start - low, stop - low)

        return read

    def check(payload: bytes, schema: Schema, shared: Any, round_index: int) -> None:
        units, d = _units_of(payload, schema.numel, kept(schema.numel), unit, value), schema.numel
        for first in range(0, d, unit):
            _read_unit(value, units, first // unit, min(unit, d - first))

    def bits(schema: Schema) -> float:
        """Each of the sums of concave functions is largest where all units keep alike."""
        d, k = schema.numel, kept(schema.numel)
        units = -(-d // unit)
        slope = 8 * (value.record_bytes(2 * unit) - value.record_bytes(unit)) / unit
        return (k * (slope + math.log2(d / k) + 3) + units * (16 + 8 * value.record_bytes(1) + 16)) / d

    return Codec(
        spec=f"global-topk({ratio:.7f}".rstrip("0").rstrip(".") + f")|{value.spec}",
        exact=True,
        init=lambda schema: (None, None),
        encode=encode,
        open=open_,
        check=check,
        bits=bits,
    )


def _units_of(payload: bytes, d: int, k: int, unit: int, value: Scheme) -> Units:
    """Where the units are. PeerError unless the counts fit d, k and the payload's length."""
    units, octets = -(-d // unit), np.frombuffer(payload, np.uint8)
    if len(octets) < 2 * units:
        raise PeerError(NOBODY, f"a payload of {units} units has {2 * units} bytes or more, got {len(octets)}")
    count_u = octets[: 2 * units].view("<u2").astype(np.int64)
    size_u = np.full(units, unit)
    size_u[-1] = d - unit * (units - 1)
    if (count_u > size_u).any() or count_u.sum() > k:
        raise PeerError(NOBODY, f"more values than coordinates, or than {k}, got {count_u.sum()}")
    found, where_u = np.unique(count_u, return_inverse=True)
    length_u = np.array([_unit_bytes(value, unit, int(count)) for count in found])[where_u]
    length_u[-1] = _unit_bytes(value, int(size_u[-1]), int(count_u[-1]))
    offset_u = 2 * units + np.concatenate([[0], np.cumsum(length_u)])
    if offset_u[-1] != len(octets):
        raise PeerError(NOBODY, f"a payload with these counts has {offset_u[-1]} bytes, got {len(octets)}")
    return Units(count_u, offset_u, octets)


def _unit_bytes(value: Scheme, n: int, count: int) -> int:
    return value.record_bytes(count) + _elias_bytes(n, count) if count else 0


def _windows(update_d: Tensor, size: int) -> Iterator[tuple[int, Floats]]:
    """The vector in parts on the CPU, each with its start."""
    for first, stop in strides(0, len(update_d)):
        stride_d = update_d[first:stop].detach().cpu().contiguous().numpy()
        for start in range(0, len(stride_d), size):
            yield first + start, stride_d[start : start + size]


def _kth_magnitude(update_d: Tensor, k: int) -> tuple[int, int]:
    """The bits of the k-th largest magnitude, and how many equal ones are among the k. LocalError if not finite."""
    from farflung.compression.kernels.global_select import histogram

    found, left = 0, k
    for shift, width in DIGITS:
        count_h = np.zeros(1 << width, np.int64)
        for _, window_d in _windows(update_d, STRIDE):
            histogram(window_d, found, shift, width, count_h)
        if shift == DIGITS[0][0]:
            refuse_infinite(int(count_h.nonzero()[0][-1]) << shift)
        reach_h = count_h[::-1].cumsum()[::-1]  # how many have this digit or a larger one
        digit = int((reach_h >= left).nonzero()[0][-1])
        left -= int(reach_h[digit] - count_h[digit])
        found = found << width | digit
    return found, left


def _write_unit(
    value: Scheme, window_d: Floats, start: int, kth: int, ties: int, round_index: int
) -> tuple[int, bytes, int]:
    """(number of values, bytes, ties left) of a unit."""
    from farflung.compression.kernels.global_select import elias_write, take_from

    n = len(window_d)
    place_k, kept_k = np.empty(n, np.int32), np.empty(n, np.float32)
    found, ties = take_from(window_d, kth, ties, place_k, kept_k)
    if not found:
        return 0, b"", ties
    values_br = np.empty((1, value.record_bytes(found)), np.uint8)
    salt = salt_of(window_d, round_index) if value.salted else 0
    value.write(kept_k[None, :found], Piece(values_br, found, start), salt)
    value_k = values_of(value, values_br, found)[0]
    if not value_k.all():
        values_br, place_k = _settled(value, values_br, value_k, place_k[:found])
        found = len(place_k)
        if not found:
            return 0, b"", ties
    out_r = np.empty(_elias_bytes(n, found), np.uint8)
    elias_write(place_k[:found], _low_bits(n, found), out_r)
    return found, values_br.tobytes() + out_r.tobytes(), ties


def _settled(value: Scheme, values_br: Octets, value_k: Floats, place_k: Places) -> tuple[Octets, Places]:
    """A unit some of whose values are 0, without them, or with them at the lowest free places."""
    without_br = _without_zeros(value, values_br, value_k)
    if without_br is not None:
        return without_br, place_k[value_k != 0]
    place_bk, order_bk, count_c = place_k[None].copy(), np.empty((1, len(place_k)), np.int32), np.array([len(place_k)])
    if fastest_selection().settle_zeros(place_bk, value_k[None], count_c, order_bk):
        values_br = move_codes(value, values_br, value_k[None], order_bk)
    return values_br, place_bk[0]


def _without_zeros(value: Scheme, values_br: Octets, value_k: Floats) -> Octets | None:
    """A unit's record of its values that are not 0, empty if all are; None if the format refuses it."""
    stay_s = value_k.nonzero()[0].astype(np.int32)
    if not len(stay_s):
        return np.empty((1, 0), np.uint8)
    moved_br = move_codes(value, values_br, value_k[None], stay_s[None])
    try:
        value.check(Piece(moved_br, len(stay_s), 0))
    except PeerError:
        return None
    return moved_br


def _read_unit(value: Scheme, units: Units, u: int, n: int) -> tuple[NDArray[np.int64], Floats]:
    """Indices within a unit of n coordinates, and values. PeerError unless canonical."""
    from farflung.compression.kernels.global_select import elias_read

    count = int(units.count_u[u])
    index_k = np.empty(count, np.int64)
    if not count:
        return index_k, np.empty(0, np.float32)
    body_r = units.octets[units.offset_u[u] : units.offset_u[u + 1]]
    split = value.record_bytes(count)
    value_k = values_of(value, body_r[None, :split].copy(), count)[0]
    if not elias_read(body_r[split:], _low_bits(n, count), n, index_k):
        raise PeerError(NOBODY, f"indices do not strictly increase below {n}, or a loose bit is set, in unit {u}")
    if not value_k.all():
        zero_k = value_k == 0
        if (index_k != np.arange(count))[zero_k].any() or value_k.view(np.int32)[zero_k].any():
            raise PeerError(NOBODY, f"a kept value is 0 and has a sign or not the lowest free place, in unit {u}")
        if _without_zeros(value, body_r[None, :split], value_k) is not None:
            raise PeerError(NOBODY, f"a kept value is 0 and could be left out, in unit {u}")
    return index_k, value_k


def _low_bits(n: int, count: int) -> int:
    return (n // count).bit_length() - 1 if count else 0


def _elias_bytes(n: int, count: int) -> int:
    if not count:
        return 0
    low = _low_bits(n, count)
    return (count * low + 7) // 8 + (count + (n - 1 >> low) + 7) // 8


def _build(arguments: Arguments, inner: Body | None, parse: Any) -> Body:
    ratio = arguments.decimal("ratio", 1 / PARTS, 1)
    arguments.end()
    if not isinstance(inner, Scheme) or inner.sparse or inner.in_round:
        arguments.stage.refuse("needs a number format after it, and codes its indices itself", "global-topk(0.01)|q2")
    return global_topk(ratio, inner)


STAGES = (
    Stage(
        "global-topk",
        "sparsifier",
        "global-topk(ratio)",
        "The largest magnitudes of the whole vector.",
        "ratio x (2 + log2(1/ratio) + value)",
        "none",
        "arXiv:1809.07599, §2; indices: Elias 1974",
        _build,
        (
            "global-topk(0.015625)|q2",
            "global-topk(0.01)|bf16",
            "global-topk(0.2)|ternary",
            "global-topk(0.05)|stat",
            "ef(1)|global-topk(0.05)|int8",
        ),
    ),
)
