"""Entropy coders: records taken apart and written shorter, without loss, so that what is decoded stays byte for byte.

Payload: the length of every section, W bytes each (W: as many as the longest one needs), then the sections, one for
each STRIDE coordinates. A section holds its full records as one piece, then the short record, if any, as another. A
piece is one flag bit for each of its parts (`layout.Plan`), padded to bytes, then the parts:

* indices by Golomb-Rice: gap = q 2^b + r as q zeros, a one, r in b bits (Golomb 1966; Rice 1979), b from k / chunk;
* or by Elias-Fano: low bits of each index, then the high parts' steps in unary, to a length that the schema gives;
* symbols (codes; of raw fields, every fourth byte) by rANS: table, states, 16-bit words (see `kernels.rans`).

A part that would not become strictly shorter stays as it is, so a payload is never longer than its records, its lengths
and its flags; that is `bits`. Reading a window costs the sections that it touches. Canonical by structure: Rice and
Elias-Fano codes are bijections with zero padding, rANS here is b-unique, tables are made again from the counts of what
they decoded, and whoever claims that a part cannot be shortened is checked by trying.

Not here: zstd and its kin, whose bytes differ between versions of a library, so that nobody could tell which are the
canonical ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, lru_cache
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from farflung.compression.codec import Codec, Reader, Row
from farflung.compression.entropy.layout import ELIAS, RICE, Plan, plan
from farflung.compression.grammar import Arguments
from farflung.compression.scheme import (
    NOBODY,
    STRIDE,
    Octets,
    Piece,
    Scheme,
    cut,
    payload_bytes,
    pieces,
    require_update,
    require_window,
    stateless,
    strides,
    write_stretch,
)
from farflung.compression.stage import Body, Build, Coder, Stage
from farflung.protocol.errors import LocalError, PeerError
from farflung.protocol.schema import Schema

FAULTS = (
    "it ends before its symbols do",
    "an index is past the end of its chunk",
    "a padding bit is set",
    "a part is not in its shortest form",
    "a table of frequencies is damaged",
    "a table is not the one of its symbols",
    "a state is not the one that coding leaves",
    "a flag of a part that is never coded is set",
    "indices do not strictly increase",
)
"""What -1, -2, ... of a kernel mean."""


class Frame(NamedTuple):
    """What the schema says about a payload of a format: where nothing depends on the bytes."""

    scheme: Scheme
    d: int
    plans: dict[int, Plan]
    """By coordinates in a block: the full one, and the short last one."""
    longest: int
    """Bytes of the longest section there can be."""

    @property
    def sections(self) -> int:
        """How many there are."""
        return -(-self.d // STRIDE)

    @property
    def width(self) -> int:
        """Bytes of one entry of the table of lengths."""
        return (self.longest.bit_length() + 7) // 8

    def spans(self, section: int) -> tuple[int, int]:
        """The coordinates of a section."""
        return section * STRIDE, min((section + 1) * STRIDE, self.d)

    @property
    def worst_bytes(self) -> int:
        """Length of the longest payload: lengths, flags, and every record as it is."""
        per_stretch = sum(self.plans[n].flag_bytes for n in self.plans if n == self.scheme.block)
        short = self.d % self.scheme.block
        flags = per_stretch * -(-(self.d - short) // STRIDE) + (self.plans[short].flag_bytes if short else 0)
        return self.sections * self.width + flags + payload_bytes(self.scheme, self.d)


def frame_of(scheme: Scheme, d: int, *, symbols: bool, index: int) -> Frame:
    """The frame of d coordinates. Costs O(1)."""
    block, short = scheme.block, d % scheme.block
    plans = {n: plan(scheme.fields(n), symbols=symbols, index=index) for n in (block, short) if 0 < n <= d}
    longest = payload_bytes(scheme, min(d, STRIDE)) + sum(item.flag_bytes for item in plans.values())
    return Frame(scheme, d, plans, longest)


def coded(spec: str, *, symbols: bool, index: int) -> Coder:
    """The coder of a kind of indices (RICE, ELIAS), with or without rANS of everything else.

    `encode` costs the payload, one stretch of records and one section of memory; a reader keeps the records of the
    section it read last, because windows may be smaller than sections.
    """

    def attach(scheme: Scheme) -> Codec:
        @lru_cache(maxsize=4)
        def same_each_round(d: int) -> Frame:
            return frame_of(scheme, d, symbols=symbols, index=index)

        def frame_in(round_index: int, d: int) -> Frame:
            if scheme.in_round is None:
                return same_each_round(d)
            return frame_of(scheme.of(round_index), d, symbols=symbols, index=index)

        def encode(update_d: Tensor, private: Any, shared: Any, round_index: int) -> tuple[bytes, Any]:
            require_update(update_d)
            frame = frame_in(round_index, len(update_d))
            length_s = np.zeros(frame.sections, "<u4")
            payload = BytesIO(bytes(frame.sections * frame.width))
            payload.seek(0, 2)
            out_r = np.empty(frame.longest, np.uint8)
            for section, (start, stop) in enumerate(strides(0, frame.d)):
                window_d = update_d[start:stop].detach().cpu().contiguous().numpy()
                records_r = write_stretch(frame.scheme, window_d, start, round_index)
                length_s[section] = end = _pack(frame, section, records_r, out_r)
                payload.write(out_r[:end].data)
            payload.seek(0)
            payload.write(np.ascontiguousarray(length_s.view(np.uint8).reshape(-1, 4)[:, : frame.width]).data)
            return payload.getvalue(), private

        def open_(payload: bytes, schema: Schema, shared: Any, round_index: int) -> Reader:
            frame = frame_in(round_index, schema.numel)
            return _reader(frame, np.frombuffer(payload, np.uint8), _ends(frame, payload))

        def check(payload: bytes, schema: Schema, shared: Any, round_index: int) -> None:
            frame = frame_in(round_index, schema.numel)
            octets, end_s = np.frombuffer(payload, np.uint8), _ends(frame, payload)
            for section in range(frame.sections):
                for piece in _unpack(frame, section, octets[end_s[section] : end_s[section + 1]]):
                    frame.scheme.check(piece)

        def bits(schema: Schema) -> float:
            return 8 * same_each_round(schema.numel).worst_bytes / schema.numel

        return stateless(scheme)._replace(
            spec=f"{scheme.spec}|{spec}", encode=encode, open=open_, check=check, bits=bits
        )

    return Coder(spec, attach)


def _ends(frame: Frame, payload: bytes) -> NDArray[np.int64]:
    """Where sections start and, at last, end. Raises PeerError unless their lengths fill the payload."""
    table = frame.sections * frame.width
    if not table < len(payload) <= frame.worst_bytes:
        raise PeerError(NOBODY, f"a payload of {frame.scheme.spec} is of another size, got {len(payload)}")
    length_s4 = np.zeros((frame.sections, 4), np.uint8)
    length_s4[:, : frame.width] = np.frombuffer(payload, np.uint8, table).reshape(-1, frame.width)
    end_s = np.empty(frame.sections + 1, np.int64)
    end_s[0] = table
    np.cumsum(length_s4.view("<u4")[:, 0], out=end_s[1:], dtype=np.int64)
    end_s[1:] += table
    if end_s[-1] != len(payload):
        raise PeerError(NOBODY, f"a payload of {frame.scheme.spec} has {end_s[-1]} bytes here, got {len(payload)}")
    return end_s


def _pack(frame: Frame, section: int, records_r: Octets, out_r: Octets) -> int:
    """Write one section from its records; return its length."""
    start, stop = frame.spans(section)
    at = 0
    for piece in pieces(frame.scheme, records_r, start, stop, base=start):
        cut_of = frame.plans[piece.n]
        at = _kernels()[0](piece.records_br, cut_of.part_p5, cut_of.field_f6, out_r, at)
        if at < 0:
            raise LocalError(f"{frame.scheme.spec} wrote records that break its own layout: {FAULTS[-1 - at]}")
    return at


def _unpack(frame: Frame, section: int, in_r: Octets) -> list[Piece]:
    """The pieces of one section, as records. Raises PeerError unless `_pack` wrote these bytes for them."""
    start, stop = frame.spans(section)
    records_r = np.empty(payload_bytes(frame.scheme, stop - start), np.uint8)
    found = list(pieces(frame.scheme, records_r, start, stop, base=start))
    at = 0
    for piece in found:
        cut_of = frame.plans[piece.n]
        at = _kernels()[1](in_r, at, cut_of.part_p5, cut_of.field_f6, piece.records_br)
        if at < 0:
            raise PeerError(NOBODY, f"section {section}: {FAULTS[-1 - at]}, got {len(in_r)} bytes")
    if at != len(in_r):
        raise PeerError(NOBODY, f"section {section}: {at} bytes are used, got {len(in_r)}")
    return found


def _reader(frame: Frame, octets: Octets, end_s: NDArray[np.int64]) -> Reader:
    held: tuple[int, list[Piece]] = (-1, [])

    def records(section: int) -> list[Piece]:
        nonlocal held
        last, found = held  # another thread may put its own section here: both are whole
        if last != section:
            found = _unpack(frame, section, octets[end_s[section] : end_s[section + 1]])
            held = section, found
        return found

    def read(start: int, stop: int) -> Row:
        require_window(start, stop, frame.d)
        block = frame.scheme.block
        low, high = start // block * block, min(-(-stop // block) * block, frame.d)
        found = [
            part
            for section in range(low // STRIDE, -(-high // STRIDE))
            for part in _overlap(records(section), low, high)
        ]
        row = frame.scheme.read(found, high - low)
        return row if (low, high) == (start, stop) else cut(row, start - low, stop - low)

    return read


def _overlap(found: list[Piece], low: int, high: int) -> Iterator[Piece]:
    """The blocks of pieces that lie in [low, high), which are multiples of the block or the end."""
    for records_br, n, start in found:
        first, last = max(low - start, 0) // n, min(-(-(high - start) // n), len(records_br))
        if first < last:
            yield Piece(records_br[first:last], n, start + first * n)


@cache
def _kernels() -> tuple[Callable[..., int], Callable[..., int]]:
    """(encode_piece, decode_piece); imports numba on the first call."""
    from farflung.compression.kernels import rans_pieces

    return rans_pieces.encode_piece, rans_pieces.decode_piece


def pack() -> Coder:
    """Nothing: the records as they are, to compare with."""
    return Coder("pack", lambda scheme: stateless(scheme)._replace(spec=f"{scheme.spec}|pack"))


def rice() -> Coder:
    """Indices by Golomb-Rice, all else as it is."""
    return coded("rice", symbols=False, index=RICE)


def elias_fano() -> Coder:
    """Indices by Elias-Fano, all else as it is: a size that hardly depends on the values."""
    return coded("elias-fano", symbols=False, index=ELIAS)


def ans() -> Coder:
    """Indices by Golomb-Rice, symbols and the bytes of raw numbers by rANS."""
    return coded("ans", symbols=True, index=RICE)


def _build(coder: Callable[[], Coder]) -> Build:
    def build(arguments: Arguments, inner: Body | None, parse: Any) -> Body:
        arguments.end()
        if inner is not None:
            arguments.stage.refuse("nothing may follow an entropy coder")
        return coder()

    return build


STAGES = (
    Stage(
        "pack",
        "entropy coder",
        "pack",
        "Nothing: fields as wide as their largest number.",
        "as the format says",
        "none",
        "",
        _build(pack),
        ("topk(64/4096)|q2|pack",),
    ),
    Stage(
        "rice",
        "entropy coder",
        "rice",
        "Gaps between indices by Golomb-Rice.",
        "about k/chunk x (log2(chunk/k) + 1.5) for the indices",
        "none",
        "Golomb 1966; Rice 1979; parameter as in Kiely 2004",
        _build(rice),
        ("topk(64/4096)|q2|rice", "topk(3/16)|bf16|rice", "ef(1)|topk(64/4096)|int8|rice"),
    ),
    Stage(
        "elias-fano",
        "entropy coder",
        "elias-fano",
        "Indices by Elias-Fano: high parts in unary, low bits as they are.",
        "k/chunk x (floor(log2(chunk/k)) + 2) for the indices",
        "none",
        "Elias 1974; Fano 1971",
        _build(elias_fano),
        ("topk(64/4096)|q2|elias-fano",),
    ),
    Stage(
        "ans",
        "entropy coder",
        "ans",
        "Indices by Rice; codes, and the bytes of raw numbers, by rANS with counted frequencies.",
        "within 1 % of the entropy of the codes",
        "none",
        "arXiv:1311.2540; arXiv:1402.3392",
        _build(ans),
        ("int8|ans", "q2(block=16)|ans", "bf16|ans", "topk(64/4096)|q2|ans", "ef(0.95)|topk(64/4096)|stat(2)|ans"),
    ),
)
