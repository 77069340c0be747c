"""The names of the sparsifiers' inner loops. Importing this costs nothing; numba comes with the first call."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from farflung.compression.kernels import Floats, Integers, Octets

Places = NDArray[np.int32]

PROBLEMS = (
    "",
    "a padding bit of the indices is set",
    "an index is past the end of its chunk",
    "indices do not strictly increase",
    "a kept zero is not +0.0 at its index",
)
"""What `topk_open` may find wrong, by number."""


class Selection(NamedTuple):
    """One implementation of every inner loop. A record of `total` coordinates has chunks of `chunk`, the last one maybe
    short; a chunk of n keeps ceil(k n / chunk) values. Arrays are C-contiguous."""

    topk_take: Callable[[Floats, int, int, int, Places, Floats, Octets, int], int]
    """(x_bn, k, chunk, width, index_bk, value_bk, records_br, first) -> the largest magnitude's bits, those of infinity
    or more if an entry is not finite. Fills the places within their chunks, the values (+0.0 for -0.0), and the
    records' bytes from `first` on: each chunk's places, `width` bits each, from the low bits of a new byte on."""

    topk_repack: Callable[[Places, int, int, int, int, Octets, int], None]
    """(index_bk, total, k, chunk, width, records_br, first): the records' bytes from `first` on."""

    topk_open: Callable[[Octets, int, int, int, int, int, Integers, Floats], int]
    """(records_br, first, total, k, chunk, width, index_bk, value_bk) -> 0, or a number of PROBLEMS + 8 x the record's
    number. Fills the indices, counted from the first record's start."""

    settle_zeros: Callable[[Places, Floats, Integers, Places], bool]
    """(index_bk, value_bk, count_c, order_bk) -> whether a zero had to move or had a sign. New indices in place, zeros
    at each chunk's lowest free ones; the value that now comes at p in its record is the old one at order[p]."""

    random_places: Callable[[int, int, int, int, int, Places], None]
    """(seed, start, total, k, chunk, place_k): for each chunk from coordinate `start` of the vector on, its random
    places, ascending, counted from `start`: Floyd's sample whose draws are hashes of seed, coordinate, number."""

    dead_zone: Callable[[Floats, float, Floats], bool]
    """(x_bn, t, out_bn) -> whether all is finite: entries below t x rms of their block become 0. Squares are exact in
    fp64 and summed in 16 interleaved lanes, which are added in order."""


@cache
def fastest_selection() -> Selection:
    """The numba loops; compiles each once per machine (kept on disk)."""
    from farflung.compression.kernels import select

    return select.SELECTION
