"""Is my own update fit to be sent? A member that went wild abstains instead of dragging the others along."""

from __future__ import annotations

import math
from dataclasses import dataclass

WARM_UP = 10
"""Rounds before the norm is judged: the first updates of a run shrink quickly and say little."""

ALPHA = 0.1
"""Share of the newest norm in mean and variance. EDiT's 0.02 is for a thousand syncs; ours are hundreds."""

Z_MAX = 6.0
"""Standard deviations of the log norm. EDiT (arXiv:2412.07210, §3.2) cuts at 3; abstaining loses H steps, so twice."""

DEVIATION_MIN = 0.1
"""The log norm's deviation is taken as at least this: a factor of 1.8 is never wild."""


@dataclass
class Screen:
    """EMA z-score on the logarithm of the update's norm; large norms only (EDiT's pseudo-gradient penalty)."""

    mean: float = 0.0
    variance: float = 0.0
    seen: int = 0

    def refuse(self, norm: float) -> str | None:
        """Why an update of this norm should not be sent, or None. A fit one is remembered."""
        if not math.isfinite(norm):
            return "the update is not finite"
        if norm == 0.0:
            return None
        log_norm = math.log(norm)
        deviation = max(math.sqrt(self.variance), DEVIATION_MIN)
        if self.seen >= WARM_UP and (log_norm - self.mean) / deviation > Z_MAX:
            return f"the update's norm {norm:.3g} is wild: usual is {math.exp(self.mean):.3g}"
        step = 1.0 if self.seen == 0 else max(ALPHA, 1.0 / (self.seen + 1))
        off = log_norm - self.mean
        self.mean += step * off
        self.variance = (1.0 - step) * (self.variance + step * off * off)
        self.seen += 1
        return None
