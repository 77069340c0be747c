"""From fixed-size records to a codec: the part that dense and sparse formats share.

A payload is one record per block of `block` coordinates, in order, without header or padding between them; the last
block may be short and then has a shorter record. The schema gives d, so every length is known before a byte is read,
and any window of blocks is decoded from its own records alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from farflung.compression.codec import Codec
from farflung.protocol.errors import LocalError, PeerError
from farflung.protocol.rows import WINDOW_ALIGN, DenseRow, SparseRow
from farflung.protocol.schema import Schema

Floats = NDArray[np.float32]
Octets = NDArray[np.uint8]
Row = DenseRow[Tensor] | SparseRow[Tensor]

STRIDE = 4 * WINDOW_ALIGN
"""Coordinates handled at a time: 256 KiB of fp32 stays in a core's L2 cache, and one call's overhead is 1 % of it."""

NOBODY = "?"
"""The name in a PeerError raised here: a codec does not know whose bytes it reads; the caller does."""


class Piece(NamedTuple):
    """A run of blocks of one width: b records of r bytes for b x n coordinates, and where they start."""

    records_br: Octets
    n: int
    start: int

    @property
    def size(self) -> int:
        """Coordinates in the piece."""
        return len(self.records_br) * self.n


class Scheme(NamedTuple):
    """A stateless format. `write`, `check` and `read` see whole pieces; nothing here keeps or shares memory."""

    spec: str
    block: int
    """Coordinates per record; divides rows.WINDOW_ALIGN."""
    record_bytes: Callable[[int], int]
    """Coordinates in a block -> bytes of its record."""
    write: Callable[[Floats, Octets], None]
    """(x_bn, out_br): fill the records. Entries beyond limits.PAYLOAD_ABS_MAX saturate. LocalError if not finite."""
    check: Callable[[Octets, int], None]
    """(records_br, n) -> None, or PeerError unless `write` could have made the records."""
    read: Callable[[list[Piece], int], Row]
    """(pieces, size) -> the row of their coordinates, checked like `check`."""


def payload_bytes(scheme: Scheme, d: int) -> int:
    """Exact length of the payload of d parameters."""
    short = d % scheme.block
    return d // scheme.block * scheme.record_bytes(scheme.block) + (scheme.record_bytes(short) if short else 0)


def pieces(scheme: Scheme, octets: Octets, start: int, stop: int) -> Iterator[Piece]:
    """The records of [start, stop) as views: full blocks, then the short one. `start` is a multiple of the block."""
    block = scheme.block
    record, offset = scheme.record_bytes(block), start // block * scheme.record_bytes(block)
    full, short = divmod(stop - start, block)
    middle = offset + full * record
    if full:
        yield Piece(octets[offset:middle].reshape(full, record), block, start)
    if short:
        tail = scheme.record_bytes(short)
        yield Piece(octets[middle : middle + tail].reshape(1, tail), short, start + full * block)


def strides(start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Cut [start, stop) into stretches of at most STRIDE coordinates."""
    for first in range(start, stop, STRIDE):
        yield first, min(first + STRIDE, stop)


def stateless(scheme: Scheme) -> Codec:
    """The codec of a scheme: exact, without private or shared state. Encode costs payload + one stride of memory."""

    def encode(update_d: Tensor, private: Any, shared: Any, round_index: int) -> tuple[bytes, Any]:
        if update_d.dtype != torch.float32 or update_d.dim() != 1 or not len(update_d):
            raise LocalError(f"an update is a vector of fp32, got {update_d.dtype} of shape {tuple(update_d.shape)}")
        payload = BytesIO()  # its `getvalue` hands the bytes over without a copy
        for start, stop in strides(0, len(update_d)):
            window_d = update_d[start:stop].detach().cpu().contiguous().numpy()
            records = np.empty(payload_bytes(scheme, stop - start), np.uint8)
            for piece in pieces(scheme, records, 0, stop - start):
                x_bn = window_d[piece.start : piece.start + piece.size].reshape(-1, piece.n)
                scheme.write(x_bn, piece.records_br)
            payload.write(records.data)
        return payload.getvalue(), private

    def decode(payload: bytes, schema: Schema, shared: Any, round_index: int, start: int, stop: int) -> Row:
        octets = _octets(scheme, payload, schema)
        if (
            not 0 <= start < stop <= schema.numel
            or start % WINDOW_ALIGN
            or (stop % WINDOW_ALIGN and stop != schema.numel)
        ):
            raise LocalError(f"no window of {schema.numel} coordinates: [{start}, {stop})")
        return scheme.read(list(pieces(scheme, octets, start, stop)), stop - start)

    def check(payload: bytes, schema: Schema, shared: Any, round_index: int) -> None:
        octets = _octets(scheme, payload, schema)
        for start, stop in strides(0, schema.numel):
            for piece in pieces(scheme, octets, start, stop):
                scheme.check(piece.records_br, piece.n)

    return Codec(
        spec=scheme.spec,
        exact=True,
        init=lambda schema: (None, None),
        encode=encode,
        decode=decode,
        check=check,
        observe=lambda private, verdict: private,
        advance=lambda shared, update_d: shared,
        bits=lambda schema: 8 * payload_bytes(scheme, schema.numel) / schema.numel,
        private_tensors=lambda private: {},
        restore_private=lambda schema, tensors: None,
    )


def _octets(scheme: Scheme, payload: bytes, schema: Schema) -> Octets:
    expected = payload_bytes(scheme, schema.numel)
    if len(payload) != expected:
        raise PeerError(NOBODY, f"a payload of {scheme.spec} has {expected} bytes here, got {len(payload)}")
    return np.frombuffer(payload, np.uint8)


def refuse_if(bad_b: Any, why: str) -> None:
    """Raise PeerError if any record is bad; the message ends with the first one's position in its stretch."""
    if bad_b.any():
        raise PeerError(NOBODY, f"{why}, in record {int(bad_b.argmax())}")


def absmax_per_block(x_bn: Floats) -> Floats:
    """Largest magnitude of each block. Raises LocalError if an entry is not finite."""
    absmax_b: Floats = np.maximum(x_bn.max(1), -x_bn.min(1)) + np.float32(0)  # never -0.0
    if not np.isfinite(absmax_b).all():
        raise LocalError(f"an update must be finite: found {absmax_b[~np.isfinite(absmax_b)][0]}")
    return absmax_b
