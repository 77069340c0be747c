"""4-bit floats under one absmax scale per block: E3M0, whose levels are powers of two, and NF4, quantiles of a normal.

Both hold the block's largest magnitude exactly, so that decoding and encoding again gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from farflung.compression.formats.records import (
    ABS_MAX,
    bits_of,
    blocked,
    dense,
    get_scale,
    header_and_codes,
    measured,
    put_scale,
    refuse_scale,
    view,
)
from farflung.compression.kernels.codes import NF4_VALUES, fastest_codes
from farflung.compression.scheme import Floats, Octets, Scheme, refuse_if
from farflung.compression.stage import Stage

SCALE_MIN = np.float32(2.0**-120)
"""Below it a block is zero: the smallest level, 1/64 of the scale, must be a normal number."""

E3M0_VALUES = np.array([0, *(2.0 ** (e - 7) for e in range(1, 8))], np.float32)
"""Magnitudes in units of the scale: 0, 1/64, 1/32, ..., 1; those of oneDNN's f4_e3m0 divided by their largest, 16."""

E3M0_BLOCK = 512
"""4.0625 bits per parameter; seven octaves below the largest of 512 numbers reach far into a bell curve's centre."""

NF4_BLOCK = 64
"""4.5 bits per parameter, as published: the quantiles are those of a normal, whose largest of 64 is 2.4 sigma."""

E3M0_TABLE = np.concatenate([E3M0_VALUES, -E3M0_VALUES])
E3M0_TOP, E3M0_MINUS_ZERO = (7, 15), 8
NF4_TOP, NF4_ZERO = (0, 15), 7


def e3m0(block: int) -> Scheme:
    """1 sign, 3 exponent and no mantissa bits times the block's largest magnitude (arXiv:2501.18512, §3).

    Record: the scale (fp32: the absmax, which the top level 1 gives back), then 4-bit codes: 8 x negative + e, value
    2**(e - 7) x scale, 0 for e = 0. 4 + 32 / block bits per parameter. The paper gives neither the granularity of its
    scales nor a zero: one scale per block here, and code 0 is zero. Rounds |x| / scale (in fp32) to the nearest level
    in value, halfway to the larger; |error| <= |x| / 3, or scale / 128 below scale / 64. Canonical: the scale is 0 or
    from 2**-120; some code has e = 7 unless the scale is 0, then all are 0; zero has no sign. Blocks below 2**-120
    become zero.
    """

    def check(records_br: Octets, n: int) -> None:
        seen_bl = _check_scale(records_br, n)
        refuse_if(seen_bl[:, E3M0_MINUS_ZERO], "a zero has a sign")
        _check_use(records_br, seen_bl, E3M0_TOP, 0)

    return _absmax_format(f"e3m0(block={block})", block, lambda: fastest_codes().e3m0_pack, check, E3M0_TABLE)


def nf4(block: int) -> Scheme:
    """The 16 NF4 levels times the block's largest magnitude, the nearest in value (arXiv:2305.14314, §3).

    Record: the scale (fp32: the absmax), then 4-bit codes, the level's position in NF4_VALUES: 7 is zero. 4 + 32 /
    block bits per parameter. Rounds x / scale (in fp32), halfway to the upper; |error| <= 0.152 x scale. Canonical: the
    scale is 0 or from 2**-120; some code is 0 or 15 unless the scale is 0, then all are 7. Blocks below 2**-120 become
    zero.
    """

    def check(records_br: Octets, n: int) -> None:
        _check_use(records_br, _check_scale(records_br, n), NF4_TOP, NF4_ZERO)

    return _absmax_format(f"nf4(block={block})", block, lambda: fastest_codes().nf4_pack, check, NF4_VALUES)


def _absmax_format(
    spec: str,
    block: int,
    pack: Callable[[], Callable[[Floats, Floats, Octets, int], None]],
    check: Callable[[Octets, int], None],
    value_l: Floats,
) -> Scheme:
    """A format of 4-bit codes for levels `value_l` in units of the block's absmax."""

    def write(x_bn: Floats, out_br: Octets, start: int, salt: int) -> None:
        x_bn, scale_b = measured(x_bn)
        scale_b[scale_b < SCALE_MIN] = 0
        put_scale(scale_b, out_br)
        pack()(x_bn, scale_b, out_br, 4)

    def fill(records_br: Octets, out_bn: Floats) -> None:
        fastest_codes().unpack_scaled(records_br, 4, 4, value_l, get_scale(records_br), out_bn)

    return dense(spec, block, header_and_codes(4, 4), write=write, check=check, fill=fill)


def _check_scale(records_br: Octets, n: int) -> Any:
    """PeerError unless scales and padding are canonical; otherwise which codes each block uses, [b, 16]."""
    refuse_scale(view(records_br[:, :4], "<u4")[:, 0], bits_of(SCALE_MIN), bits_of(ABS_MAX))
    seen_bl, stray_b = fastest_codes().seen(records_br, 4, 4, n)
    refuse_if(stray_b, "a code past the end is not 0")
    return seen_bl


def _check_use(records_br: Octets, seen_bl: Any, top: tuple[int, int], zero: int) -> None:
    """PeerError unless a block with a scale has a largest value, and one without it nothing but zeros."""
    empty_b = get_scale(records_br) == 0
    unused_b = ~(empty_b | seen_bl[:, top[0]] | seen_bl[:, top[1]])
    refuse_if(unused_b, "a block does not use the whole range of its scale")
    if empty_b.any():
        refuse_if(empty_b & (seen_bl.sum(1) > seen_bl[:, zero]), "a block without a scale is not zero")


STAGES = (
    Stage(
        "e3m0",
        "number format",
        "e3m0(block=512)",
        "4-bit floats: sign and seven powers of two below the block's absmax.",
        "4 + 32/block",
        "none",
        "arXiv:2501.18512",
        blocked(e3m0, E3M0_BLOCK),
        ("e3m0", "e3m0(block=32)", "topk(64/4096)|e3m0"),
    ),
    Stage(
        "nf4",
        "number format",
        "nf4(block=64)",
        "16 quantiles of a normal times the block's absmax.",
        "4 + 32/block",
        "none",
        "arXiv:2305.14314, §3",
        blocked(nf4, NF4_BLOCK),
        ("nf4", "topk(64/4096)|nf4"),
    ),
)
