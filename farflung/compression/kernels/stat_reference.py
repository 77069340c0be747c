"""The plain form of `stat_numba`: writing is left to `formats.statistical`, reading is numpy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from farflung.compression.kernels import BF16_ABS_MAX_BITS, Floats, Octets

HIGH, MINUS_ZERO, PAST_END, UNUSED, FALLING = range(5)


def stat_write(x_bn: Floats, bits: int, out_br: Octets) -> bool:
    """Everything is unusual."""
    return False


def _codes(records_br: Octets, header: int, bits: int) -> Octets:
    """All codes of the records, those past the end included."""
    shift_s1 = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    code_bn: Octets = (records_br[:, None, header:] >> shift_s1 & np.uint8((1 << bits) - 1)).reshape(
        len(records_br), -1
    )
    return code_bn


def _faults(level_bl: NDArray[np.uint16], value_bl: Floats, code_bn: Octets, n: int) -> list[NDArray[np.bool_]]:
    """By kind: which records have it."""
    seen_bl = (code_bn[:, :n, None] == np.arange(level_bl.shape[1])).any(1)
    later_bl = seen_bl[:, 1:]
    return [
        ((level_bl & 0x7FFF) > BF16_ABS_MAX_BITS).any(1),
        (level_bl == 0x8000).any(1),
        (code_bn[:, n:] != 0).any(1),
        (later_bl > seen_bl[:, :-1]).any(1) | (~seen_bl & (level_bl != 0)).any(1),
        (later_bl & ~(value_bl[:, 1:] > value_bl[:, :-1])).any(1),
    ]


def stat_read(records_br: Octets, bits: int, out_bn: Floats) -> int:
    """See `stat_numba.stat_read`; of several faults of one record it may name another."""
    levels, n = 1 << bits, out_bn.shape[1]
    level_bl = np.ascontiguousarray(records_br[:, : 2 * levels]).view("<u2")
    value_bl = (level_bl.astype(np.uint32) << np.uint32(16)).view(np.float32)
    code_bn = _codes(records_br, 2 * levels, bits)
    for b, kinds in enumerate(zip(*_faults(level_bl, value_bl, code_bn, n), strict=True)):
        if any(kinds):
            return 8 * b + kinds.index(True)
    out_bn[:] = np.take_along_axis(value_bl, code_bn[:, :n].astype(np.int64), 1)
    return -1
