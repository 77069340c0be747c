"""Random-k with a shared seed: every member sends the same coordinates of a round, so no indices travel."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from blake3 import blake3

from farflung.compression.formats.sparse import CHUNK_MIN, joined, over_values, refuse_infinite, span_of, values_of
from farflung.compression.grammar import Arguments
from farflung.compression.kernels.codes import fastest_codes
from farflung.compression.kernels.selection import Places, fastest_selection
from farflung.compression.scheme import Field, Floats, Piece, Scheme
from farflung.compression.stage import Body, Stage, require
from farflung.protocol.limits import PAYLOAD_ABS_MAX
from farflung.protocol.rows import WINDOW_ALIGN, SparseRow

Form = Literal["biased", "unbiased"]


def randk(k: int, chunk: int, form: Form, value: Scheme) -> Scheme:
    """Send k random coordinates of every `chunk` (a power of two), drawn anew each round, without replacement.

    Record: the kept values of `span_of` chunks in order of their index, as one block of `value`; no indices, the places
    are a function of round and position (`Selection.random_places`), equal on all members. A short last chunk of n
    keeps ceil(k n / chunk). "biased" sends the numbers themselves: E||x - sent||^2 = (1 - k / chunk) ||x||^2, a
    contraction, for error feedback (arXiv:1809.07599, §2). "unbiased" sends them times n / kept: the mean is x and the
    variance (chunk / k - 1) ||x||^2 (arXiv:1610.05492, §3); error feedback diverges with it where chunk / k > 2.
    Who knows the round knows the places: it hides nothing from a member that wants to leave the chosen ones empty.
    """
    require(1 <= k <= min(chunk, value.block) and not value.sparse, f"{value.spec} cannot carry {k} values of a chunk")

    @lru_cache(maxsize=16)
    def fields(n: int) -> tuple[Field, ...]:
        return value.fields(_total(n, k, chunk))

    def in_round(round_index: int) -> Scheme:
        digest = blake3(b"randk" + round_index.to_bytes(8, "little")).digest(length=8)
        return _of_seed(int.from_bytes(digest, "little"), k, chunk, form, value, scheme)

    name = f"randk({k}/{chunk}, form={form})|{value.spec}"
    block = span_of(k, chunk, value) * chunk
    scheme = Scheme(name, block, fields, _no_round, _no_round, _no_round, value.salted, in_round, sparse=True)
    return scheme


def _total(n: int, k: int, chunk: int) -> int:
    full, short = divmod(n, chunk)
    return full * k + -(-k * short // chunk)


def _no_round(*arguments: Any) -> Any:
    require(False, "a shared mask belongs to a round: ask the scheme `of` one")


def _of_seed(seed: int, k: int, chunk: int, form: Form, value: Scheme, scheme: Scheme) -> Scheme:
    """The scheme of a round."""

    def places(piece: Piece) -> Places:
        """Kept coordinates of the piece, [b, kept], counted from its start."""
        place_bk = np.empty((len(piece.records_br), _total(piece.n, k, chunk)), np.int32)
        fastest_selection().random_places(seed, piece.start, piece.size, k, chunk, place_bk.reshape(-1))
        return place_bk

    def write(x_bn: Floats, piece: Piece, salt: int) -> None:
        refuse_infinite(int(fastest_codes().absmax(np.ascontiguousarray(x_bn)).max().view(np.int32)))
        kept_bk = x_bn.reshape(-1)[places(piece)]
        if form == "unbiased":  # saturates as the value format does, but before the product overflows
            kept_bk = kept_bk.clip(-PAYLOAD_ABS_MAX, PAYLOAD_ABS_MAX) * _gains(piece.n, k, chunk)
        count = kept_bk.shape[1]
        value.write(kept_bk, Piece(piece.records_br, count, piece.start), salt)

    def check(piece: Piece) -> None:
        value.check(piece._replace(n=_total(piece.n, k, chunk)))

    def read(pieces: list[Piece], size: int) -> SparseRow[torch.Tensor]:
        parts = []
        for piece in pieces:
            value_bk = values_of(value, piece.records_br, _total(piece.n, k, chunk))
            index_k = torch.from_numpy(places(piece).reshape(-1).astype(np.int64))
            parts.append((index_k, torch.from_numpy(value_bk.reshape(-1))))
        return joined(parts, pieces, size)

    return scheme._replace(write=write, check=check, read=read, in_round=None)


def _gains(n: int, k: int, chunk: int) -> Floats:
    """Coordinates per kept one, for each kept value of a record: the short chunk has its own."""
    full, short = divmod(n, chunk)
    gain_k = np.full(_total(n, k, chunk), np.float32(chunk / k))
    if short:
        kept = -(-k * short // chunk)
        gain_k[full * k :] = np.float32(short / kept)
    return gain_k


def _build(arguments: Arguments, inner: Body | None, parse: Any) -> Body:
    k, chunk = arguments.fraction("k", CHUNK_MIN, WINDOW_ALIGN)
    form: Form = "unbiased" if arguments.word("form", ("biased", "unbiased"), "biased") == "unbiased" else "biased"
    arguments.end()
    return over_values(inner, arguments.stage, k, lambda value: randk(k, chunk, form, value))


STAGES = (
    Stage(
        "randk",
        "sparsifier",
        "randk(k/chunk, form=biased)",
        "The same k random coordinates of every chunk for all members, new ones each round.",
        "k/chunk x value",
        "none",
        "arXiv:1809.07599, §2; arXiv:1610.05492, §3",
        _build,
        ("randk(64/4096)|bf16", "randk(256/1024, form=unbiased)|fp32", "ef(0.95)|randk(256/4096)|q2"),
    ),
)
