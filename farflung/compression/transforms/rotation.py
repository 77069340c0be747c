"""Random rotation: spreads spikes over a block, so that one scale fits all of it."""

from __future__ import annotations

from functools import cache, lru_cache
from math import sqrt
from types import ModuleType
from typing import Any

import numpy as np

from farflung.compression.codec import Codec, Row
from farflung.compression.grammar import Arguments
from farflung.compression.scheme import Floats
from farflung.compression.stage import Body, Stage, require
from farflung.compression.transforms.derived import dense_row, fill_dense, inner_codec, seed_of
from farflung.compression.transforms.units import UNIT, Plan, Unit, by_units
from farflung.protocol.limits import PAYLOAD_ABS_MAX
from farflung.protocol.rows import WINDOW_ALIGN
from farflung.protocol.schema import Schema

BLOCK_MIN = 16


@cache
def kernels() -> ModuleType:
    """The numba kernels; imports numba on the first call."""
    from farflung.compression.kernels import rotation

    return rotation


@lru_cache(maxsize=16)
def plan_of(schema: Schema) -> Plan:
    """The vector as it is, in stretches."""
    units = tuple(Unit(at, at, 1, min(UNIT, schema.numel - at), 1, 1) for at in range(0, schema.numel, UNIT))
    return Plan(Schema(schema.tensors), units, tuple(unit.start for unit in units))


def rotate(block: int, inner: Codec) -> Codec:
    """Encode H D x / sqrt(block) of every block: D random signs, H Hadamard's matrix (arXiv:1611.00429, §3).

    The signs are a hash of the round and of the coordinate's place: the same for all members, so that payloads of a
    linear inner codec may be summed. Orthonormal up to fp32 rounding, so that errors have the same size in both bases;
    a rotated block is close to Gaussian whatever it was, which suits `int4`, `nf4` or `qsgd`. A last block of n
    coordinates is taken apart into powers of two. Rotated numbers saturate at PAYLOAD_ABS_MAX. No bits, no state;
    decoded rows are dense, and sparsifiers gain nothing from it.
    """
    scales = {1 << k: np.float32(1 / sqrt(1 << k)) for k in range(block.bit_length())}
    limit = np.float32(PAYLOAD_ABS_MAX)

    def rotate_blocks(x_n: Floats) -> None:
        whole, size = len(x_n) // block * block, block
        if whole:
            kernels().hadamard(x_n[:whole].reshape(-1, block), scales[block], limit)
        while whole < len(x_n):
            size //= 2
            if size <= len(x_n) - whole:
                kernels().hadamard(x_n[whole : whole + size].reshape(1, size), scales[size], limit)
                whole += size

    def forward(values: Floats, unit: Unit, round_index: int, out: Floats) -> None:
        out[:] = values
        kernels().flip(out, unit.start, seed_of("rotate", round_index))
        rotate_blocks(out)

    def backward(row: Row, unit: Unit, round_index: int) -> Row:
        out = np.zeros(unit.size, np.float32)
        fill_dense(row, out)
        rotate_blocks(out)
        kernels().flip(out, unit.start, seed_of("rotate", round_index))
        return dense_row(out)

    fits = BLOCK_MIN <= block <= WINDOW_ALIGN and block & (block - 1) == 0
    require(fits, f"a block is a power of two from {BLOCK_MIN} to {WINDOW_ALIGN}, got {block}")
    return by_units(f"rotate(block={block})", plan_of, forward, backward, inner)


def _build(arguments: Arguments, inner: Body | None, parse: Any) -> Body:
    block = arguments.integer("block", BLOCK_MIN, WINDOW_ALIGN, 4096, power_of_two=True)
    arguments.end()
    return rotate(block, inner_codec(inner, arguments.stage, fixed=False))


STAGES = (
    Stage(
        "rotate",
        "transform",
        "rotate(block=4096)",
        "Random signs and a Hadamard matrix per block, new in every round: spikes become noise.",
        "0",
        "none",
        "arXiv:1611.00429, §3",
        _build,
        ("rotate|int8", "ef(1)|rotate(block=1024)|q2"),
    ),
)
