"""Top-k per chunk: the largest coordinates of every chunk, their places, and their values in a dense format.

Decoding is exact because the value formats are; indices are integers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from farflung.compression.grammar import Arguments
from farflung.compression.kernels import Integers, fastest
from farflung.compression.scheme import Field, Floats, Octets, Piece, Scheme, absmax_per_block, refuse_if
from farflung.compression.stage import Body, Stage, over
from farflung.protocol.errors import LocalError
from farflung.protocol.rows import WINDOW_ALIGN, DenseRow, SparseRow


def topk(k: int, chunk: int, value: Scheme) -> Scheme:
    """Send the k largest magnitudes of every `chunk` coordinates (a power of two); the lowest index wins a tie.

    Record: the kept values in order of their index, as one block of `value`; then their indices within the chunk, each
    log2(chunk) bits, packed from the low bits of the first byte, zero bits to the end of the last byte. A short last
    chunk of n keeps ceil(k n / chunk). ||x - kept||^2 <= (1 - k / chunk) ||x||^2 (arXiv:1809.07599, §2).
    Canonical: indices strictly increase and are below n; a kept zero is +0.0 and stands at its index: k zeros are kept
    as 0, 1, ..., k - 1. The value format decides what is 0; `write` moves what it lost to the front.
    """
    width = chunk.bit_length() - 1

    def kept(n: int) -> int:
        return -(-k * n // chunk)

    def fields(n: int) -> tuple[Field, ...]:
        return (*value.fields(kept(n)), Field("index", width, kept(n), n))

    def write_kept(x_bn: Floats, out_br: Octets, salt: int) -> tuple[Integers, Floats]:
        """Select and write; return the indices and the decoded values."""
        count = kept(x_bn.shape[1])
        index_bk = fastest().topk_select(x_bn, count)
        values_br = np.empty((len(x_bn), value.record_bytes(count)), np.uint8)
        kept_bk = np.take_along_axis(x_bn, index_bk, 1) + np.float32(0)  # -0.0 + 0.0 = +0.0
        value.write(kept_bk, Piece(values_br, count, 0), salt)
        out_br[:, : values_br.shape[1]] = values_br
        out_br[:, values_br.shape[1] :] = _pack(index_bk, width)
        return index_bk, _values(value, values_br, count)

    def write(x_bn: Floats, piece: Piece, salt: int) -> None:
        absmax_per_block(x_bn)
        out_br = piece.records_br
        index_bk, value_bk = write_kept(x_bn, out_br, salt)
        lost_b = _stray_zero(index_bk, value_bk)
        if lost_b.any():  # rare: a value too small for the format; write the decoded row again, zeros first
            sent_bn = np.zeros((int(lost_b.sum()), x_bn.shape[1]), np.float32)
            np.put_along_axis(sent_bn, index_bk[lost_b], value_bk[lost_b], 1)
            again_br = np.empty((len(sent_bn), out_br.shape[1]), np.uint8)
            write_kept(sent_bn, again_br, salt)
            out_br[lost_b] = again_br

    def opened(records_br: Octets, n: int) -> tuple[Integers, Floats]:
        """Indices within the chunk, and values; PeerError unless canonical."""
        count = kept(n)
        split = value.record_bytes(count)
        values_br = np.ascontiguousarray(records_br[:, :split])
        index_bk = _unpack(records_br[:, split:], count, width)
        refuse_if(index_bk[:, -1] >= n, "an index is past the end of its chunk")
        refuse_if((index_bk[:, 1:] <= index_bk[:, :-1]).any(1), "indices do not strictly increase")
        value_bk = _values(value, values_br, count)
        refuse_if(_stray_zero(index_bk, value_bk), "a kept zero is not +0.0 at its index")
        return index_bk, value_bk

    def check(piece: Piece) -> None:
        opened(piece.records_br, piece.n)

    def read(pieces: list[Piece], size: int) -> SparseRow[torch.Tensor]:
        index_parts, value_parts, first = [], [], 0
        for piece in pieces:
            index_bk, value_bk = opened(piece.records_br, piece.n)
            index_bk += first + piece.n * np.arange(len(index_bk))[:, None]
            index_parts.append(torch.from_numpy(index_bk.reshape(-1)))
            value_parts.append(torch.from_numpy(value_bk.reshape(-1)))
            first += piece.size
        return SparseRow(size, torch.cat(index_parts), torch.cat(value_parts))

    return Scheme(f"topk({k}/{chunk})|{value.spec}", chunk, fields, write, check, read, value.salted)


def _values(value: Scheme, values_br: Octets, count: int) -> Floats:
    """The values of b records as [b, count], checked by their format."""
    row = value.read([Piece(values_br, count, 0)], values_br.shape[0] * count)
    if not isinstance(row, DenseRow):
        raise LocalError(f"the values of a sparse row need a dense format, got {value.spec}")
    value_bk: Floats = row.value_d.numpy().reshape(-1, count)
    return value_bk


def _stray_zero(index_bk: Integers, value_bk: Floats) -> NDArray[np.bool_]:
    """Which chunks keep a zero that has a sign, or that is not the p-th kept value at index p."""
    out_of_place_bk = (index_bk != np.arange(index_bk.shape[1])) | np.signbit(value_bk)
    stray_b: NDArray[np.bool_] = ((value_bk == 0) & out_of_place_bk).any(1)
    return stray_b


def _pack(index_bk: Integers, width: int) -> Octets:
    bit_bkw = (index_bk[:, :, None].astype(np.uint16) >> np.arange(width, dtype=np.uint16) & np.uint16(1)).astype(
        np.uint8
    )
    return np.packbits(bit_bkw.reshape(len(index_bk), -1), axis=1, bitorder="little")


def _unpack(packed_br: Octets, count: int, width: int) -> Integers:
    """The inverse of `_pack`. An index of up to 14 bits lies within three bytes. Raises PeerError on padding bits."""
    used = (count * width - 1) % 8 + 1
    refuse_if(packed_br[:, -1] >> np.uint8(used - 1) >> np.uint8(1) > 0, "a padding bit of the indices is set")
    wide_br: NDArray[np.uint32] = np.pad(packed_br, ((0, 0), (0, 2))).astype(np.uint32)
    bit_k = np.arange(count) * width
    byte_k = bit_k // 8
    window_bk: NDArray[np.uint32] = (
        wide_br[:, byte_k] | wide_br[:, byte_k + 1] << np.uint32(8) | wide_br[:, byte_k + 2] << np.uint32(16)
    )
    window_bk = window_bk >> (bit_k % 8).astype(np.uint32) & np.uint32((1 << width) - 1)
    return window_bk.astype(np.int64)


CHUNK_MIN = 16


def _build_topk(arguments: Arguments, inner: Body | None, parse: Any) -> Body:
    k, chunk = arguments.fraction("k", CHUNK_MIN, WINDOW_ALIGN)
    arguments.end()
    return over(inner, arguments.stage, lambda value: topk(k, chunk, value))


STAGES = (
    Stage(
        "topk",
        "sparsifier",
        "topk(k/chunk)",
        "The k largest magnitudes of every chunk.",
        "k/chunk x (log2(chunk) + value)",
        "none",
        "arXiv:1809.07599, §2; arXiv:2508.15706",
        _build_topk,
        (
            "topk(64/4096)|fp32",
            "topk(64/4096)|bf16",
            "topk(64/4096)|int8",
            "topk(64/4096)|q2",
            "ef(0.95)|topk(64/4096)|q2",
        ),
    ),
)
