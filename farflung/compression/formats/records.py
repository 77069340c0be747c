"""What the formats with a header of scales and one small code per coordinate share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray

from farflung.compression.grammar import Arguments
from farflung.compression.kernels.codes import fastest_codes
from farflung.compression.scheme import STRIDE, Field, Floats, Octets, Piece, Scheme, refuse_if
from farflung.compression.stage import Body, Build, with_coder
from farflung.protocol.errors import LocalError
from farflung.protocol.limits import PAYLOAD_ABS_MAX
from farflung.protocol.rows import DenseRow

ABS_MAX = np.float32(PAYLOAD_ABS_MAX)

BF16_ABS_MAX = np.float32(999424)
"""The largest bf16 number that is at most PAYLOAD_ABS_MAX: 244 x 2**12."""

NORMAL_MIN = np.finfo(np.float32).tiny

BLOCK_MIN = 16
"""Smaller blocks would spend more bits on scales than on values."""


def dense(
    spec: str,
    block: int,
    fields: Callable[[int], tuple[Field, ...]],
    *,
    write: Callable[[Floats, Octets, int, int], None],
    check: Callable[[Octets, int], None],
    fill: Callable[[Octets, Floats], None],
    salted: bool = False,
) -> Scheme:
    """A scheme of dense rows: `write(x_bn, out_br, start, salt)`, `check(records_br, n)`, `fill(records_br, out_bn)`.

    `read` checks each piece and fills its part of one new vector.
    """

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
        lambda x_bn, piece, salt: write(x_bn, piece.records_br, piece.start, salt),
        lambda piece: check(piece.records_br, piece.n),
        read,
        salted,
    )


def header_and_codes(header: int, bits: int) -> Callable[[int], tuple[Field, ...]]:
    """The record of a format with so many bytes of scales and one code of so many bits per coordinate."""
    return lambda n: (Field("raw", 8, header), Field("codes", bits, n))


def measured(x_bn: Floats) -> tuple[Floats, Floats]:
    """(entries within PAYLOAD_ABS_MAX, largest magnitude of each block). Raises LocalError if one is not finite."""
    x_bn = np.ascontiguousarray(x_bn)
    absmax_b = fastest_codes().absmax(x_bn)
    top = absmax_b.max()
    if not top <= ABS_MAX:
        if not np.isfinite(absmax_b).all():
            raise LocalError(f"an update must be finite: found {absmax_b[~np.isfinite(absmax_b)][0]}")
        x_bn, absmax_b = np.clip(x_bn, -ABS_MAX, ABS_MAX), np.minimum(absmax_b, ABS_MAX)
    return x_bn, absmax_b


def view(octets_br: Octets, dtype: DTypeLike) -> Any:
    """Records, or a part of each, as little-endian numbers, in place."""
    return octets_br.view(dtype)


def put_scale(scale_b: Floats, out_br: Octets) -> None:
    """Write fp32 scales into the first four bytes of the records."""
    view(out_br[:, :4], "<f4")[:, 0] = scale_b


def get_scale(records_br: Octets) -> Floats:
    """The fp32 scales in the first four bytes of the records."""
    scale_b: Floats = view(records_br[:, :4], "<f4")[:, 0].astype(np.float32)
    return scale_b


def refuse_scale(bits_b: Any, low: int, high: int) -> None:
    """Raise PeerError unless each scale, as the unsigned number of its bits, is 0 or from low to high."""
    refuse_if((bits_b > high) | ((bits_b > 0) & (bits_b < low)), "a scale is negative, too small or too large")


def bits_of(number: np.float32) -> int:
    """The bits of a float as an unsigned number; those of positive floats order like the floats."""
    return int(np.float32(number).view(np.uint32))


def to_bf16(x: Floats) -> NDArray[np.uint16]:
    """Nearest bf16, ties to even, of finite fp32 of at most PAYLOAD_ABS_MAX, as its bits."""
    bits = x.view(np.uint32)
    return ((bits + (np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1)))) >> np.uint32(16)).astype(np.uint16)


def from_bf16(bits: Any) -> Floats:
    """bf16 bits as fp32."""
    wide: Floats = (np.asarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)
    return wide


def plain(scheme: Callable[[], Scheme]) -> Build:
    """The parser's side of a format without arguments."""

    def build(arguments: Arguments, inner: Body | None, parse: Any) -> Body:
        arguments.end()
        return with_coder(scheme(), inner, arguments.stage)

    return build


def blocked(scheme: Callable[[int], Scheme], default: int) -> Build:
    """The parser's side of a format whose only argument is its block."""

    def build(arguments: Arguments, inner: Body | None, parse: Any) -> Body:
        block = take_block(arguments, default)
        arguments.end()
        return with_coder(scheme(block), inner, arguments.stage)

    return build


def take_block(arguments: Arguments, default: int) -> int:
    """The argument `block`: a power of two from BLOCK_MIN to STRIDE."""
    return arguments.integer("block", BLOCK_MIN, STRIDE, default, power_of_two=True)
