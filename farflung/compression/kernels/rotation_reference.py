"""The kernels of `rotation` in plain numpy: slow, obvious, the same bits."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Words = NDArray[np.uint64]

STEP = np.uint64(0x9E3779B97F4A7C15)


def mixed(state: Words) -> Words:
    """See `rotation.mixed`."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def flip(x_n: Floats, start: int, seed: np.uint64) -> None:
    """See `rotation.flip`."""
    position_n = np.arange(start, start + len(x_n), dtype=np.uint64)
    word_n = mixed(seed + (position_n >> np.uint64(6)) * STEP)
    x_n.view(np.uint32)[:] ^= (word_n >> (position_n & np.uint64(63)) & np.uint64(1)).astype(np.uint32) << np.uint32(31)


def hadamard(x_bn: Floats, scale: np.float32, limit: np.float32) -> None:
    """See `rotation.hadamard`."""
    blocks, n = x_bn.shape
    half = 1
    while half < n:
        pairs = x_bn.reshape(blocks, -1, 2, half)
        low, high = pairs[:, :, 0].copy(), pairs[:, :, 1].copy()
        pairs[:, :, 0], pairs[:, :, 1] = low + high, low - high
        half *= 2
    x_bn[:] = (x_bn * scale).clip(-limit, limit)
