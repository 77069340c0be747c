"""The inner loops of the codecs, each written twice: plain torch (`reference`) and numba (`numba_cpu`).

Both work on one window of b whole blocks of n coordinates, single-threaded, without the GIL where numba runs; callers
who want more cores spread windows over a thread pool. Tests hold the two equal byte for byte, which is possible because
no kernel adds floats: sums are of integers, so every order gives the same result.

This file names the kernels; importing it costs nothing. numba (0.7 s) is imported by the first call of `fastest`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Octets = NDArray[np.uint8]
Integers = NDArray[np.int64]
Levels = NDArray[np.int32]

LEVEL_MAX = 1 << 20
"""`q2_measure` scales magnitudes to integers of 20 bits: finer than the bf16 scales, and sums of 2**14 fit 64 bits."""

REFINEMENTS = 2
"""Lloyd steps after the first guess of the threshold: a third gains under 0.1 % of the error on Gauss and Laplace."""


class Split(NamedTuple):
    """How `q2_measure` cut the blocks' magnitudes, in units of absmax / LEVEL_MAX, into a low and a high class."""

    level_bn: Levels
    """Magnitudes, 0..LEVEL_MAX."""
    threshold_b: Integers
    """A magnitude is high if it is at least this."""
    total_b: Integers
    """Sum of all magnitudes."""
    high_sum_b: Integers
    """Sum of the high ones."""
    high_count_b: Integers
    """Number of the high ones, at least 1 unless the block is zero."""


class Kernels(NamedTuple):
    """One implementation of every inner loop. Arrays are C-contiguous; floats are finite; scales are >= 0."""

    int8_pack: Callable[[Floats, Floats, Octets], None]
    """(x_bn, scale_b, out_br): out[:, 4:] = round to even(x / scale), clamped to +-127; 0 where scale is 0."""

    int8_unpack: Callable[[Octets, Floats, Floats], None]
    """(records_br, scale_b, out_bn): out = int8(records[:, 4:]) * scale."""

    q2_measure: Callable[[Floats, Floats], Split]
    """(x_bn, absmax_b) -> classes of magnitudes by Lloyd's method, from a threshold at 1.25 mean magnitudes."""

    q2_pack: Callable[[Floats, Levels, Integers, NDArray[np.bool_], Octets], None]
    """(x_bn, level_bn, threshold_b, low_is_zero_b, out_br): out[:, 4:] = four codes to a byte (see `formats.q2`)."""

    q2_unpack: Callable[[Octets, Floats, Floats, Floats], None]
    """(records_br, low_b, high_b, out_bn): out = the codes' values."""

    topk_select: Callable[[Floats, int], Integers]
    """(x_bn, k) -> index_bk: the k largest magnitudes of each block, ascending; the lowest index wins a tie."""


@cache
def fastest() -> Kernels:
    """The numba kernels; imports numba on the first call, and compiles each kernel once per machine (kept on disk)."""
    from farflung.compression.kernels import numba_cpu

    return numba_cpu.KERNELS
