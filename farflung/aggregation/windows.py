"""A flat vector is worked on a window at a time, by one thread or by several, with the same bytes either way."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from farflung.protocol.errors import ConfigError, LocalError
from farflung.protocol.rows import WINDOW_ALIGN

T = TypeVar("T")
Visit = Callable[[int, int], T]

WINDOW = 1 << 16
"""Coordinates per window: 512 KiB of fp64 stay in a second-level cache, and a call costs little per coordinate."""


def never() -> bool:
    """Nobody cancels."""
    return False


def map_windows(
    d: int,
    make_visit: Callable[[], Visit[T]],
    *,
    threads: int = 1,
    cancelled: Callable[[], bool] = never,
    window: int = WINDOW,
) -> list[T]:
    """visit(start, stop) for every window of [0, d); the results in window order.

    Each thread calls `make_visit` once and owns what it allocates. A window is visited once, by whichever thread is
    free, so a visit may write only to its own window. Raises what a visit raises, and
    `concurrent.futures.CancelledError` soon after `cancelled()` turns true.
    """
    if window < 1 or window % WINDOW_ALIGN:
        raise LocalError(f"a window is a multiple of {WINDOW_ALIGN} coordinates, got {window}")
    if threads < 1:
        raise LocalError(f"at least one thread must do the work, got {threads}")
    starts = range(0, d, window)
    waiting = deque(range(len(starts)))
    results: dict[int, T] = {}

    def work() -> None:
        require_denormals()
        visit = make_visit()
        while waiting:
            try:
                position = waiting.popleft()
            except IndexError:  # another thread took the last one
                return
            if cancelled():
                raise CancelledError("the aggregate is no longer wanted")
            results[position] = visit(starts[position], min(starts[position] + window, d))

    def work_or_stop_all() -> None:
        try:
            work()
        except BaseException:
            waiting.clear()
            raise

    if threads == 1 or len(starts) <= 1:
        work()
    else:
        with ThreadPoolExecutor(min(threads, len(starts)), "farflung-windows") as pool:
            for future in [pool.submit(work_or_stop_all) for _ in range(min(threads, len(starts)))]:
                future.result()
    return [results[position] for position in range(len(starts))]


def require_denormals() -> None:
    """Raise ConfigError if this thread flushes numbers below 1e-38 to zero: its bytes would be its own."""
    tiny = np.full(1, 1e-45, dtype=np.float32)
    if float(tiny.astype(np.float64)[0] * 0.5) == 0.0 or float((tiny * np.float32(1))[0]) == 0.0:
        raise ConfigError(
            "this process rounds tiny numbers to zero, so it would disagree with the other members: "
            "do not call torch.set_flush_denormal(True) (or load a library built with -ffast-math)"
        )
