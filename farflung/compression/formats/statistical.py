"""The statistical quantiser of SparseLoCo and MuLoCo: bins over six sigmas, each decoded to its mean."""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from farflung.compression.formats.records import (
    BF16_ABS_MAX,
    from_bf16,
    header_and_codes,
    measured,
    take_block,
    to_bf16,
    view,
)
from farflung.compression.grammar import Arguments
from farflung.compression.kernels.codes import Doubles, fastest_codes
from farflung.compression.scheme import NOBODY, Floats, Octets, Piece, Scheme
from farflung.compression.stage import Body, Stage, require, with_coder
from farflung.protocol.errors import PeerError
from farflung.protocol.rows import DenseRow

FAULTS = (
    "a level is not finite or too large",
    "a level is -0.0",
    "a code past the end is not 0",
    "a level is never used",
    "levels do not strictly increase",
)
"""Why a record is refused, by the number of `kernels.stat_numba`."""

STAT_BITS = 2

STAT_BLOCKS = {2: 1024, 4: 4096, 8: 1 << 14}
"""A 2**bits-entry codebook of bf16 per block: 1/16, 1/16 and 1/4 bit per parameter."""


def stat(bits: int, block: int) -> Scheme:
    """2**bits bins of width 6 sigma / 2**bits around the block's mean; a code decodes to its bin's mean.

    arXiv:2508.15706, §3 and its code: bin = clamp(round((x - mean) / width + 2**(bits - 1))), sigma with n - 1. Record:
    2**bits levels (bf16; they hold the mean already), then the codes. bits + 16 x 2**bits / block bits per parameter.
    sum(x - decoded) = 0 per bin and ||x - decoded||^2 = ||x - mean||^2 - ||decoded - mean||^2, up to the rounding of
    the levels. Canonical: codes count the distinct levels upwards from 0, levels past the last one used are 0, no level
    is -0.0; a block of at most 2**bits different bf16 numbers is sent as it is, so what was decoded encodes to itself.
    """
    require(bits in STAT_BLOCKS, f"bits must be one of {', '.join(map(str, STAT_BLOCKS))}, got {bits}")
    levels = 1 << bits
    header = 2 * levels

    def write(x_bn: Floats, piece: Piece, salt: int) -> None:
        out_br = piece.records_br
        if out_br.flags.c_contiguous and _kernels().stat_write(np.ascontiguousarray(x_bn), bits, out_br):
            return
        write_plainly(x_bn, out_br)

    def write_plainly(x_bn: Floats, out_br: Octets) -> None:
        x_bn, _ = measured(x_bn)
        bin_bn, mean_bl, used_bl = _binned(x_bn, levels)
        level_bl, rank_bl = _ranked(mean_bl, used_bl)
        _send_as_it_is(x_bn, bin_bn, level_bl, rank_bl)
        view(out_br[:, :header], "<u2")[:] = level_bl
        fastest_codes().ranked_pack(bin_bn, rank_bl, bits, out_br, header)

    def fill(piece: Piece, out_d: Floats) -> None:
        records_br = np.ascontiguousarray(piece.records_br)
        found = _kernels().stat_read(records_br, bits, out_d.reshape(-1, piece.n))
        if found >= 0:
            raise PeerError(NOBODY, f"{FAULTS[found % 8]}, in record {found // 8}")

    def read(pieces: list[Piece], size: int) -> DenseRow[torch.Tensor]:
        out_d = np.empty(size, np.float32)
        first = 0
        for piece in pieces:
            fill(piece, out_d[first : first + piece.size])
            first += piece.size
        return DenseRow(torch.from_numpy(out_d))

    def check(piece: Piece) -> None:
        fill(piece, np.empty(piece.size, np.float32))

    spec = f"stat(bits={bits}, block={block})"
    return Scheme(spec, block, header_and_codes(header, bits), write, check, read)


@cache
def _kernels() -> ModuleType:
    """The numba kernels; imports numba on the first call."""
    from farflung.compression.kernels import stat_numba

    return stat_numba


def _binned(x_bn: Floats, levels: int) -> tuple[Octets, Doubles, NDArray[np.bool_]]:
    """(bin of each entry, mean of each bin, whether it is used)."""
    n = x_bn.shape[1]
    mean_b = fastest_codes().sum_plain(x_bn) / n
    sigma_b = np.sqrt(fastest_codes().sum_squares(x_bn, mean_b) / max(n - 1, 1))
    per_unit_b = np.where(sigma_b > 0, levels / 6 / np.where(sigma_b > 0, sigma_b, 1), 0)
    bin_bn, sum_bl, count_bl = fastest_codes().bins(x_bn, mean_b, per_unit_b, levels)
    return bin_bn, sum_bl / np.maximum(count_bl, 1), count_bl > 0


def _ranked(mean_bl: Doubles, used_bl: NDArray[np.bool_]) -> tuple[NDArray[np.uint16], Octets]:
    """(distinct levels in order, then zeros; the place of each bin's level among them)."""
    bits_bl = to_bf16(np.clip(mean_bl, -BF16_ABS_MAX, BF16_ABS_MAX).astype(np.float32))
    bits_bl[bits_bl == 0x8000] = 0
    value_bl = np.where(used_bl, from_bf16(bits_bl), np.float32(-np.inf))
    before_bl = np.pad(np.maximum.accumulate(value_bl, 1)[:, :-1], ((0, 0), (1, 0)), constant_values=-np.inf)
    new_bl = value_bl > before_bl
    rank_bl = np.maximum(new_bl.cumsum(1) - 1, 0)
    level_bl = np.zeros(mean_bl.shape, np.uint16)
    level_bl[np.nonzero(new_bl)[0], rank_bl[new_bl]] = bits_bl[new_bl]
    return level_bl, rank_bl.astype(np.uint8)


def _send_as_it_is(x_bn: Floats, bin_bn: Octets, level_bl: NDArray[np.uint16], rank_bl: Octets) -> None:
    """Overwrite what was found for blocks of few different bf16 numbers; rare where numbers are measured."""
    levels = level_bl.shape[1]
    plain_b = (x_bn[:, :64].view(np.uint32) & np.uint32(0xFFFF) == 0).all(1)
    for b in np.flatnonzero(plain_b):
        value_m, place_n = np.unique(x_bn[b] + np.float32(0), return_inverse=True)  # -0.0 + 0.0 = +0.0
        if len(value_m) <= levels and not (value_m.view(np.uint32) & np.uint32(0xFFFF)).any():
            bin_bn[b], rank_bl[b] = place_n, np.arange(levels)
            level_bl[b] = 0
            level_bl[b, : len(value_m)] = value_m.view(np.uint32) >> np.uint32(16)


def _build_stat(arguments: Arguments, inner: Body | None, parse: Any) -> Body:
    bits = int(arguments.word("bits", tuple(map(str, STAT_BLOCKS)), str(STAT_BITS)))
    block = take_block(arguments, STAT_BLOCKS[bits])
    arguments.end()
    return with_coder(stat(bits, block), inner, arguments.stage)


STAGES = (
    Stage(
        "stat",
        "number format",
        "stat(bits=2, block=1024)",
        "Bins over six sigmas, each decoded to its mean.",
        "bits + 16 x 2^bits / block",
        "none",
        "arXiv:2508.15706, §3",
        _build_stat,
        ("stat", "stat(bits=4)", "stat(bits=8)", "ef(0.9)|stat", "topk(64/4096)|stat"),
    ),
)
