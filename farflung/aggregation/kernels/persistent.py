# ruff: noqa: D103 - the contracts are in `persistent_reference`; a kernel is called with everything it reads and writes
"""Steps on a numerator, and accelerated gossip, as compiled loops: each does what its namesake in the reference says.

All vectors of a call have one type, fp32 or fp64, and share no memory. What is stored is rounded to it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
from numpy.typing import NDArray

F = TypeVar("F", bound=Callable[..., Any])
Floats = NDArray[np.floating[Any]]


def compiled(kernel: F) -> F:
    """`native.compiled`, in the kernels' own file because numba's cache looks at nothing else."""
    options = {"nogil": True, "error_model": "numpy", "fastmath": False, "parallel": False}
    try:
        return cast(F, numba.njit(cache=True, **options)(kernel))
    except RuntimeError:  # no folder is writable for the cache: compile in every process instead
        return cast(F, numba.njit(**options)(kernel))


@compiled
def plain(x_w: Floats, delta_w: Floats, lr: float) -> None:
    for j in range(len(x_w)):
        x_w[j] = np.float64(x_w[j]) - lr * np.float64(delta_w[j])


@compiled
def heavy_ball(x_w: Floats, buffer_w: Floats, delta_w: Floats, lr: float, momentum: float) -> None:
    for j in range(len(x_w)):
        buffer_w[j] = momentum * np.float64(buffer_w[j]) + np.float64(delta_w[j])
        x_w[j] = np.float64(x_w[j]) - lr * np.float64(buffer_w[j])


@compiled
def nesterov(x_w: Floats, buffer_w: Floats, delta_w: Floats, lr: float, momentum: float) -> None:
    for j in range(len(x_w)):
        delta = np.float64(delta_w[j])
        buffer_w[j] = momentum * np.float64(buffer_w[j]) + delta
        x_w[j] = np.float64(x_w[j]) - lr * (delta + momentum * np.float64(buffer_w[j]))


@compiled
def accelerate(out_w: Floats, y_w: Floats, before_w: Floats, pull_w: Floats, alpha: float, gamma: float) -> None:
    for j in range(len(out_w)):
        y = np.float64(y_w[j])
        out_w[j] = y - alpha * np.float64(pull_w[j]) + gamma * (y - np.float64(before_w[j]))
