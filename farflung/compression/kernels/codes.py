"""The inner loops of the formats that store one small code per coordinate, each written twice.

`codes_reference` is plain numpy, `codes_numba` the same machine code for every window size. Records are rows of bytes:
a header of `header` bytes, then the codes of `bits` (1, 2, 4 or 8) as `scheme.Field` lays them out. Floats are
added in fp64 in LANES lanes: lane l adds the entries l, l + LANES, l + 2 LANES, ... one after the other, then the
lanes are added from the first to the last; so the sum is one number, whatever the machine and its registers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from farflung.compression.kernels import Floats, Integers, Octets

Doubles = NDArray[np.float64]

LANES = 16
"""Lanes of a sum; two registers of eight doubles."""

NF4_VALUES = np.array(
    (
        (-1, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        (-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0),
        (0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        (0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1),
    ),
    np.float32,
).reshape(-1)
"""Quantiles of the normal distribution, scaled to [-1, 1] (arXiv:2305.14314, appendix E)."""


def _up(middle_l: Doubles) -> Floats:
    """The smallest fp32 numbers that are not below these: x >= middle is then the same question in fp32."""
    near_l = middle_l.astype(np.float32)
    up_l: Floats = np.where(near_l < middle_l, np.nextafter(near_l, np.float32(2)), near_l)
    return up_l


NF4_BOUNDS = _up((NF4_VALUES[1:].astype(np.float64) + NF4_VALUES[:-1].astype(np.float64)) / 2)
"""Where a code ends and the next one begins: halfway between their values; the boundary itself belongs to the upper."""

NATURAL_TOP_EXPONENT = 146
"""The biased exponent of 2**19, the largest power of two within PAYLOAD_ABS_MAX = 10**6."""

NATURAL_TOP_LEVEL = 1_000_000
"""The level above 2**19: PAYLOAD_ABS_MAX itself, not 2**20."""

CHANCE_BITS = 30
"""Random bits against which a fraction is compared: a probability is met within 2**-30."""


class CodeKernels(NamedTuple):
    """One implementation of every inner loop. Arrays are C-contiguous; floats are finite; scales are >= 0.

    A scale of 0 makes a block of zeros. `start` is the coordinate of the first entry; with `salt` it decides the dice.
    """

    absmax: Callable[[Floats], Floats]
    """x_bn -> largest magnitude of each block; not finite if an entry is not."""

    sum_magnitudes: Callable[[Floats], Doubles]
    """x_bn -> sum of |x| of each block, in fp64 in lanes."""

    sum_squares: Callable[[Floats, Doubles], Doubles]
    """(x_bn, shift_b) -> sum of (x - shift)**2 of each block, in fp64 in lanes."""

    sum_plain: Callable[[Floats], Doubles]
    """x_bn -> sum of x of each block, in fp64 in lanes."""

    sign_pack: Callable[[Floats, Floats, Octets, int], None]
    """(x_bn, scale_b, out_br, header): code 1 where x < 0."""

    e3m0_pack: Callable[[Floats, Floats, Octets, int], None]
    """(x_bn, scale_b, out_br, header): 8 x negative + e; e = 0 for 0, else magnitude 2**(e - 7) of the scale."""

    nf4_pack: Callable[[Floats, Floats, Octets, int], None]
    """(x_bn, scale_b, out_br, header): the number of NF4_BOUNDS that are <= x / scale."""

    steps_pack: Callable[[Floats, Floats, int, int, int, int, Octets, int], None]
    """(x_bn, step_b, levels, bits, start, salt, out_br, header): 2**(bits - 1) x negative + level; the level is
    |x| / step rounded up or down at random, unbiased, at most `levels`."""

    natural_pack: Callable[[Floats, int, int, Octets], None]
    """(x_bn, start, salt, out_br): one bit each for the signs, then one byte each for the exponents."""

    bins: Callable[[Floats, Doubles, Doubles, int], tuple[Octets, Doubles, Integers]]
    """(x_bn, shift_b, per_unit_b, levels) -> (bin_bn, sum_bl, count_bl): bin = (x - shift) x per_unit + levels / 2,
    rounded to even, clamped to 0..levels - 1; sums in fp64 of the entries 0, 8, 16, ..., then of 1, 9, 17, ..."""

    ranked_pack: Callable[[Octets, Octets, int, Octets, int], None]
    """(bin_bn, rank_bl, bits, out_br, header): code = rank[bin]."""

    unpack: Callable[[Octets, int, int, Floats, Floats], None]
    """(records_br, header, bits, table_bl, out_bn): out = table[code]."""

    unpack_scaled: Callable[[Octets, int, int, Floats, Floats, Floats], None]
    """(records_br, header, bits, value_l, scale_b, out_bn): out = value[code] x scale."""

    seen: Callable[[Octets, int, int, int], tuple[NDArray[np.bool_], NDArray[np.bool_]]]
    """(records_br, header, bits, n) -> (seen_bl, stray_b): which codes a block uses; whether one past n is not 0."""

    level_sums: Callable[[Octets, int, int, int], tuple[Integers, Integers, Integers]]
    """(records_br, header, bits, n) -> (used_b, sum_b, square_b): of the codes without their highest bit, how many are
    not 0, their sum, and the sum of their squares."""


@cache
def fastest_codes() -> CodeKernels:
    """The numba kernels; imports numba on the first call, and compiles each kernel once per machine (kept on disk)."""
    from farflung.compression.kernels import codes_numba

    return codes_numba.KERNELS
