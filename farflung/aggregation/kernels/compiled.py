"""How every kernel is compiled, in one place, because the flags decide the bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

F = TypeVar("F", bound=Callable[..., Any])


def compiled(kernel: F) -> F:
    """Compile with numba: releases the GIL, starts no thread of its own, and rounds every operation on its own.

    No `fastmath`: LLVM then neither reassociates sums nor contracts a product and a sum into one rounding. No
    `parallel`: numba's fallback threading layer may not be entered from two threads at once, and ours are many.
    Divisions follow IEEE 754 (`error_model="numpy"`) rather than raise.
    """
    options = {"nogil": True, "error_model": "numpy", "fastmath": False, "parallel": False}
    try:
        return cast(F, numba.njit(cache=True, **options)(kernel))
    except RuntimeError:  # no folder is writable for the cache: compile in every process instead
        return cast(F, numba.njit(**options)(kernel))
