"""Formats that send every coordinate: fp32, bf16, int8 and q2. They also carry the values that `topk` keeps.

All numbers are little-endian. Decoding is a table or one fp32 multiplication per coordinate: exact on every machine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray

from farflung.compression.grammar import Arguments
from farflung.compression.kernels import LEVEL_MAX, Split, fastest
from farflung.compression.scheme import STRIDE, Field, Floats, Octets, Piece, Scheme, absmax_per_block, refuse_if
from farflung.compression.stage import Body, Build, Stage, with_coder
from farflung.protocol.limits import PAYLOAD_ABS_MAX
from farflung.protocol.rows import WINDOW_ALIGN, DenseRow

ABS_MAX = np.float32(PAYLOAD_ABS_MAX)
BF16_ABS_MAX = np.float32(999424)
"""The largest bf16 number that is at most PAYLOAD_ABS_MAX: 244 x 2**12."""

BF16_ABS_MAX_BITS = np.uint16(BF16_ABS_MAX.view(np.uint32) >> np.uint32(16))

INT8_SCALE_MAX = np.float32(7874.0156)
"""The largest fp32 number whose 127-fold, rounded to fp32, is at most PAYLOAD_ABS_MAX."""

NORMAL_MIN = np.finfo(np.float32).tiny


def fp32() -> Scheme:
    """The number itself: 4 bytes. Keeps -0.0 and denormals. 32 bits per parameter."""

    def write(x_bn: Floats, out_br: Octets) -> None:
        absmax_per_block(x_bn)
        np.clip(x_bn, -ABS_MAX, ABS_MAX, out=_view(out_br, "<f4"))

    def check(records_br: Octets, n: int) -> None:
        magnitude_bn = _view(records_br, "<u4") & np.uint32(0x7FFFFFFF)
        refuse_if(magnitude_bn.max(1) > ABS_MAX.view(np.uint32), "a value is not finite or too large")

    def fill(records_br: Octets, out_bn: Floats) -> None:
        out_bn[:] = _view(records_br, "<f4")

    return _scheme("fp32", WINDOW_ALIGN, lambda n: (Field("raw", 8, 4 * n),), write=write, check=check, fill=fill)


def bf16() -> Scheme:
    """Rounded to nearest even at 8 significant bits: 2 bytes. Keeps -0.0 and denormals. 16 bits per parameter."""

    def write(x_bn: Floats, out_br: Octets) -> None:
        absmax_per_block(x_bn)
        _view(out_br, "<u2")[:] = _to_bf16(np.clip(x_bn, -ABS_MAX, ABS_MAX))

    def check(records_br: Octets, n: int) -> None:
        magnitude_bn = _view(records_br, "<u2") & np.uint16(0x7FFF)
        refuse_if(magnitude_bn.max(1) > BF16_ABS_MAX_BITS, "a value is not finite or too large")

    def fill(records_br: Octets, out_bn: Floats) -> None:
        np.left_shift(_view(records_br, "<u2"), 16, out=out_bn.view(np.uint32), dtype=np.uint32)

    return _scheme("bf16", WINDOW_ALIGN, lambda n: (Field("raw", 8, 2 * n),), write=write, check=check, fill=fill)


def int8(block: int) -> Scheme:
    """Blockwise absmax: one fp32 scale = absmax / 127, then each coordinate as round(x / scale), one signed byte.

    Record: scale (4 bytes), n bytes. 8 + 32 / block bits per parameter. |error| <= scale / 2 (arXiv:2110.02861, §2.1).
    Canonical: the scale is 0 or normal, and the one that its own 127-fold gives; some byte of a block is +-127, none
    is -128, all are 0 if the scale is. Blocks below 127 x 2**-126 become zero; -0.0 becomes 0.
    """

    def write(x_bn: Floats, out_br: Octets) -> None:
        scale_b = np.minimum(absmax_per_block(x_bn) / np.float32(127), INT8_SCALE_MAX)
        scale_b[scale_b < NORMAL_MIN] = 0
        scale_b = _settled(scale_b)
        _view(out_br[:, :4], "<f4")[:, 0] = scale_b
        fastest().int8_pack(x_bn, scale_b, out_br)

    def check(records_br: Octets, n: int) -> None:
        bits_b, step_bn = _view(records_br[:, :4], "<u4")[:, 0], records_br[:, 4:].view(np.int8)
        top_b, bottom_b = step_bn.max(1), step_bn.min(1)
        wild_b = (bits_b > INT8_SCALE_MAX.view(np.uint32)) | ((bits_b > 0) & (bits_b < NORMAL_MIN.view(np.uint32)))
        refuse_if(wild_b, "a scale is negative, not normal or too large")
        scale_b = bits_b.view("<f4")
        refuse_if(_settled(scale_b) != scale_b, "a scale is not the one its largest value gives")
        refuse_if(bottom_b == -128, "a value is -128")
        widest_b = np.where(bits_b > 0, 127, 0)
        refuse_if(np.maximum(top_b, -bottom_b) != widest_b, "a block does not use the whole range of its scale")

    def fill(records_br: Octets, out_bn: Floats) -> None:
        scale_b = _view(records_br[:, :4], "<f4")[:, 0].astype(np.float32)
        fastest().int8_unpack(records_br, scale_b, out_bn)

    return _scheme(f"int8(block={block})", block, _coded(8), write=write, check=check, fill=fill)


def _settled(scale_b: Floats) -> Floats:
    """Of two neighbouring scales with the same 127-fold, the one that this largest value gives back; idempotent."""
    settled_b: Floats = scale_b * np.float32(127) / np.float32(127)
    return settled_b


def q2(block: int) -> Scheme:
    """Four levels -high, -low, low, high per block, at the mean magnitudes of two classes split by Lloyd's method.

    Record: low, high (bf16 each), then ceil(n / 4) bytes. Byte j holds the coordinates j, j + q, j + 2q, j + 3q of the
    block, q = ceil(n / 4), from the low bits up; a code is 2 x negative + high; codes past n are 0. 2 + 32 / block bits
    per parameter. Never worse than scaled signs: ||x - decoded||^2 <= ||x||^2 - ||x||_1^2 / n per block, up to the
    rounding of the levels (conditional means as in arXiv:2508.15706, here without a shift, so that zero stays zero).
    Canonical: 0 <= low < high or both 0; a level that is not 0 is used; a level that is 0 has no sign.
    """

    def write(x_bn: Floats, out_br: Octets) -> None:
        absmax_b = absmax_per_block(x_bn)
        split = fastest().q2_measure(x_bn, absmax_b)
        low_b, high_b, threshold_b = _q2_levels(split, absmax_b, x_bn.shape[1])
        level_b2 = _view(out_br[:, :4], "<u2")
        level_b2[:, 0], level_b2[:, 1] = _to_bf16(low_b), _to_bf16(high_b)
        fastest().q2_pack(x_bn, split.level_bn, threshold_b, low_b == 0, out_br)

    def fill(records_br: Octets, out_bn: Floats) -> None:
        level_b2 = _view(records_br[:, :4], "<u2").astype(np.uint32) << np.uint32(16)
        low_b, high_b = np.ascontiguousarray(level_b2.T).view(np.float32)
        fastest().q2_unpack(records_br, low_b, high_b, out_bn)

    return _scheme(f"q2(block={block})", block, _coded(2), write=write, check=_check_q2, fill=fill)


def _q2_levels(split: Split, absmax_b: Floats, n: int) -> tuple[Floats, Floats, NDArray[np.int64]]:
    """Low and high level (bf16 numbers in fp32) and the threshold: 0 if all are high, above all if all are low."""
    unit_b = absmax_b.astype(np.float64) / LEVEL_MAX
    low_sum_b, low_count_b = split.total_b - split.high_sum_b, n - split.high_count_b
    low_b = _round_bf16(low_sum_b / np.maximum(low_count_b, 1) * unit_b)
    high_b = _round_bf16(split.high_sum_b / np.maximum(split.high_count_b, 1) * unit_b)
    threshold_b = np.where(low_b == high_b, 0, split.threshold_b)
    low_b[low_b == high_b] = 0
    return low_b, high_b, np.where(high_b == 0, LEVEL_MAX + 1, threshold_b)


def _check_q2(records_br: Octets, n: int) -> None:
    """Presence of codes by bit tricks on whole bytes: in 0b...sh, h is the high bit of a coordinate and s its sign."""
    level_b2, byte_bq = _view(records_br[:, :4], "<u2"), records_br[:, 4:]
    low_b, high_b = level_b2[:, 0], level_b2[:, 1]
    refuse_if(high_b > BF16_ABS_MAX_BITS, "a level is negative, not finite or too large")
    refuse_if((low_b >= high_b) & (low_b > 0), "the low level is not below the high one")
    filled = 4 * byte_bq.shape[1] - n
    if filled:
        past_q = _past_the_end(byte_bq.shape[1], filled)
        refuse_if((byte_bq & past_q).any(1), "a code past the end is not 0")
        byte_bq = byte_bq | (past_q & np.uint8(0x55))  # so that they do not pass for low codes below
    some_high_b = np.bitwise_or.reduce(records_br[:, 4:] & np.uint8(0x55), axis=1) > 0
    some_low_b = np.bitwise_and.reduce(byte_bq | np.uint8(0xAA), axis=1) != 0xFF
    refuse_if(some_high_b != (high_b > 0), "the high level and its use disagree")
    refuse_if(~some_low_b & (low_b > 0), "the low level is never used")
    rare_b = low_b == 0
    if rare_b.any():
        byte_zq = byte_bq[rare_b]
        signed_zero_b = np.zeros(len(rare_b), np.bool_)
        signed_zero_b[rare_b] = (byte_zq & ~(byte_zq << 1) & np.uint8(0xAA)).any(1)
        refuse_if(signed_zero_b, "a zero has a sign")


def _past_the_end(quarter: int, filled: int) -> Octets:
    """The bits of a block's bytes that belong to no coordinate: the last `filled` of 4 x quarter codes."""
    code_4q = np.zeros((4, quarter), np.uint8)
    code_4q.reshape(-1)[4 * quarter - filled :] = 3
    past_q: Octets = np.bitwise_or.reduce(code_4q << np.array([[0], [2], [4], [6]], np.uint8), axis=0)
    return past_q


def _scheme(
    spec: str,
    block: int,
    fields: Callable[[int], tuple[Field, ...]],
    *,
    write: Callable[[Floats, Octets], None],
    check: Callable[[Octets, int], None],
    fill: Callable[[Octets, Floats], None],
) -> Scheme:
    """A scheme whose `read` checks each piece and fills its part of one new vector."""

    def read(pieces: list[Piece], size: int) -> DenseRow[torch.Tensor]:
        out_d = np.empty(size, np.float32)
        first = 0
        for piece in pieces:
            check(piece.records_br, piece.n)
            fill(piece.records_br, out_d[first : first + piece.size].reshape(-1, piece.n))
            first += piece.size
        return DenseRow(torch.from_numpy(out_d))

    return Scheme(
        spec,
        block,
        fields,
        lambda x_bn, piece, salt: write(x_bn, piece.records_br),
        lambda piece: check(piece.records_br, piece.n),
        read,
    )


def _coded(bits: int) -> Callable[[int], tuple[Field, ...]]:
    """The record of a format with four bytes of scales and one code of so many bits per coordinate."""
    return lambda n: (Field("raw", 8, 4), Field("codes", bits, n))


def _view(octets_br: Octets, dtype: DTypeLike) -> Any:
    """Records, or a part of each, as little-endian numbers, in place."""
    return octets_br.view(dtype)


def _to_bf16(x: Floats) -> NDArray[np.uint16]:
    """Nearest bf16, ties to even, of finite fp32 of at most PAYLOAD_ABS_MAX, as its bits."""
    bits = x.view(np.uint32)
    return ((bits + (np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1)))) >> np.uint32(16)).astype(np.uint16)


def _round_bf16(x_b: NDArray[np.float64]) -> Floats:
    """Magnitudes rounded to bf16 numbers, saturating at the largest one allowed."""
    bits_b = _to_bf16(np.minimum(x_b, BF16_ABS_MAX).astype(np.float32))
    rounded_b: Floats = (bits_b.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return rounded_b


def _plain(scheme: Callable[[], Scheme]) -> Build:
    """The parser's side of a format without arguments."""

    def build(arguments: Arguments, inner: Body | None, parse: Any) -> Body:
        arguments.end()
        return with_coder(scheme(), inner, arguments.stage)

    return build


def _blocked(scheme: Callable[[int], Scheme], default: int) -> Build:
    """The parser's side of a format whose only argument is its block."""

    def build(arguments: Arguments, inner: Body | None, parse: Any) -> Body:
        block = arguments.integer("block", BLOCK_MIN, STRIDE, default, power_of_two=True)
        arguments.end()
        return with_coder(scheme(block), inner, arguments.stage)

    return build


BLOCK_MIN = 16
"""Smaller blocks would spend more bits on scales than on values."""

INT8_BLOCK = 1024
"""8.03 bits per parameter; a spike spoils the resolution of 1,023 neighbours at most."""

Q2_BLOCK = 512
"""2.0625 bits per parameter; fine enough that a block seldom straddles matrices of different scale."""

STAGES = (
    Stage("fp32", "number format", "fp32", "The number itself.", "32", "none", "", _plain(fp32), ("fp32",)),
    Stage("bf16", "number format", "bf16", "Rounded to 8 significant bits.", "16", "none", "", _plain(bf16), ("bf16",)),
    Stage(
        "int8",
        "number format",
        "int8(block=1024)",
        "Blockwise absmax: 255 even steps.",
        "8 + 32/block",
        "none",
        "arXiv:2110.02861, §2.1",
        _blocked(int8, INT8_BLOCK),
        ("int8", "ef(1)|int8"),
    ),
    Stage(
        "q2",
        "number format",
        "q2(block=512)",
        "Two magnitudes per block with signs, split by Lloyd's method.",
        "2 + 32/block",
        "none",
        "conditional means as in arXiv:2508.15706",
        _blocked(q2, Q2_BLOCK),
        ("q2", "ef(1)|q2"),
    ),
)
