"""Formats that send every coordinate: fp32, bf16, int8, int4, int2 and q2. They also carry the values `topk` keeps.

All numbers are little-endian. Decoding is a table or one fp32 multiplication per coordinate: exact on every machine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from farflung.compression.grammar import Arguments
from farflung.compression.kernels import (
    ABS_MAX_BITS,
    BF16_ABS_MAX_BITS,
    FAULTS,
    INT8_SCALE_MAX,
    Kernels,
    Packing,
    fastest,
)
from farflung.compression.scheme import NOBODY, STRIDE, Field, Floats, Piece, Scheme
from farflung.compression.stage import Body, Build, Stage, with_coder
from farflung.protocol.errors import LocalError, PeerError
from farflung.protocol.rows import WINDOW_ALIGN, DenseRow

ABS_MAX = np.uint32(ABS_MAX_BITS).view(np.float32)
"""limits.PAYLOAD_ABS_MAX."""

BF16_ABS_MAX = np.uint32(BF16_ABS_MAX_BITS << 16).view(np.float32)
"""The largest bf16 number that is at most PAYLOAD_ABS_MAX: 244 x 2**12."""

__all__ = ["ABS_MAX", "BF16_ABS_MAX", "INT8_SCALE_MAX", "STAGES", "bf16", "fp32", "int2", "int4", "int8", "q2"]


def fp32() -> Scheme:
    """The number itself: 4 bytes. Keeps -0.0 and denormals. 32 bits per parameter."""
    return _scheme("fp32", WINDOW_ALIGN, lambda n: (Field("raw", 8, 4 * n),), lambda kernels: kernels.fp32)


def bf16() -> Scheme:
    """Rounded to nearest even at 8 significant bits: 2 bytes. Keeps -0.0 and denormals. 16 bits per parameter."""
    return _scheme("bf16", WINDOW_ALIGN, lambda n: (Field("raw", 8, 2 * n),), lambda kernels: kernels.bf16)


def int8(block: int) -> Scheme:
    """Blockwise absmax: one fp32 scale = absmax / 127, then each coordinate as round(x / scale), one signed byte.

    Record: scale (4 bytes), n bytes. 8 + 32 / block bits per parameter. |error| <= scale / 2 (arXiv:2110.02861, §2.1).
    Canonical: the scale is 0 or normal, and the one that its own 127-fold gives; some byte of a block is +-127, none
    is -128, all are 0 if the scale is. Blocks below 127 x 2**-126 become zero; -0.0 becomes 0.
    """
    return _scheme(f"int8(block={block})", block, _coded(4, 8), lambda kernels: kernels.int8, "int8")


def int4(block: int) -> Scheme:
    """Blockwise absmax in 15 even steps: a bf16 scale near absmax / 7, then each coordinate as round(x * (1 / scale)).

    Record: scale (2 bytes), then ceil(n / 2) bytes. Byte j holds the coordinates j and j + q of the block, q =
    ceil(n / 2), the first in its low bits, in two's complement; a code past n is 0. 4 + 16 / block bits per parameter.
    |error| <= scale / 2; a decoded value is exact (11 significant bits). Canonical: the scale is 0 or normal; some code
    of a block is +-7, none is -8, all are 0 if the scale is. -0.0 becomes 0. (arXiv:2110.02861, §2.1, with 4 bits.)
    """
    return _scheme(f"int4(block={block})", block, _coded(2, 4), lambda kernels: kernels.int4, "int4")


def int2(block: int) -> Scheme:
    """Blockwise absmax in three steps, -scale, 0 and scale: what is below half of the largest becomes zero.

    Record: a bf16 scale (2 bytes), then ceil(n / 4) bytes of four two's complement codes each, as in `int4`, q =
    ceil(n / 4); none is -2. 2 + 16 / block bits per parameter. |error| <= scale / 2. Needs error feedback.
    """
    return _scheme(f"int2(block={block})", block, _coded(2, 2), lambda kernels: kernels.int2, "int2")


def q2(block: int) -> Scheme:
    """Four levels -high, -low, low, high per block, at the mean magnitudes of two classes split by Lloyd's method.

    Record: low, high (bf16 each), then ceil(n / 4) bytes. Byte j holds the coordinates j, j + q, j + 2q, j + 3q of the
    block, q = ceil(n / 4), from the low bits up; a code is 2 x negative + high; codes past n are 0. 2 + 32 / block bits
    per parameter. Never worse than scaled signs: ||x - decoded||^2 <= ||x||^2 - ||x||_1^2 / n per block, up to the
    rounding of the levels (conditional means as in arXiv:2508.15706, here without a shift, so that zero stays zero).
    Canonical: 0 <= low < high or both 0; a level that is not 0 is used; a level that is 0 has no sign.
    """
    return _scheme(f"q2(block={block})", block, _coded(4, 2), lambda kernels: kernels.q2, "q2")


def _scheme(
    spec: str,
    block: int,
    fields: Callable[[int], tuple[Field, ...]],
    pick: Callable[[Kernels], Packing],
    on_device: str = "",
) -> Scheme:
    """A scheme whose kernels see a whole piece at once: one pass measures and writes, one checks and reads."""

    def write(x_bn: Floats, piece: Piece, salt: int) -> None:
        out_br = piece.records_br
        target_br = out_br if out_br.flags.c_contiguous else np.empty(out_br.shape, np.uint8)
        wild = pick(fastest()).write(np.ascontiguousarray(x_bn), target_br)
        if wild >= 0:
            raise LocalError(f"an update must be finite: one is not from coordinate {piece.start + wild * piece.n} on")
        if target_br is not out_br:
            out_br[:] = target_br

    def fill(piece: Piece, out_d: Floats) -> None:
        found = pick(fastest()).read(np.ascontiguousarray(piece.records_br), out_d.reshape(-1, piece.n))
        if found >= 0:
            record, fault = divmod(found, len(FAULTS))
            raise PeerError(NOBODY, f"{FAULTS[fault]}, in record {record}")

    def read(pieces: list[Piece], size: int) -> DenseRow[torch.Tensor]:
        out_d = np.empty(size, np.float32)
        first = 0
        for piece in pieces:
            fill(piece, out_d[first : first + piece.size])
            first += piece.size
        return DenseRow(torch.from_numpy(out_d))

    def check(piece: Piece) -> None:
        fill(piece, np.empty(piece.size, np.float32))  # as fast as looking without decoding: it stays in the cache

    def write_there(x_bn: Tensor) -> Tensor:
        from farflung.compression.kernels import cuda

        return cuda.records(on_device, x_bn)

    return Scheme(spec, block, fields, write, check, read, on_device=write_there if on_device else None)


def _coded(scale_bytes: int, bits: int) -> Callable[[int], tuple[Field, ...]]:
    """The record of a format with some bytes of scales and one code of so many bits per coordinate."""
    return lambda n: (Field("raw", 8, scale_bytes), Field("codes", bits, n))


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

INT4_BLOCK = 128
"""4.125 bits per parameter; fewer steps need smaller blocks than int8."""

Q2_BLOCK = 512
"""2.0625 bits per parameter; fine enough that a block seldom straddles matrices of different scale."""


def _integers(bits: int, scheme: Callable[[int], Scheme], default: int, scale_bits: int, says: str) -> Stage:
    name = f"int{bits}"
    usage, cost = f"{name}(block={default})", f"{bits} + {scale_bits}/block"
    examples = (name, f"ef(1)|{name}")
    paper = "arXiv:2110.02861, §2.1"
    return Stage(name, "number format", usage, says, cost, "none", paper, _blocked(scheme, default), examples)


STAGES = (
    Stage("fp32", "number format", "fp32", "The number itself.", "32", "none", "", _plain(fp32), ("fp32",)),
    Stage("bf16", "number format", "bf16", "Rounded to 8 significant bits.", "16", "none", "", _plain(bf16), ("bf16",)),
    _integers(8, int8, INT8_BLOCK, 32, "Blockwise absmax: 255 even steps."),
    _integers(4, int4, INT4_BLOCK, 16, "Blockwise absmax: 15 even steps."),
    _integers(2, int2, INT4_BLOCK, 16, "Blockwise absmax: three steps; needs error feedback."),
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
