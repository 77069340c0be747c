"""How the network's loops become machine code, and when code that numba kept on disk is out of date.

numba's cache looks at the file of the function that is called, not at what that function calls. So inner functions are
compiled into their callers and never cached themselves, and an entry point's key holds a digest of all kernel files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numba

F = TypeVar("F", bound=Callable[..., Any])

OPTIONS: dict[str, Any] = {"nogil": True, "_nrt": False, "error_model": "numpy", "fastmath": False, "parallel": False}
"""IEEE 754 divisions, operations rounded one by one in the written order, no threads: always the same floats.

No reference counts (`_nrt`, numba's flag for code that makes no arrays): kernels borrow their arrays from the caller.
With them every inner call counted 15 arrays up and down atomically, which was half to nine tenths of the time."""

KERNEL_FILES = (
    *("compiling.py", "topology.py", "layout.py", "heap.py", "maxmin.py"),
    *("flows.py", "events.py", "entries.py"),
)
"""Everything whose code or constants end up in machine code."""


def compiled(kernel: F) -> F:
    """An inner function: compiled with whoever calls it."""
    return cast(F, numba.njit(**OPTIONS)(kernel))


def entry(kernel: F) -> F:
    """A function that Python calls. Its machine code is kept on disk, where a folder can be written.

    It must close over `SOURCES`: the cells of a closure are part of numba's key, so no code of an older source is used.
    """
    if SOURCES not in [cell.cell_contents for cell in kernel.__closure__ or ()]:
        raise AssertionError(f"{kernel.__name__} must mention the digest of its sources, or stale code may run")
    try:
        return cast(F, numba.njit(cache=True, **OPTIONS)(kernel))
    except RuntimeError:  # no folder is writable for the cache: compile in every process instead
        return cast(F, numba.njit(**OPTIONS)(kernel))


def _digest() -> str:
    folder = Path(__file__).parent
    return hashlib.sha256(b"".join((folder / name).read_bytes() for name in KERNEL_FILES)).hexdigest()


SOURCES = _digest()
"""Digest of every file that machine code is made from."""
