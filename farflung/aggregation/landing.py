"""The outer step right behind the rule: each window of the update is measured and applied while it is in the cache.

The update is read once instead of three times. The bytes are those of `OuterOptimizer.step`, the numbers those of
`norm` and `momentum_gain`, in windows as the rule's: equal on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

from torch import Tensor

from farflung.aggregation.outer import OuterOptimizer, SparseStep
from farflung.aggregation.rows import array_of
from farflung.aggregation.rule import Entries
from farflung.aggregation.windows import WINDOW, Visit, map_windows


class Landing:
    """One step in the making; its call is a rule's `Context.finish`. `update_d` may be `theta_out_d`'s very memory."""

    def __init__(
        self,
        outer: OuterOptimizer,
        theta_d: Tensor,
        momentum_d: Tensor | None,
        update_d: Tensor,
        *,
        theta_out_d: Tensor,
        momentum_out_d: Tensor | None,
    ) -> None:
        self._outer, d = outer, len(theta_d)
        self._step = outer.plan(theta_d, momentum_d, update_d, theta_out_d=theta_out_d, momentum_out_d=momentum_out_d)
        self._update = array_of(update_d, d)
        self._momentum = None if momentum_d is None else array_of(momentum_d, d)
        self._squares: dict[int, float] = {}
        self._alongs: dict[int, float] = {}
        sparse = outer.plan_sparse(theta_d, theta_out_d) if outer.plan_sparse is not None else None
        self.entries = None if sparse is None else partial(self._land_entries, sparse)
        """A rule's `Context.entries`: None if this optimiser moves every coordinate anyway."""

    def __call__(self, start: int, stop: int) -> None:
        """A stretch of the update, a multiple of the window from a multiple of it or to the end, is as it shall be."""
        from farflung.aggregation.kernels import native

        for first in range(start, stop, WINDOW):
            at = slice(first, min(first + WINDOW, stop))
            update_w = self._update[at]
            if self._momentum is not None:
                self._alongs[first] = native.dot(self._momentum[at], update_w)
            self._squares[first] = native.dot(update_w, update_w)
            self._step(at)

    def _land_entries(self, step: SparseStep, start: int, stop: int, pieces: Sequence[Entries]) -> None:
        self._squares |= dict.fromkeys(range(start, stop, WINDOW), 0.0)
        self._squares[start] = step(slice(start, stop), pieces)

    def end(self, threads: int) -> dict[str, float]:
        """Do what no rule has called for; returns the numbers for the round log."""
        d = len(self._update)
        if not self._squares:

            def make_visit() -> Visit[None]:
                return self

            map_windows(d, make_visit, threads=threads)
        square = along = 0.0
        for start in sorted(self._squares):
            square += self._squares[start]
            along += self._alongs.get(start, 0.0)
        numbers = {"update_norm": math.sqrt(square) if square >= 0 else math.nan}
        if self._momentum is not None:
            momentum = self._outer.momentum
            gain = 1.0 + momentum + (momentum * momentum * (along / square) if square else 0.0)
            numbers["momentum_gain"] = gain
        return numbers
