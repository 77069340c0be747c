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
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from farflung.compression.codec import Codec, Reader, Records, Row
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
    spread,
    stateless,
    write_stretch,
)
from farflung.compression.source import Source, Vector, numbers_of
from farflung.compression.stage import Body, Build, Coder, Stage
from farflung.protocol.errors import LocalError, PeerError
from farflung.protocol.schema import Schema

Ends = NDArray[np.int64]

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

    `encode` costs twice the payload and one run of records; a reader keeps the records of the sections it read last,
    because windows may be smaller than sections.
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
            return write_all(Vector(numbers_of(update_d)), len(update_d), round_index), private

        def write_all(source: Source, d: int, round_index: int) -> bytes:
            frame = frame_in(round_index, d)
            length_s = np.zeros(frame.sections, "<u4")
            parts: dict[int, bytes] = {}

            def write(start: int, stop: int) -> None:
                window_d = source.take(start, stop)
                records_r = write_stretch(frame.scheme, window_d, start, round_index)
                if source.listens:
                    found = list(pieces(frame.scheme, records_r, start, stop, base=start))
                    source.give(start, stop, frame.scheme.read(found, stop - start))
                parts[start] = _pack(frame, start, stop, records_r, length_s)

            spread(write, d, scheme.threads, frame.scheme.run(source.listens))
            table_s4 = length_s.view(np.uint8).reshape(-1, 4)[:, : frame.width]
            return b"".join([table_s4.tobytes(), *(parts[start] for start in sorted(parts))])

        def open_(payload: bytes, schema: Schema, shared: Any, round_index: int) -> Reader:
            frame = frame_in(round_index, schema.numel)
            return _reader(frame, np.frombuffer(payload, np.uint8), _ends(frame, payload))

        def check(payload: bytes, schema: Schema, shared: Any, round_index: int) -> None:
            frame = frame_in(round_index, schema.numel)
            octets, end_s = np.frombuffer(payload, np.uint8), _ends(frame, payload)

            def check_run(start: int, stop: int) -> None:
                for piece in _unpack(frame, start // STRIDE, -(-stop // STRIDE), octets, end_s):
                    frame.scheme.check(piece)

            spread(check_run, schema.numel, scheme.threads, frame.scheme.run())

        def records(payload: bytes, schema: Schema, round_index: int) -> list[Records]:
            return _plain_records(frame_in(round_index, schema.numel), payload)

        def bits(schema: Schema) -> float:
            return 8 * same_each_round(schema.numel).worst_bytes / schema.numel

        return stateless(scheme)._replace(
            spec=f"{scheme.spec}|{spec}",
            encode=encode,
            open=open_,
            check=check,
            bits=bits,
            stream=lambda source, schema, round_index: write_all(source, schema.numel, round_index),
            records=records,
        )

    return Coder(spec, attach)


def _plain_records(frame: Frame, payload: bytes) -> list[Records]:
    """What `stateless` would have sent."""
    found = _unpack(frame, 0, frame.sections, np.frombuffer(payload, np.uint8), _ends(frame, payload))
    return [Records(frame.scheme, b"".join(piece.records_br.tobytes() for piece in found), frame.d)]


def _ends(frame: Frame, payload: bytes) -> Ends:
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


def _pack(frame: Frame, start: int, stop: int, records_r: Octets, length_s: NDArray[np.uint32]) -> bytes:
    """The sections of [start, stop) from their records; fills in their lengths."""
    out_r, at = np.empty(-(-(stop - start) // STRIDE) * frame.longest, np.uint8), 0
    for piece in pieces(frame.scheme, records_r, start, stop, base=start):
        cut_of, per, into_s = frame.plans[piece.n], _per_section(frame, piece), length_s[piece.start // STRIDE :]
        at = _kernels()[0](piece.records_br, per, cut_of.part_p5, cut_of.field_f6, out_r, at, into_s)
        if at < 0:
            raise LocalError(f"{frame.scheme.spec} wrote records that break its own layout: {FAULTS[-1 - at]}")
    return out_r[:at].tobytes()


def _unpack(frame: Frame, first: int, last: int, octets: Octets, end_s: Ends) -> list[Piece]:
    """The pieces of some sections, as records. Raises PeerError unless `_pack` wrote these bytes for them."""
    start, stop = frame.spans(first)[0], frame.spans(last - 1)[1]
    records_r = np.empty(payload_bytes(frame.scheme, stop - start), np.uint8)
    found = list(pieces(frame.scheme, records_r, start, stop, base=start))
    at_s = end_s[first:last].copy()
    for piece in found:
        cut_of, per, section = frame.plans[piece.n], _per_section(frame, piece), piece.start // STRIDE
        limit_s, from_s = end_s[section + 1 :], at_s[section - first :]
        fault = _kernels()[1](octets, limit_s, from_s, per, cut_of.part_p5, cut_of.field_f6, piece.records_br)
        if fault < 0:
            raise PeerError(NOBODY, f"a section of {frame.scheme.spec}: {FAULTS[-1 - fault]}, from {section} on")
    if (at_s != end_s[first + 1 : last + 1]).any():
        wrong = first + int((at_s != end_s[first + 1 : last + 1]).argmax())
        raise PeerError(NOBODY, f"bytes are left over at the end of section {wrong}")
    return found


def _per_section(frame: Frame, piece: Piece) -> int:
    """Records of a piece in each section that it lies in, the last one maybe excepted. It starts with a section, or is
    the short record."""
    return STRIDE // piece.n if piece.n == frame.scheme.block else 1


def _reader(frame: Frame, octets: Octets, end_s: Ends) -> Reader:
    held: tuple[int, int, list[Piece]] = (0, 0, [])

    def records(first: int, last: int) -> list[Piece]:
        nonlocal held
        begin, end, found = held  # another thread may put its own sections here: both are whole
        if not begin <= first < last <= end:
            found = _unpack(frame, first, last, octets, end_s)
            held = first, last, found
        return found

    def read(start: int, stop: int) -> Row:
        require_window(start, stop, frame.d)
        block = frame.scheme.block
        low, high = start // block * block, min(-(-stop // block) * block, frame.d)
        found = list(_overlap(records(low // STRIDE, -(-high // STRIDE)), low, high))
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
    """(encode_sections, decode_sections); imports numba on the first call."""
    from farflung.compression.kernels import rans_pieces

    return rans_pieces.encode_sections, rans_pieces.decode_sections


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
