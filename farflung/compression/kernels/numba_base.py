"""What the numba kernels share: the decorator, constants, and the smallest steps.

Written so that LLVM vectorises without reassociating a float. Neither fastmath nor threads: numba's worker pool may not
be entered from two threads, and stretches are the unit of work.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import numba
import numpy as np
from numpy.typing import NDArray

from farflung.compression.kernels import ABS_MAX_BITS, BF16_ABS_MAX_BITS, FAULTS

P = ParamSpec("P")
R = TypeVar("R")

Words = NDArray[np.int32]

Number = Any
"""A scalar of compiled code: numba gives it the width of what it is called with."""

ROUND = np.float32(1.5 * 2**23)
"""Adding and subtracting this rounds a float below 2**22 to an integer, ties to even."""

MAGNITUDE = np.int32(0x7FFFFFFF)
INFINITE = np.int32(0x7F800000)
SMALLEST = np.int32(0x00800000)
"""The bits of the smallest normal number."""

LARGEST = np.int32(ABS_MAX_BITS)
BF16_LARGEST = np.int32(BF16_ABS_MAX_BITS)
KINDS = len(FAULTS)


def jit(function: Callable[P, R]) -> Callable[P, R]:
    """Compile on first call, release the GIL; IEEE division, no fast maths. Keeps machine code on disk where it may."""
    compiled: Callable[P, R]
    try:
        compiled = numba.njit(nogil=True, cache=True, error_model="numpy")(function)
    except RuntimeError:  # neither the package's folder nor the user's cache can be written
        compiled = numba.njit(nogil=True, error_model="numpy")(function)
    return compiled


@jit
def top_of(bits_bn: Words, b: int) -> Number:
    """The bits of the largest magnitude of block b."""
    top = np.int32(0)
    for j in range(bits_bn.shape[1]):
        magnitude = np.int32(bits_bn[b, j] & MAGNITUDE)
        top = magnitude if magnitude > top else top
    return top


@jit
def bf16_bits(bits: Number) -> Number:
    """The bits of a positive or negative fp32 rounded to bf16, ties to even."""
    return np.int32((bits + (np.int32(0x7FFF) + (bits >> np.int32(16) & np.int32(1)))) >> np.int32(16))


@jit
def code_of(number: Number, inverse: Number, widest: Number, mask: Number) -> Number:
    """round to even(number * inverse), clamped to +-widest, in two's complement of so many bits."""
    step = number * inverse
    step = widest if step > widest else step
    step = -widest if step < -widest else step
    return np.int32(np.int32((step + ROUND) - ROUND) & mask)


@jit
def signed(code: Number, half: int) -> Number:
    """The number of a two's complement code of 2 x half values."""
    return np.int32((code ^ half) - half)


@jit
def larger(a: Number, b: Number) -> Number:
    """The maximum, which stays a vector of 32 bits; numba's own `max` would widen it."""
    return a if a > b else b


@jit
def smaller(a: Number, b: Number) -> Number:
    """The minimum, likewise."""
    return a if a < b else b
