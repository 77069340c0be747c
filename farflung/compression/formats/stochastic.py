"""Unbiased rounding at random: TernGrad and QSGD, even steps between which each coordinate throws a die.

The dice are a hash of the stretch's salt and the coordinate, so encoding is a function of the update and the round.
Over the dice (one draw per round or member) the decoded row has the mean x; the next rounding of fp32 and the 2**-30 of
the dice aside. Such a format wants no error feedback: unbiasedness is paid for with variance, and where the error is
longer than what was encoded, error feedback grows without bound (see `qsgd`).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from farflung.compression.formats.records import (
    ABS_MAX,
    NORMAL_MIN,
    bits_of,
    blocked,
    dense,
    get_scale,
    header_and_codes,
    measured,
    put_scale,
    refuse_scale,
    take_block,
    view,
)
from farflung.compression.grammar import Arguments
from farflung.compression.kernels.codes import Doubles, fastest_codes
from farflung.compression.scheme import Floats, Octets, Scheme, refuse_if
from farflung.compression.stage import Body, Stage, require, with_coder

TERNARY_BLOCK = 512
"""2.0625 bits per parameter before entropy coding; s x max - x^2 grows with the largest of the block."""

QSGD_BLOCK = 512
"""Variance grows with sqrt(block) / levels (arXiv:1610.02132, Lemma 3.1); 512 is the paper's bucket."""

QSGD_LEVELS = 7

_FINE = np.uint32(0xFF)
"""The bits of an fp32 beyond 16 significant ones."""
LEVELS_MAX = 127


def ternary(block: int) -> Scheme:
    """s x sign(x) with probability |x| / s, else 0; s is the block's largest magnitude (arXiv:1705.07878, §3.1).

    Record: s (fp32), then 2-bit codes: 2 x negative + 1, or 0. 2 + 32 / block bits per parameter; log2(3) with an
    entropy coder. Unbiased, variance |x| (s - |x|). Canonical: s is 0 or a normal number; some code is not 0 unless s
    is; code 2 is none. Blocks below 2**-126 become zero. Behind error feedback what was not sent becomes many times the
    update but stays bounded: |e| / |x| was 8.3 after 60 rounds of Gaussian numbers (an entry equal to s is sent fully).
    """

    def write(x_bn: Floats, out_br: Octets, start: int, salt: int) -> None:
        x_bn, scale_b = measured(x_bn)
        scale_b[scale_b < NORMAL_MIN] = 0
        put_scale(scale_b, out_br)
        fastest_codes().steps_pack(x_bn, scale_b, 1, 2, start, salt, out_br, 4)

    def check(records_br: Octets, n: int) -> None:
        used_b, _, _ = _check_codes(records_br, 1, 2, n)
        refuse_if((used_b == 0) != (get_scale(records_br) == 0), "a scale and its use disagree")

    return dense(
        f"ternary(block={block})",
        block,
        header_and_codes(4, 2),
        write=write,
        check=check,
        fill=lambda records_br, out_bn: _fill(records_br, 1, 2, out_bn),
        salted=True,
    )


def qsgd(levels: int, block: int) -> Scheme:
    """Magnitudes as multiples of ||block||_2 / levels, rounded up or down at random (arXiv:1610.02132, §3.1).

    Record: the step ||block||_2 / levels (fp32, rounded up to 16 significant bits, so that its multiples are exact and
    no two steps decode alike), then codes of the fewest bits of 2, 4, 8 that hold a sign and `levels`: the upper bit is
    the sign. bits + 32 / block bits per parameter. Unbiased; variance of a block at most
    min(n / levels^2, sqrt(n) / levels) ||x||^2. Canonical: the step is 0 or a normal number; 0 if and only if all codes
    are; zero has no sign; the norm that the codes say can be the one that the step says. A block whose norm is beyond
    PAYLOAD_ABS_MAX takes that for it: larger entries saturate. Blocks of a step below 2**-126 become zero.

    Not a fixed point: encoding what was decoded gives another norm.

    Error feedback needs a variance below ||x||^2, so n <= levels^2 or so (arXiv:1901.09847, Assumption A). Measured,
    |e| / |x| with a fresh Gaussian x per round: 7 levels on 512, 1.3 after one round and 630 after 60; 7 on 32, 0.35.
    """
    require(1 <= levels <= LEVELS_MAX, f"levels must be from 1 to {LEVELS_MAX}, got {levels}")
    bits = 2 if levels == 1 else 4 if levels <= 7 else 8
    step_max = largest_step(levels)

    def write(x_bn: Floats, out_br: Octets, start: int, salt: int) -> None:
        x_bn, _ = measured(x_bn)
        norm_b = np.sqrt(fastest_codes().sum_squares(x_bn, np.zeros(len(x_bn))))
        step_b = np.minimum(_rounded_up(norm_b / levels), step_max)
        step_b[step_b < NORMAL_MIN] = 0
        put_scale(step_b, out_br)
        fastest_codes().steps_pack(x_bn, step_b, levels, bits, start, salt, out_br, 4)
        out_br[fastest_codes().level_sums(out_br, 4, bits, x_bn.shape[1])[0] == 0, :4] = 0

    def check(records_br: Octets, n: int) -> None:
        used_b, sum_b, square_b = _check_codes(records_br, levels, bits, n)
        step_b = get_scale(records_br)
        refuse_if((step_b.view(np.uint32) & _FINE) > 0, "a step has more than 16 significant bits")
        refuse_if((used_b == 0) != (step_b == 0), "a step and its use disagree")
        refuse_if((step_b > 0) & (square_b + 2 * sum_b + n < levels**2), "the codes are too small for their norm")
        too_large_b = square_b - 2 * sum_b + used_b > levels**2
        refuse_if((step_b < step_max) & too_large_b, "the codes are too large for their norm")

    return dense(
        f"qsgd(levels={levels}, block={block})",
        block,
        header_and_codes(4, bits),
        write=write,
        check=check,
        fill=lambda records_br, out_bn: _fill(records_br, levels, bits, out_bn),
        salted=True,
    )


def largest_step(levels: int) -> np.float32:
    """The largest step of 16 significant bits whose `levels`-fold is at most PAYLOAD_ABS_MAX."""
    step = np.float32(ABS_MAX / np.float32(levels))
    while np.float32(levels) * step > ABS_MAX:
        step = np.nextafter(step, np.float32(0))
    while np.float32(levels) * np.nextafter(step, ABS_MAX) <= ABS_MAX and step < ABS_MAX:
        step = np.nextafter(step, ABS_MAX)
    return np.uint32(step.view(np.uint32) & ~_FINE).view(np.float32)


def _rounded_up(step_b: Doubles) -> Floats:
    """The next fp32 of 16 significant bits, so that no entry lies above the top level."""
    near_b = step_b.astype(np.float32)
    up_b: Floats = np.where(near_b < step_b, np.nextafter(near_b, np.float32(np.inf)), near_b)
    short_b: Floats = ((up_b.view(np.uint32) + _FINE) & ~_FINE).view(np.float32)
    return short_b


def _check_codes(records_br: Octets, levels: int, bits: int, n: int) -> tuple[Any, Any, Any]:
    """PeerError unless steps and codes are canonical one by one; otherwise the codes' `level_sums`."""
    refuse_scale(view(records_br[:, :4], "<u4")[:, 0], bits_of(NORMAL_MIN), bits_of(largest_step(levels)))
    seen_bl, stray_b = fastest_codes().seen(records_br, 4, bits, n)
    half = 1 << bits - 1
    refuse_if(stray_b, "a code past the end is not 0")
    refuse_if(seen_bl[:, half], "a zero has a sign")
    refuse_if(seen_bl[:, levels + 1 : half].any(1) | seen_bl[:, half + levels + 1 :].any(1), "a level is too high")
    return fastest_codes().level_sums(records_br, 4, bits, n)


def _fill(records_br: Octets, levels: int, bits: int, out_bn: Floats) -> None:
    level_l = np.arange(1 << bits - 1, dtype=np.float32)
    level_l[levels + 1 :] = 0  # codes that the check refuses
    value_l = np.concatenate([level_l, np.float32(0) - level_l])
    fastest_codes().unpack_scaled(records_br, 4, bits, value_l, get_scale(records_br), out_bn)


def _build_qsgd(arguments: Arguments, inner: Body | None, parse: Any) -> Body:
    levels = arguments.integer("levels", 1, LEVELS_MAX, QSGD_LEVELS)
    block = take_block(arguments, QSGD_BLOCK)
    arguments.end()
    return with_coder(qsgd(levels, block), inner, arguments.stage)


STAGES = (
    Stage(
        "ternary",
        "number format",
        "ternary(block=512)",
        "-s, 0 or s at random, unbiased; s is the block's absmax.",
        "2 + 32/block",
        "none",
        "arXiv:1705.07878, §3.1",
        blocked(ternary, TERNARY_BLOCK),
        ("ternary", "topk(64/4096)|ternary"),
    ),
    Stage(
        "qsgd",
        "number format",
        "qsgd(levels=7, block=512)",
        "Steps of the block's norm, rounded at random, unbiased.",
        "2, 4 or 8 for levels of 1, up to 7, up to 127; + 32/block",
        "none",
        "arXiv:1610.02132, §3.1",
        _build_qsgd,
        ("qsgd", "qsgd(levels=1, block=64)", "qsgd(levels=127)", "topk(64/4096)|qsgd"),
    ),
)
