"""The inner loops of the codecs, each written twice: plain torch (`reference`) and numba (`numba_cpu`).

All work on a run of b whole blocks of n coordinates, single-threaded, without the GIL where numba runs; callers who
want more cores spread stretches over a thread pool. Tests hold the two equal byte for byte, which is possible because
no kernel adds floats in an order that could change: sums are of integers, or of fp64 in LANES fixed lanes.

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

LEVEL_MAX = 1 << 20
"""`q2` scales magnitudes to integers of 20 bits: finer than its bf16 levels, and sums of 2**14 fit 64 bits."""

REFINEMENTS = 2
"""Lloyd steps after the first guess of the threshold: a third gains under 0.1 % of the error on Gauss and Laplace."""

LANES = 16
"""`square_sum` adds every sixteenth square into one fp64 lane, then the lanes in order."""

ABS_MAX_BITS = 0x49742400
"""limits.PAYLOAD_ABS_MAX, 1e6, as the bits of fp32."""

BF16_ABS_MAX_BITS = 0x4974
"""The largest bf16 number that is at most PAYLOAD_ABS_MAX: 244 x 2**12 = 999424."""

INT8_SCALE_MAX = np.float32(7874.0156)
"""The largest fp32 number whose 127-fold, rounded to fp32, is at most PAYLOAD_ABS_MAX."""

SCALE_MAX_BITS = {4: 0x480B, 2: BF16_ABS_MAX_BITS}
"""Bits of a code -> the largest bf16 scale: 142336, whose 7-fold is 996352, and the largest number."""

FAULTS = (
    "a value is not finite or too large",
    "a scale or level is negative, not normal or too large",
    "a scale is not the one its largest value gives",
    "a code that no value has",
    "a block does not use the whole range of its scale",
    "a code past the end is not 0",
    "the low level is not below the high one",
    "a level and its use disagree",
    "a zero has a sign",
)
"""Why a record is refused."""

WILD, SCALE, UNSETTLED, UNUSED_CODE, NARROW, PAST_END, ORDER, USE, SIGNED_ZERO = range(len(FAULTS))


class Packing(NamedTuple):
    """Both directions of one number format (`formats.dense` says what its records are)."""

    write: Callable[[Floats, Octets], int]
    """(x_bn, out_br): fill the records; -1, or the first block with an entry that is not finite."""

    read: Callable[[Octets, Floats], int]
    """(records_br, out_bn): decode; -1, or len(FAULTS) x record + fault of the first record `write` cannot have made.
    Of several faults of one record, any may be named."""


class Kernels(NamedTuple):
    """One implementation of every inner loop. Arrays are C-contiguous, octets little-endian."""

    fp32: Packing
    bf16: Packing
    int8: Packing
    int4: Packing
    int2: Packing
    q2: Packing

    carry: Callable[[Floats, Floats, np.float32], None]
    """(error_d, update_d, beta): error = beta * error + update, two roundings."""

    take_away: Callable[[Floats, Integers, Floats], None]
    """(x_d, index_k, value_k): x[index] -= value; indices are distinct and below d."""

    top_bits: Callable[[Floats], int]
    """x_d -> the bits of its largest magnitude; above 0x7F7FFFFF if an entry is not finite."""

    square_sum: Callable[[Floats], float]
    """x_d -> the sum of its squares in fp64, in the order that LANES says."""

    topk_select: Callable[[Floats, int], Integers]
    """(x_bn, k) -> index_bk: the k largest magnitudes of each block, ascending; the lowest index wins a tie."""


@cache
def fastest() -> Kernels:
    """The numba kernels; imports numba on the first call, and compiles each kernel once per machine (kept on disk)."""
    from farflung.compression.kernels import numba_cpu

    return numba_cpu.KERNELS
